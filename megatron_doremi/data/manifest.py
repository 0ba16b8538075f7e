"""The manifest of a data set, domains.json: its domains, their files and sizes, and the tokenizer.

The order of the domains in the manifest is the order of every per-domain vector in this program. Related files:
weights_file.py reads weights over the domains, prefix_list.py reads Megatron-LM's lists.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import unicodedata
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from megatron_doremi.console import warn
from megatron_doremi.data.given_weights import did_you_mean, split_names
from megatron_doremi.data.indexed_dataset import IndexedDataset, paths_of
from megatron_doremi.data.prefix_list import ListedDomain, is_split_lists, pair_identity, read_split_lists, read_words
from megatron_doremi.data.token_stream import DatasetPart, TokenStream, split_bounds
from megatron_doremi.errors import ConfigError, Fault, raise_if_any
from megatron_doremi.storage.files import atomic_write_text, read_json_object, read_text_file, unreadable
from megatron_doremi.storage.formats import Count, Name, PathText, Positive, Schema, Sha256, check_entry, format_fault

MANIFEST_FORMAT = "megatron-doremi-domains/1"
_REMEDY = "make the manifest with tools/preprocess_data.py"


class TokenizerEntry(Schema):
    """The tokenizer's entry in a JSON file of this program."""

    type: Name
    file: PathText
    sha256: Sha256
    vocab_size: Positive
    eod: Count

    @model_validator(mode="after")
    def _eod_in_vocabulary(self) -> TokenizerEntry:
        if self.eod >= self.vocab_size:
            message = f"eod {self.eod} should be below vocab_size {self.vocab_size}"
            raise PydanticCustomError("eod", message)  # type: ignore[arg-type]
        return self


class DomainEntry(Schema):
    """A domain's entry in domains.json."""

    name: Name
    train: PathText
    valid: PathText | None = None
    tokens: Count
    documents: Count
    bytes: Count


class ManifestEntry(Schema):
    """The content of domains.json."""

    FORMAT: ClassVar[str] = MANIFEST_FORMAT
    tokenizer: TokenizerEntry | None = None
    domains: list[DomainEntry] = Field(min_length=1)


@dataclass(frozen=True)
class Domain:
    """A domain and its indexed data.

    Attributes:
        train, valid: prefixes of the .bin/.idx pairs; valid is None if the domain has no held-out data.
        tokens, documents, bytes: size of the train split. `bytes` counts UTF-8 text, or the ids if the size of the
            text is unknown (Megatron-LM's lists).
    """

    name: str
    train: Path
    valid: Path | None
    tokens: int
    documents: int
    bytes: int


@dataclass(frozen=True)
class TokenizerInfo:
    """The tokenizer that encoded the data.

    Attributes:
        type: Megatron-LM's name of the tokenizer type.
        file: path of the tokenizer's model.
        sha256: of that file, in hex.
        vocab_size: number of ids; every id is smaller.
        eod: id of the end-of-document token.
    """

    type: str
    file: Path
    sha256: str
    vocab_size: int
    eod: int


