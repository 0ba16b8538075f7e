"""The domains of a data set, and weights over them, as files.

The manifest `domains.json` gives domains their order, which is the order of every vector in this program, and
binds them to a tokenizer. Weights are kept by name and matched by name: a weight never lands on another domain.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_doremi.data.files import atomic_write_text, read_json_object
from megatron_doremi.data.indexed_dataset import IndexedDataset
from megatron_doremi.errors import ConfigError, Fault, raise_if_any

MANIFEST_FORMAT = "megatron-doremi-domains/1"
WEIGHTS_FORMAT = "megatron-doremi-weights/1"
# Above any weight that makes sense, and low enough that their sum is a float.
_LARGEST_WEIGHT = 1e100
# A smaller share is a window in 10^12, and soon nothing but a rounding of the others.
_SMALLEST_SHARE = 1e-12


@dataclass(frozen=True)
class Domain:
    """A domain and where its indexed data lies.

    Attributes:
        train, valid: prefixes of .bin and .idx pairs; valid is None where nothing is held out.
        tokens, documents, bytes: size of the train split (bytes of UTF-8 text; of ids where the text is not known).
    """

    name: str
    train: Path
    valid: Path | None
    tokens: int
    documents: int
    bytes: int


@dataclass(frozen=True)
class TokenizerInfo:
    """The tokenizer that made the ids.

    Attributes:
        type: Megatron-LM's name of its kind.
        file: path of its model.
        sha256: of that file, in hex.
        vocab_size: ids are below this.
        eod: id that ends a document.
    """

    type: str
    file: Path
    sha256: str
    vocab_size: int
    eod: int


@dataclass(frozen=True)
class Manifest:
    """Domains in their order.

    Attributes:
        given_weights: weights that came with the domains (Megatron-LM's list), as given; None in a domains.json.
    """

    domains: tuple[Domain, ...]
    tokenizer: TokenizerInfo | None
    path: Path
    given_weights: tuple[float, ...] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(domain.name for domain in self.domains)

    def natural_weights(self) -> NDArray[np.float64]:
        """[k] shares by token count, sum 1."""
        tokens = np.array([domain.tokens for domain in self.domains], dtype=np.float64)
        return tokens / tokens.sum()

    def fingerprint(self) -> str:
        """A hash of what a run's data is: names in their order, sizes, tokenizer. Not of where it lies."""
        sizes = [[d.name, d.tokens, d.documents, d.bytes] for d in self.domains]
        entry = [sizes, self.tokenizer.sha256 if self.tokenizer else None]
        return hashlib.sha256(json.dumps(entry).encode()).hexdigest()


def load_manifest(path: Path) -> Manifest:
    """Reads a manifest: domains.json, or Megatron-LM's 'weight prefix weight prefix ...' text.

    The latter names neither held-out data nor a tokenizer; sizes are read from its indexed data.

    Raises:
        ConfigError: with every fault of the file.
    """
    what = f"manifest {path}"
    try:
        start = path.read_text(encoding="utf-8").lstrip()[:1]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(Fault(what, str(error), "a readable manifest", "give --domains its path")) from error
    if start not in ("{", "["):
        return _load_prefix_list(path, what)
    entry = read_json_object(path, what)
    faults: list[Fault] = []
    if entry.get("format") != MANIFEST_FORMAT:
        faults.append(
            Fault(
                what,
                f"format {entry.get('format')!r}",
                MANIFEST_FORMAT,
                "make it with tools/preprocess_data.py",
            )
        )
    domains = _read_domains(entry.get("domains"), path.parent, what, faults)
    tokenizer = _read_tokenizer(entry.get("tokenizer"), path.parent, what, faults)
    raise_if_any(faults)
    return Manifest(tuple(domains), tokenizer, path)


def _read_domains(entries: Any, folder: Path, what: str, faults: list[Fault]) -> list[Domain]:
    remedy = "make the manifest with tools/preprocess_data.py"
    if not isinstance(entries, list) or not entries:
        faults.append(Fault(what, "no domains", "a list 'domains' of at least one", remedy))
        return []
    domains: list[Domain] = []
    for number, entry in enumerate(entries):
        try:
            name, train, valid = entry["name"], entry["train"], entry.get("valid")
            sizes = {key: entry[key] for key in ("tokens", "documents", "bytes")}
            if not isinstance(name, str) or not name or not isinstance(train, str) or not train:
                raise ValueError("name and train must be text")
            if valid is not None and (not isinstance(valid, str) or not valid):
                raise ValueError("valid must be text or null")
            for key, size in sizes.items():
                if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 2**63:
                    raise ValueError(f"{key} {size!r} is no size")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            missing = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            faults.append(
                Fault(
                    what,
                    f"domain {number}: {missing}",
                    "name, train, valid, tokens, documents, bytes",
                    remedy,
                )
            )
            continue
        if any(domain.name == name for domain in domains):
            faults.append(Fault(what, f"two domains {name!r}", "a name for each domain", remedy))
        domains.append(Domain(name, folder / train, None if valid is None else folder / valid, **sizes))
    if domains and not faults and not sum(domain.tokens for domain in domains):
        faults.append(Fault(what, "no tokens in any domain", "text to train on", remedy))
    return domains


def _read_tokenizer(entry: Any, folder: Path, what: str, faults: list[Fault]) -> TokenizerInfo | None:
    if entry is None:
        return None
    try:
        kind, file, sha256 = entry["type"], entry["file"], entry["sha256"]
        vocab_size, eod = entry["vocab_size"], entry["eod"]
        if not all(isinstance(value, str) for value in (kind, file, sha256)):
            raise ValueError("type, file and sha256 must be text")
        if any(not isinstance(value, int) or isinstance(value, bool) for value in (vocab_size, eod)):
            raise ValueError("vocab_size and eod must be whole numbers")
        if not 0 <= eod < vocab_size:
            raise ValueError(f"eod {eod} is not below vocab_size {vocab_size}")
    except (KeyError, TypeError, ValueError) as error:
        missing = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        faults.append(
            Fault(
                what,
                f"tokenizer: {missing}",
                "type, file, sha256, vocab_size, eod",
                "make the manifest with tools/preprocess_data.py",
            )
        )
        return None
    return TokenizerInfo(kind, folder / file, sha256, vocab_size, eod)


def _load_prefix_list(path: Path, what: str) -> Manifest:
    words = path.read_text(encoding="utf-8").split()
    rule = "pairs of a positive weight and a prefix, each prefix once"
    remedy = "write: weight prefix weight prefix ..."
    faults: list[Fault] = []
    if not words or len(words) % 2:
        raise ConfigError(Fault(what, f"{len(words)} words", rule, remedy))
    domains: list[Domain] = []
    names: set[str] = set()
    weights: list[float] = []
    for text, prefix in zip(words[::2], words[1::2], strict=True):
        name = Path(prefix).name
        try:
            weight = float(text)
        except ValueError:
            weight = math.nan
        if not 0.0 < weight < _LARGEST_WEIGHT:
            faults.append(Fault(what, f"weight {text} of {prefix}", rule, remedy))
        if name in names:
            faults.append(Fault(what, f"two prefixes named {name}", rule, remedy))
        weights.append(weight)
        names.add(name)
        try:
            dataset = IndexedDataset(path.parent / prefix)
        except ConfigError as error:
            faults += error.faults
        else:
            size = dataset.num_tokens
            domains.append(
                Domain(name, dataset.prefix, None, size, dataset.num_documents, size * dataset.dtype.itemsize)
            )
    raise_if_any(faults)
    return Manifest(tuple(domains), None, path, tuple(weights))


def save_manifest(manifest: Manifest) -> None:
    """Writes a manifest at its path, prefixes relative to it."""
    folder = manifest.path.parent

    def relative(path: Path) -> str:
        return os.path.relpath(path, folder).replace(os.sep, "/")

    entry: dict[str, Any] = {"format": MANIFEST_FORMAT, "tokenizer": None, "domains": []}
    if manifest.tokenizer:
        entry["tokenizer"] = {**vars(manifest.tokenizer), "file": relative(manifest.tokenizer.file)}
    for domain in manifest.domains:
        valid = None if domain.valid is None else relative(domain.valid)
        entry["domains"].append({**vars(domain), "train": relative(domain.train), "valid": valid})
    atomic_write_text(manifest.path, json.dumps(entry, indent=2) + "\n")


def save_weights(
    path: Path, weights: Mapping[str, float], tokenizer_sha256: str | None, provenance: Mapping[str, Any]
) -> None:
    """Writes domain weights with what they were learned from; floats in full precision."""
    entry = {
        "format": WEIGHTS_FORMAT,
        "weights": dict(weights),
        "tokenizer_sha256": tokenizer_sha256,
        "provenance": dict(provenance),
    }
    atomic_write_text(path, json.dumps(entry, indent=2) + "\n")


def resolve_weights(setting: str, manifest: Manifest, allow_tokenizer_mismatch: bool) -> NDArray[np.float64]:
    """[k] sampling weights, sum 1, for --domain-weights uniform, natural, given or FILE.

    Raises:
        ConfigError: `given` for a manifest without weights, or what `load_weights` raises.
    """
    count = len(manifest.domains)
    if setting == "given":
        if manifest.given_weights is None:
            raise ConfigError(
                Fault(
                    "--domain-weights given",
                    str(manifest.path),
                    "a list 'weight prefix weight prefix ...' as --domains",
                    "give uniform, natural or a weights file",
                )
            )
        return _shares(f"manifest {manifest.path}", manifest, manifest.given_weights)
    if setting == "uniform":
        return np.full(count, 1.0 / count)
    if setting == "natural":
        if not sum(domain.tokens for domain in manifest.domains):
            what, value = "--domain-weights natural", f"no token counts in {manifest.path}"
            remedy = "use a domains.json of tools/preprocess_data.py, or uniform, or a weights file"
            raise ConfigError(Fault(what, value, "domains whose sizes are known", remedy))
        return manifest.natural_weights()
    return load_weights(Path(setting), manifest, allow_tokenizer_mismatch)


def load_weights(path: Path, manifest: Manifest, allow_tokenizer_mismatch: bool) -> NDArray[np.float64]:
    """Reads weights for the manifest's domains, in its order, normalised.

    Takes this program's file, a bare {name: weight}, and {"train_domain_weights": {name: weight}, ...}, the
    form of the DoReMi authors' repository.

    Raises:
        ConfigError: with every fault, names that are unknown or missing and another tokenizer among them.
    """
    what = f"--domain-weights {path}"
    entry = read_json_object(path, what)
    faults: list[Fault] = []
    weights: Any = entry
    if "format" in entry and not isinstance(entry["format"], int | float):
        weights = entry.get("weights")
        if entry["format"] != WEIGHTS_FORMAT:
            faults.append(Fault(what, f"format {entry['format']!r}", WEIGHTS_FORMAT, "give a weights file"))
        faults += _tokenizer_faults(what, entry.get("tokenizer_sha256"), manifest, allow_tokenizer_mismatch)
    elif "train_domain_weights" in entry:
        weights = entry["train_domain_weights"]
    if not isinstance(weights, dict):
        faults.append(Fault(what, "no weights", "an object {name: weight}", "give a weights file"))
        raise ConfigError(faults)
    faults += _weight_faults(what, weights, manifest)
    raise_if_any(faults)
    return _shares(what, manifest, [float(weights[name]) for name in manifest.names])


def _shares(what: str, manifest: Manifest, weights: Sequence[float]) -> NDArray[np.float64]:
    """[k] positive weights, normalised. Raises ConfigError where one all but vanishes beside the others."""
    shares = np.array(weights) / np.sum(weights)
    raise_if_any(
        [
            Fault(
                what,
                f"{name!r}: a share of {share:.1e}",
                f"shares of at least {_SMALLEST_SHARE}",
                "leave a domain out of the manifest to train without it",
            )
            for name, share in zip(manifest.names, shares, strict=True)
            if share < _SMALLEST_SHARE
        ]
    )
    return shares


def _tokenizer_faults(what: str, sha256: Any, manifest: Manifest, allowed: bool) -> list[Fault]:
    ours = manifest.tokenizer.sha256 if manifest.tokenizer else None
    if allowed or sha256 == ours:
        return []
    return [
        Fault(
            what,
            f"learned with tokenizer {str(sha256)[:12]}",
            f"the manifest's tokenizer, {str(ours)[:12]}",
            "learn the weights with this tokenizer (they do not carry over), or give --allow-tokenizer-mismatch",
        )
    ]


def _weight_faults(what: str, weights: Mapping[str, Any], manifest: Manifest) -> list[Fault]:
    faults = []
    unknown = [name for name in weights if name not in manifest.names]
    missing = [name for name in manifest.names if name not in weights]
    if unknown:
        faults.append(
            Fault(
                what,
                "unknown: " + ", ".join(map(repr, unknown)),
                "the manifest's names exactly: " + ", ".join(map(repr, manifest.names)),
                "rename or remove these entries",
            )
        )
    if missing:
        faults.append(Fault(what, "missing: " + ", ".join(map(repr, missing)), "a weight for each domain", "add them"))
    for name, weight in weights.items():
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not (0.0 < weight < _LARGEST_WEIGHT):
            faults.append(
                Fault(
                    what,
                    f"{name!r}: {weight!r}",
                    "a positive number",
                    "leave a domain out of the manifest to train without it",
                )
            )
    return faults
