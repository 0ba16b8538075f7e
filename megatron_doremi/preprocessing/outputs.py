"""Writes the .bin/.idx pairs of all domains, with their PREFIX.bytes, and publishes them as a data set.

Unfinished files are in a hidden folder beside the final ones (workspace.py). No file gets its final name before all
are complete; the manifest, which refers to the others, comes last.
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

from megatron_doremi.data.document_bytes import DocumentBytesWriter, bytes_path
from megatron_doremi.data.indexed_dataset import IndexedDatasetWriter, WrittenSize, paths_of
from megatron_doremi.data.manifest import Domain, Manifest, TokenizerInfo, load_manifest, save_manifest
from megatron_doremi.errors import ConfigError, Fault
from megatron_doremi.open_files import open_files_limit
from megatron_doremi.preprocessing.encoding import NAMED_BAD_LINES, EncodedBlock
from megatron_doremi.storage.files import atomic_write_bytes
from megatron_doremi.tokenization.tokenizer import Tokenizer

# Characters of a domain name that its file names contain at most; file systems allow 255 bytes.
_SLUG_CHARACTERS = 100
# Bad files that messages list; the others are only counted.
_NAMED_BAD_FILES = 100
# (domain, split)
Key = tuple[str, str]


@dataclass
class Output:
    """A pair that is being written.

    Attributes:
        sizes: the pair's PREFIX.bytes; None if some of its documents come from version 0.1, which wrote none.
        prefix: the final path of the pair, without the suffix.
        documents: number of documents so far.
        bytes: bytes of their UTF-8 text.
    """

    writer: IndexedDatasetWriter
    sizes: DocumentBytesWriter | None
    prefix: Path
    documents: int = 0
    bytes: int = 0

    @property
    def _writers(self) -> list[IndexedDatasetWriter | DocumentBytesWriter]:
        return [self.writer] if self.sizes is None else [self.writer, self.sizes]

    def flush(self) -> WrittenSize:
        """Flushes Python's buffers to the operating system; returns how much has been written."""
        if self.sizes is not None:
            self.sizes.flush()
        return self.writer.flush()

    def sync(self) -> None:
        """Makes the flushed data durable; another thread may continue to write."""
        for writer in self._writers:
            writer.sync()

    def prepare(self) -> None:
        """Completes all files under their temporary names, durably."""
        for writer in self._writers:
            writer.prepare()

    def move_to(self, prefix: Path) -> None:
        """Changes the prefix of the published pair."""
        self.prefix = prefix
        for writer in self._writers:
            writer.move_to(prefix)

    def publish(self) -> None:
        """Gives all files their final names. An interruption never leaves sizes of other documents beside the pair."""
        bytes_path(self.prefix).unlink(missing_ok=True)
        for writer in self._writers:
            writer.publish()

    def close(self) -> None:
        """Closes the unfinished files; a later run may resume them."""
        for writer in self._writers:
            writer.close()