@dataclass(frozen=True)
class Manifest:
    """The domains of a data set, in order.

    Attributes:
        given_weights: [k] weights as given in Megatron-LM's list, not normalized; None for a domains.json.
        warnings: legal content that is probably a mistake, one message each; the programs print them.
        excluded: names of domains that the user leaves out; `domains` does not hold them.
        split: shares of train, valid and test in each pair of a list (--split); None: each pair is one of them.
    """

    domains: tuple[Domain, ...]
    tokenizer: TokenizerInfo | None
    path: Path
    given_weights: tuple[float, ...] | None = None
    warnings: tuple[str, ...] = field(default=(), compare=False)
    excluded: tuple[str, ...] = ()
    split: tuple[float, ...] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(domain.name for domain in self.domains)

    def natural_weights(self) -> NDArray[np.float64]:
        """[k] shares of the token counts, sum 1."""
        tokens = np.array([domain.tokens for domain in self.domains], dtype=np.float64)
        return tokens / tokens.sum()

    def open_train(self, domain: Domain, vocab_size: int = 0) -> TokenStream:
        """Opens a domain's training stream; see `IndexedDataset`, also for the ConfigError."""
        return self._open(domain, domain.train, vocab_size, 0)

    def open_held_out(self, domain: Domain, vocab_size: int = 0) -> TokenStream | None:
        """Opens a domain's held-out stream, if it has one."""
        return None if domain.valid is None else self._open(domain, domain.valid, vocab_size, 1)

    def _open(self, domain: Domain, prefix: Path, vocab_size: int, part: int) -> TokenStream:
        if not any(os.path.exists(path) for path in paths_of(prefix)):
            place = "its folder" if self.tokenizer else "the working directory, or else to the list's folder"
            rule = f"PREFIX.bin and PREFIX.idx; prefixes in {self.path} are relative to {place}"
            remedy = "keep the manifest beside its data, or correct the prefix"
            raise ConfigError(Fault(f"domain {domain.name!r} ({prefix})", "no such file", rule, remedy))
        dataset = IndexedDataset(prefix, vocab_size)
        if self.split is None:
            return dataset
        return DatasetPart(dataset, *split_bounds(self.split, dataset.num_sequences)[part])

    def without(self, names: Collection[str]) -> Manifest:
        """The manifest without some of its domains, the others in their order."""
        kept = [name not in names for name in self.names]
        weights = self.given_weights and tuple(itertools.compress(self.given_weights, kept))
        excluded = (*self.excluded, *(name for name in self.names if name in names))
        return replace(
            self, domains=tuple(itertools.compress(self.domains, kept)), given_weights=weights, excluded=excluded
        )

    def fingerprint(self) -> str:
        """SHA-256, in hex, of the data's identity: names in order, sizes, tokenizer. Independent of file paths."""
        sizes = [[d.name, d.tokens, d.documents, d.bytes] for d in self.domains]
        entry = [sizes, self.tokenizer.sha256 if self.tokenizer else None]
        return hashlib.sha256(json.dumps(entry).encode()).hexdigest()


def open_manifest(
    domains: str, data_path: Sequence[str], split: tuple[float, ...] | None, excluded: Sequence[str]
) -> Manifest:
    """The data of --domains or, if that is "", of --data-path, without the domains of --exclude-domains.

    Raises:
        ConfigError: the manifest is faulty, or --exclude-domains names other domains.
    """
    manifest = load_manifest(Path(domains), split) if domains else manifest_of_words(data_path, split)
    return exclude_domains(manifest, excluded)


def manifest_of_words(words: Sequence[str], split: tuple[float, ...] | None) -> Manifest:
    """The domains of --data-path, Megatron-LM's list on the command line; `split`: see `load_manifest`."""
    subject = "--data-path"
    listed, warnings = read_words(Path(subject), " ".join(words), subject)
    return _checked(_from_list(Path(subject), listed, warnings, split), subject)


def load_manifest(path: Path, split: tuple[float, ...] | None = None) -> Manifest:
    """Reads a manifest: domains.json, or one of Megatron-LM's lists (prefix_list.py).

    A list names no tokenizer; its domains' sizes are read from the indexed data.

    Args:
        split: shares of train, valid and test in each pair; only for a list that has no held-out pairs.

    Raises:
        ConfigError: with all faults of the file. Two domains that share data are a fault.
    """
    subject = f"manifest {path}"
    try:
        text = read_text_file(path)
    except (OSError, ValueError) as error:
        remedy = f"give {path / 'domains.json'}" if os.path.isdir(path) else "give the path of domains.json"
        value, remedy = unreadable(path, error, remedy)
        raise ConfigError(Fault(subject, value, "a readable manifest", remedy)) from error
    if text.lstrip()[:1] not in ("{", "["):
        return _checked(_from_list(path, *read_words(path, text, subject), split), subject)
    entry = read_json_object(path, subject)
    if split is not None:
        rule, remedy = "it names the held-out data itself; --split is for a list of prefixes", "leave --split out"
        raise ConfigError(Fault("--split", f"has no effect on {path}", rule, remedy))
    if is_split_lists(entry):
        return _checked(_from_list(path, *read_split_lists(path, entry, subject)), subject)
    checked = check_entry(entry, subject, ManifestEntry, _REMEDY)
    folder = path.parent
    domains = tuple(
        Domain(
            domain.name,
            folder / domain.train,
            None if domain.valid is None else folder / domain.valid,
            domain.tokens,
            domain.documents,
            domain.bytes,
        )
        for domain in checked.domains
    )
    tokenizer = None if checked.tokenizer is None else tokenizer_info(checked.tokenizer, folder)
    manifest = _checked(Manifest(domains, tokenizer, path), subject)
    if not sum(domain.tokens for domain in domains):
        raise ConfigError(Fault(subject, "no tokens in any domain", "text to train on", _REMEDY))
    return manifest


