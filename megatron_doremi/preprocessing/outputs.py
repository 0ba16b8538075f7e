"""The pairs of all domains while they are written, and how they become a data set.

Unfinished files lie in a hidden folder beside the final ones (workspace.py). Nothing has a final name before all of it
is good; the manifest, which names the rest, comes last.
"""

from __future__ import annotations

import errno
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_doremi.data.indexed_dataset import IndexedDatasetWriter, WrittenSize, paths_of
from megatron_doremi.data.manifest import Domain, Manifest, TokenizerInfo, load_manifest, save_manifest
from megatron_doremi.errors import ConfigError, Fault
from megatron_doremi.open_files import open_files_limit
from megatron_doremi.preprocessing.encoding import NAMED_BAD_LINES, EncodedBlock
from megatron_doremi.preprocessing.tokenizer import Tokenizer
from megatron_doremi.storage.files import atomic_write_bytes

# Characters of a domain's name that its files carry; file systems end at 255.
_SLUG_CHARACTERS = 100
# Files that are named as damaged; of more, their number is given.
_NAMED_BAD_FILES = 100
Key = tuple[str, str]


@dataclass
class Output:
    """A pair as it is written."""

    writer: IndexedDatasetWriter
    prefix: Path
    documents: int = 0
    bytes: int = 0


@dataclass
class Outputs:
    """The pairs of all domains, by (domain, split), and what was wrong with the input.

    Attributes:
        folder: where the finished pairs go.
        partial: where the unfinished ones are.
        known: prefixes that are settled: held-out pairs are named like the train pairs of their domains.
        bad_files: what is wrong with files as a whole, and where files break off; each once.
        bad_total: lines and files that hold no document.
        empty: empty texts, which were left out.
        blocks: blocks of the input that are in.
        characters: of all texts.
        lost: how many of each character the tokenizer dropped or did not know.
    """

    folder: Path
    partial: Path
    dtype: np.dtype
    known: dict[Key, Path] = field(default_factory=dict)
    by_key: dict[Key, Output] = field(default_factory=dict)
    bad: list[str] = field(default_factory=list)
    bad_total: int = 0
    blocks: int = 0
    bad_files: list[str] = field(default_factory=list)
    empty: int = 0
    characters: int = 0
    lost: Counter[str] = field(default_factory=Counter)

    def add(self, encoded: EncodedBlock) -> None:
        """Appends a block."""
        self.bad_total += encoded.bad_total
        self.bad += encoded.bad[: NAMED_BAD_LINES - len(self.bad)]
        new = [said for said in encoded.bad_files if said not in self.bad_files]
        self.bad_files += new[: _NAMED_BAD_FILES - len(self.bad_files)]
        self.empty += encoded.empty
        self.characters += encoded.characters
        self.lost.update(encoded.lost)
        for key, chunk in encoded.chunks.items():
            output = self.output(key)
            output.writer.add_documents(chunk.ids, chunk.lengths)
            output.documents += len(chunk.lengths)
            output.bytes += int(chunk.sizes.sum())
        self.blocks = encoded.progress.blocks

    @property
    def documents(self) -> int:
        """Documents so far."""
        return sum(output.documents for output in self.by_key.values())

    def output(self, key: Key) -> Output:
        """The pair of a domain and split, opened where it is new."""
        if key not in self.by_key:
            prefix = self.known.get(key) or self._new_prefix(key)
            for path in paths_of(prefix):
                if path.is_dir():
                    rule = "no folder where a file of the data set has to go"
                    raise ConfigError(Fault(str(path), "a folder", rule, "move it, or give another --output-dir"))
            try:
                writer = IndexedDatasetWriter(prefix, self.dtype, self.partial / prefix.name)
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE):
                    raise
                value = f"domain number {len(self.by_key) + 1}, {key[0][:40]!r}: {error.strerror}"
                rule = f"three open files for each domain, of the {open_files_limit():,} that this process may have"
                remedy = "raise the hard limit (ulimit -Hn); or is the field an id, and another one the domain?"
                raise ConfigError(Fault("domains", value, rule, remedy)) from error
            self.by_key[key] = Output(writer, prefix)
        return self.by_key[key]

    def _new_prefix(self, key: Key) -> Path:
        domain, split = key
        slug = re.sub(r"[^A-Za-z0-9._-]+", "_", domain).strip("._") or "domain"
        if len(slug) > _SLUG_CHARACTERS:
            digest = hashlib.sha256(domain.encode("utf-8")).hexdigest()[:8]
            slug = f"{slug[: _SLUG_CHARACTERS - 9].rstrip('._')}_{digest}"
        # Names that differ in case alone are one file on some systems.
        taken = {output.prefix.name.casefold() for output in self.by_key.values()}
        taken |= {prefix.name.casefold() for prefix in self.known.values()}
        number, name = 2, f"{slug}_{split}"
        while name.casefold() in taken:
            number, name = number + 1, f"{slug}_{number}_{split}"
        return self.folder / name

    def snapshot(self) -> dict[str, Any]:
        """Where all pairs stand, flushed: an entry of the journal."""
        pairs = [
            {"domain": domain, "split": split, "prefix": output.prefix.name}
            | {"bytes": output.bytes, **vars(output.writer.flush())}
            for (domain, split), output in self.by_key.items()
        ]
        said: dict[str, Any] = {
            "bad": self.bad[:],
            "bad_files": self.bad_files[:],
            "bad_total": self.bad_total,
            "empty": self.empty,
        }
        said |= {"characters": self.characters, "lost": dict(self.lost)}
        return {"blocks": self.blocks, **said, "pairs": pairs}

    def restore(self, entry: Mapping[str, Any]) -> None:
        """Opens the pairs of a snapshot, cut to what it says. Raises OSError where they are not there any more."""
        for pair in entry["pairs"]:
            prefix = self.folder / pair["prefix"]
            written = WrittenSize(pair["tokens"], pair["sequences"], pair["documents"])
            writer = IndexedDatasetWriter(prefix, self.dtype, self.partial / prefix.name, written)
            self.by_key[pair["domain"], pair["split"]] = Output(writer, prefix, written.documents, pair["bytes"])
        self.bad, self.bad_total, self.blocks = list(entry["bad"]), entry["bad_total"], entry["blocks"]
        self.bad_files, self.empty = list(entry["bad_files"]), entry["empty"]
        self.characters, self.lost = entry["characters"], Counter(entry["lost"])

    @property
    def lost_share(self) -> float:
        """The part of all characters that the tokenizer lost."""
        return self.lost.total() / max(1, self.characters)

    def keep_in_train(self) -> list[str]:
        """Moves held-out pairs of domains without train text to the train split: what all fell to the held-out part
        is the only text of its domain. Returns these domains. Called after the last entry of the journal."""
        moved = [domain for domain, split in self.by_key if split == "valid" and (domain, "train") not in self.by_key]
        for domain in moved:
            output = self.by_key.pop((domain, "valid"))
            output.prefix = self._new_prefix((domain, "train"))
            output.writer.move_to(output.prefix)
            self.by_key[domain, "train"] = output
        return moved

    def publish(self, before: Callable[[], None] = lambda: None) -> None:
        """Completes all pairs, calls `before`, and gives the pairs their final names."""
        for output in self.by_key.values():
            output.writer.prepare()
        before()
        for output in self.by_key.values():
            output.writer.publish()