@dataclass
class Outputs:
    """The pairs of all domains and splits, and the faults of the input.

    Attributes:
        folder: the folder of the finished pairs.
        partial: the folder of the unfinished pairs.
        known: prefixes that are given: valid pairs are named like the train pairs of their domains.
        by_key: the pairs by (domain, split).
        bad: descriptions of the first bad lines.
        bad_total: number of bad lines, plus files that are unreadable, truncated or damaged.
        blocks: number of input blocks written so far.
        bad_files: descriptions of the faults of files, without duplicates.
        empty: number of skipped empty texts.
        characters: characters in all texts.
        lost: how often each character occurred that the tokenizer dropped or did not know.
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
        new_files = [description for description in encoded.bad_files if description not in self.bad_files]
        self.bad_files += new_files[: _NAMED_BAD_FILES - len(self.bad_files)]
        self.empty += encoded.empty
        self.characters += encoded.characters
        self.lost.update(encoded.lost)
        for key, chunk in encoded.chunks.items():
            output = self.output(key)
            output.writer.add_documents(chunk.ids, chunk.lengths)
            output.documents += len(chunk.lengths)
            output.bytes += int(chunk.sizes.sum())
            if output.sizes is not None:
                output.sizes.add(chunk.sizes)
        self.blocks = encoded.progress.blocks

    @property
    def documents(self) -> int:
        """Number of documents so far."""
        return sum(output.documents for output in self.by_key.values())

    def output(self, key: Key, with_sizes: bool = True) -> Output:
        """Returns the pair of a domain and split; opens it if it is new.

        Args:
            with_sizes: whether a new pair gets PREFIX.bytes.

        Raises:
            ConfigError: a folder has the name of one of its files, or there are too many domains to keep open.
        """
        if key not in self.by_key:
            prefix = self.known.get(key) or self._new_prefix(key)
            for path in (*paths_of(prefix), bytes_path(prefix)):
                if path.is_dir():
                    rule = "no folder with the name of a file of the data set"
                    raise ConfigError(Fault(str(path), "a folder", rule, "move it, or give another --output-dir"))
            try:
                writer = IndexedDatasetWriter(prefix, self.dtype, self.partial / prefix.name)
                sizes = DocumentBytesWriter(prefix, self.partial / prefix.name) if with_sizes else None
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE):
                    raise
                value = f"domain number {len(self.by_key) + 1}, {key[0][:40]!r}: {error.strerror}"
                rule = f"at most {open_files_limit():,} open files in this process, four per domain"
                remedy = "raise the hard limit (ulimit -Hn), or choose a field that is a domain and not an id"
                raise ConfigError(Fault("domains", value, rule, remedy)) from error
            self.by_key[key] = Output(writer, sizes, prefix)
        return self.by_key[key]

    def _new_prefix(self, key: Key) -> Path:
        domain, split = key
        slug = re.sub(r"[^A-Za-z0-9._-]+", "_", domain).strip("._") or "domain"
        if len(slug) > _SLUG_CHARACTERS:
            digest = hashlib.sha256(domain.encode("utf-8")).hexdigest()[:8]
            slug = f"{slug[: _SLUG_CHARACTERS - 9].rstrip('._')}_{digest}"
        # Some file systems ignore case.
        taken = {output.prefix.name.casefold() for output in self.by_key.values()}
        taken |= {prefix.name.casefold() for prefix in self.known.values()}
        number, name = 2, f"{slug}_{split}"
        while name.casefold() in taken:
            number, name = number + 1, f"{slug}_{number}_{split}"
        return self.folder / name

    def snapshot(self) -> dict[str, Any]:
        """Flushes all pairs and returns the fields of the journal that describe them."""
        pairs = [
            {"domain": domain, "split": split, "prefix": output.prefix.name}
            | {"bytes": output.bytes, "document_bytes": output.sizes is not None, **vars(output.flush())}
            for (domain, split), output in self.by_key.items()
        ]
        return {
            "blocks": self.blocks,
            "bad": self.bad[:],
            "bad_files": self.bad_files[:],
            "bad_total": self.bad_total,
            "empty": self.empty,
            "characters": self.characters,
            "lost": dict(self.lost),
            "pairs": pairs,
        }

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Opens the pairs of a snapshot, truncated to the sizes in it. Raises OSError if their files are missing."""
        for pair in snapshot["pairs"]:
            prefix = self.folder / pair["prefix"]
            written = WrittenSize(pair["tokens"], pair["sequences"], pair["documents"])
            partial = self.partial / prefix.name
            writer = IndexedDatasetWriter(prefix, self.dtype, partial, written)
            has_sizes = pair.get("document_bytes", False)
            sizes = DocumentBytesWriter(prefix, partial, written.documents) if has_sizes else None
            output = Output(writer, sizes, prefix, written.documents, pair["bytes"])
            self.by_key[pair["domain"], pair["split"]] = output
        self.bad, self.bad_total, self.blocks = list(snapshot["bad"]), snapshot["bad_total"], snapshot["blocks"]
        self.bad_files, self.empty = list(snapshot["bad_files"]), snapshot["empty"]
        self.characters, self.lost = snapshot["characters"], Counter(snapshot["lost"])

    @property
    def lost_share(self) -> float:
        """The fraction of all characters that the tokenizer lost."""
        return self.lost.total() / max(1, self.characters)

    def keep_in_train(self) -> list[str]:
        """Moves the valid pair of every domain without a train pair to the train split: if all documents of a small
        domain are held out, there is nothing to train on. Returns these domains. Call after the last journal."""
        moved = [domain for domain, split in self.by_key if split == "valid" and (domain, "train") not in self.by_key]
        for domain in moved:
            output = self.by_key.pop((domain, "valid"))
            output.move_to(self._new_prefix((domain, "train")))
            self.by_key[domain, "train"] = output
        return moved

    def publish(self, before: Callable[[], None] = lambda: None) -> None:
        """Completes all pairs, calls `before`, then renames the pairs to their final names."""
        for output in self.by_key.values():
            output.prepare()
        before()
        for output in self.by_key.values():
            output.publish()