def exclude_domains(manifest: Manifest, words: Sequence[str]) -> Manifest:
    """The manifest without the domains of --exclude-domains. Raises ConfigError for names that it does not have."""
    names, subject = list(split_names(words, manifest.names)), "--exclude-domains"
    rule = "names of the manifest's domains: " + ", ".join(map(repr, manifest.names))
    raise_if_any(
        [
            Fault(
                subject, repr(name), rule, did_you_mean(name, manifest.names) or "give names as the manifest has them"
            )
            for name in names
            if name not in manifest.names
        ]
    )
    if set(names) == set(manifest.names):
        raise ConfigError(Fault(subject, "every domain", "at least one domain to read", "leave a domain in"))
    return manifest.without(names)


def overwriting_faults(path: Path) -> list[Fault]:
    """A fault if writing a manifest at `path` would overwrite something else, such as a list of that name."""
    subject, remedy = str(path), "move that file, or give another folder"
    if not os.path.lexists(path):
        return []
    try:
        fault = format_fault(read_json_object(path, subject), subject, ManifestEntry, remedy)
    except ConfigError:
        fault = Fault(subject, "a folder or another file of that name exists", "a path for the manifest", remedy)
    return [] if fault is None else [fault]


def tokenizer_info(entry: TokenizerEntry, folder: Path) -> TokenizerInfo:
    """The tokenizer of a JSON file in `folder`; its path is relative to that folder."""
    return TokenizerInfo(entry.type, folder / entry.file, entry.sha256, entry.vocab_size, entry.eod)


def _from_list(
    path: Path,
    listed: Sequence[ListedDomain],
    warnings: Sequence[str],
    split: tuple[float, ...] | None = None,
) -> Manifest:
    manifest = Manifest((), None, path, warnings=tuple(warnings), split=split)
    faults: list[Fault] = []
    domains: list[Domain] = []
    for domain in listed:
        valid = domain.train if split is not None and split[1] else domain.valid
        entry = Domain(domain.name, domain.train, valid, 0, 0, 0)
        try:
            stream = manifest.open_train(entry)
        except ConfigError as error:
            faults += error.faults
            continue
        size = stream.num_tokens
        domains.append(replace(entry, tokens=size, documents=stream.num_documents, bytes=size * stream.dtype.itemsize))
    raise_if_any(faults)
    weights = tuple(domain.weight for domain in listed if domain.weight is not None)
    return replace(manifest, domains=tuple(domains), given_weights=weights or None)


def _checked(manifest: Manifest, subject: str) -> Manifest:
    """Refuses duplicate names and shared data; adds warnings about probable mistakes."""
    faults = []
    warnings = list(manifest.warnings)
    duplicates = {name for name in manifest.names if manifest.names.count(name) > 1}
    faults += [Fault(subject, f"two domains {name!r}", "unique names", _REMEDY) for name in sorted(duplicates)]
    owners: dict[tuple[str, Hashable], Domain] = {}
    for domain in manifest.domains:
        for split, prefix in (("train", domain.train), ("valid", domain.valid)):
            if prefix is None:
                continue
            owner = owners.setdefault((split, pair_identity(prefix)), domain)
            if owner is not domain:
                value = f"{owner.name!r} and {domain.name!r} have the same {split} data, {prefix}"
                faults.append(Fault(subject, value, "separate data for each domain", "give each prefix once"))
    for (split, identity), domain in owners.items():
        trained = owners.get(("train", identity)) if split == "valid" and manifest.split is None else None
        if trained is not None:
            warnings.append(
                f"{subject}: the held-out data of {domain.name!r} is the training data of {trained.name!r}, "
                f"so its held-out loss is a training loss"
            )
    for names in similar_names(manifest.names):
        warnings.append(f"{subject}: {', '.join(map(repr, names))} differ only by case or spaces")
    raise_if_any(faults)
    return replace(manifest, warnings=tuple(warnings))


def similar_names(names: Iterable[str]) -> list[list[str]]:
    """Groups of different domain names that differ only by case, white space or Unicode normalization form (NFKC)."""
    groups: dict[str, dict[str, None]] = {}
    for name in names:
        groups.setdefault("".join(unicodedata.normalize("NFKC", name).casefold().split()), {})[name] = None
    return [list(group) for group in groups.values() if len(group) > 1]


def print_warnings(manifest: Manifest) -> None:
    """Prints a manifest's warnings to stderr."""
    for warning in manifest.warnings:
        warn(warning)


def save_manifest(manifest: Manifest) -> None:
    """Writes a manifest to its path; prefixes become relative to its folder."""
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