def train_prefixes(manifest: Manifest, folder: Path) -> dict[Key, Path]:
    """Where the held-out pairs of a manifest's domains go: beside their train pairs, named like them."""
    return {
        (domain.name, "valid"): folder / f"{domain.train.name.removesuffix('_train')}_valid"
        for domain in manifest.domains
    }


def manifest_after(
    path: Path, split: str, outputs: Mapping[Key, Output], tokenizer: TokenizerInfo, order: Sequence[str] = ()
) -> Manifest:
    """The manifest with a run's pairs: a new one for the train split, the extended one for the valid split.

    Args:
        order: the names of the domains in the order that they shall have; (): by name.

    Raises:
        ConfigError: there is held-out text of domains without any to train on, or the train split was made with
            another tokenizer, perhaps by a run that has published it since this one started.
    """
    train = {domain: output for (domain, kind), output in outputs.items() if kind == "train"}
    valid = {domain: output.prefix for (domain, kind), output in outputs.items() if kind == "valid"}
    before = load_manifest(path) if split == "valid" else None
    if before:
        check_same_tokenizer(before, tokenizer)
    names = before.names if before else sorted(train, key=lambda name: (list(order).index(name) if order else 0, name))
    unknown = sorted(set(valid) - set(names))
    if unknown:
        raise ConfigError(
            Fault(
                "--input",
                "domains " + ", ".join(map(repr, unknown)),
                "held-out text of the train split's domains: " + ", ".join(map(repr, names)),
                "add these domains to the train split, or leave them out",
            )
        )
    if before:
        return replace(
            before, domains=tuple(replace(each, valid=valid.get(each.name, each.valid)) for each in before.domains)
        )
    domains = [
        Domain(name, each.prefix, valid.get(name), each.writer.num_tokens, each.documents, each.bytes)
        for name, each in ((name, train[name]) for name in names)
    ]
    return Manifest(tuple(domains), tokenizer, path)


def check_same_tokenizer(manifest: Manifest, tokenizer: TokenizerInfo) -> None:
    """Raises ConfigError where held-out text was encoded otherwise than a manifest's train split."""
    known = manifest.tokenizer
    if known is None or (known.sha256, known.eod) != (tokenizer.sha256, tokenizer.eod):
        value = f"{tokenizer.sha256[:12]}, documents end with {tokenizer.eod}"
        rule = f"that of {manifest.path}: " + (f"{known.sha256[:12]}, {known.eod}" if known else "none")
        raise ConfigError(
            Fault("tokenizer of the valid split", value, rule, "encode the valid split with that tokenizer")
        )


def tokenizer_in(folder: Path, tokenizer: Tokenizer) -> TokenizerInfo:
    """A tokenizer as the manifest in `folder` names it."""
    copy = folder / f"tokenizer-{tokenizer.sha256[:12]}{tokenizer.suffix}"
    return TokenizerInfo(tokenizer.type, copy, tokenizer.sha256, tokenizer.vocab_size, tokenizer.eod)


def keep_tokenizer(tokenizer: Tokenizer, info: TokenizerInfo) -> None:
    """Puts the tokenizer beside the data that it made."""
    atomic_write_bytes(info.file, tokenizer.data)


def publish(outputs: Outputs, manifest: Manifest, split: str) -> None:
    """Gives everything its final name; the manifest, which names the rest, last."""
    # If a train split were stopped half way, an earlier manifest would give the new pairs the old sizes.
    outputs.publish(lambda: manifest.path.unlink(missing_ok=True) if split == "train" else None)
    save_manifest(manifest)