def train_prefixes(manifest: Manifest, folder: Path) -> dict[Key, Path]:
    """Returns the prefixes of the valid pairs of a manifest's domains: named like their train pairs, in `folder`."""
    return {
        (domain.name, "valid"): folder / f"{domain.train.name.removesuffix('_train')}_valid"
        for domain in manifest.domains
    }


def manifest_after(
    path: Path, split: str, outputs: Mapping[Key, Output], tokenizer: TokenizerInfo, order: Sequence[str] = ()
) -> Manifest:
    """Returns the manifest with a run's pairs: a new one for the train split, an extended one for the valid split.

    Args:
        path: the manifest file.
        order: the order of the domain names; () sorts them.

    Raises:
        ConfigError: a domain has valid text but no train text, or the train split was made with another tokenizer,
            perhaps by a run that published it after this one had started.
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
                "only domains of the train split: " + ", ".join(map(repr, names)),
                "add these domains to the train split, or remove them from the valid split",
            )
        )
    if before:
        extended = tuple(replace(domain, valid=valid.get(domain.name, domain.valid)) for domain in before.domains)
        return replace(before, domains=extended)
    domains = [
        Domain(name, output.prefix, valid.get(name), output.writer.num_tokens, output.documents, output.bytes)
        for name, output in ((name, train[name]) for name in names)
    ]
    return Manifest(tuple(domains), tokenizer, path)


def check_same_tokenizer(manifest: Manifest, tokenizer: TokenizerInfo) -> None:
    """Raises ConfigError if the valid split was encoded with another tokenizer than the manifest's train split."""
    expected = manifest.tokenizer
    if expected is None or (expected.sha256, expected.eod) != (tokenizer.sha256, tokenizer.eod):
        value = describe_tokenizer(tokenizer.sha256, tokenizer.eod)
        rule = f"the tokenizer in {manifest.path}: "
        rule += describe_tokenizer(expected.sha256, expected.eod) if expected else "none"
        raise ConfigError(
            Fault("tokenizer of the valid split", value, rule, "encode the valid split with that tokenizer")
        )


def describe_tokenizer(sha256: str, eod: int) -> str:
    """Identifies a tokenizer in a message."""
    return f"SHA-256 {sha256[:12]}, end-of-document id {eod}"


def tokenizer_in(folder: Path, tokenizer: Tokenizer) -> TokenizerInfo:
    """Returns the manifest entry of a tokenizer whose copy is in `folder`."""
    copy = folder / f"tokenizer-{tokenizer.sha256[:12]}{tokenizer.suffix}"
    return TokenizerInfo(tokenizer.type, copy, tokenizer.sha256, tokenizer.vocab_size, tokenizer.eod)


def save_tokenizer(tokenizer: Tokenizer, info: TokenizerInfo) -> None:
    """Copies the tokenizer beside the data that it encoded."""
    atomic_write_bytes(info.file, tokenizer.data)


def describe_kept_in_train(domain: str) -> str:
    """Reports that `Outputs.keep_in_train` moved a domain."""
    return f"domain {domain!r}: all of its documents would be held out; keeping them in the train split"


def describe_without_sizes(outputs: Outputs) -> list[str]:
    """Reports the pairs that get no PREFIX.bytes, in one line or none."""
    names = [output.prefix.name for output in outputs.by_key.values() if output.sizes is None]
    if not names:
        return []
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return [
        f"note: {len(names)} of {len(outputs.by_key)} pairs ({shown}) begin with data of version 0.1, which holds no "
        f"sizes of documents: they get no PREFIX.bytes, so runs report no bits per byte for them"
    ]


def publish(outputs: Outputs, manifest: Manifest, split: str) -> None:
    """Renames everything to its final name; the manifest, which refers to the other files, comes last."""
    # Remove the old manifest first: if publishing a train split is interrupted, it would pair new data with old sizes.
    outputs.publish(lambda: manifest.path.unlink(missing_ok=True) if split == "train" else None)
    save_manifest(manifest)
