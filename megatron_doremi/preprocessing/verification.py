"""Verifies a data set: reads every id, and compares sizes with the manifest and files with checksums."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_doremi.data.document_bytes import bytes_path, document_bytes
from megatron_doremi.data.indexed_dataset import IndexedDataset, paths_of
from megatron_doremi.data.manifest import Manifest
from megatron_doremi.errors import ConfigError, Fault
from megatron_doremi.storage.files import atomic_write_text, sha256_of

_IDS_PER_READ = 1 << 22
_CHECKSUM = re.compile(rb"[0-9a-f]{64}  .+\.(bin|idx|bytes)\r?\n?")
_MAX_LINE_BYTES = 1 << 14


@dataclass
class Verified:
    """What `verify_pairs` read.

    Attributes:
        faults: every fault.
        files: the files of all pairs without faults.
        tokens: their tokens.
        without_sizes: number of these pairs that have no PREFIX.bytes.
    """

    faults: list[Fault] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    tokens: int = 0
    without_sizes: int = 0


def verify_pairs(manifest: Manifest) -> Verified:
    """Reads every id of every pair and compares sizes with the manifest's."""
    verified = Verified()
    vocab_size = manifest.tokenizer.vocab_size if manifest.tokenizer else 0
    for domain in manifest.domains:
        for split, prefix in (("train", domain.train), ("valid", domain.valid)):
            if prefix is None:
                continue
            try:
                dataset = IndexedDataset(prefix, vocab_size)
                dataset.check_index()
                for start in range(0, dataset.num_tokens, _IDS_PER_READ):
                    dataset.tokens(start, min(_IDS_PER_READ, dataset.num_tokens - start))
                sizes = document_bytes(prefix)
            except ConfigError as error:
                verified.faults += error.faults
                continue
            if split == "train" and (dataset.num_tokens, dataset.num_documents) != (domain.tokens, domain.documents):
                value = f"{dataset.num_tokens:,} tokens, {dataset.num_documents:,} documents"
                rule = f"{domain.tokens:,} tokens, {domain.documents:,} documents, as in the manifest"
                remedy = "make the data set again with tools/preprocess_data.py"
                verified.faults.append(Fault(str(prefix), value, rule, remedy))
            # Megatron-LM's lists name no tokenizer and have no bytes of text.
            if sizes is not None and manifest.tokenizer is not None:
                verified.faults += size_faults(prefix, sizes, domain.bytes if split == "train" else None)
            verified.tokens += dataset.num_tokens
            verified.without_sizes += sizes is None
            verified.files += [*paths_of(prefix), *([] if sizes is None else [bytes_path(prefix)])]
    return verified


def write_checksums(listing: Path, files: list[Path]) -> None:
    """Writes the SHA-256 of files, with their paths relative to the listing's folder, as sha256sum does."""
    listing = listing.resolve()
    lines = [f"{sha256_of(path)}  {os.path.relpath(path.resolve(), listing.parent)}\n" for path in files]
    atomic_write_text(listing, "".join(lines))


def size_faults(prefix: Path, sizes: NDArray[np.uint32], expected: int | None) -> list[Fault]:
    """Returns a fault if the sizes of documents do not add up to the manifest's bytes, or one of them is 0.

    Args:
        expected: the manifest's bytes of the pair's text; None if it has none.
    """
    total, remedy = int(sizes.sum(dtype=np.int64)), "make the data set again with tools/preprocess_data.py"
    if expected is not None and total != expected:
        rule = f"{expected:,} bytes, as in the manifest"
        return [Fault(str(bytes_path(prefix)), f"{total:,} bytes of text", rule, remedy)]
    if not sizes.all():
        value = f"document {int(np.argmin(sizes)):,} has 0 bytes"
        return [Fault(str(bytes_path(prefix)), value, "documents with text", remedy)]
    return []


def listing_faults(listing: Path, manifest: Manifest) -> list[Fault]:
    """Returns a fault if a checksum file cannot be written or would overwrite anything but an earlier checksum file."""
    subject = f"--write-checksums {listing}"
    rule, remedy = "a new file, or an earlier checksum file of .bin, .idx and .bytes files", "give another path"
    prefixes = [prefix for domain in manifest.domains for prefix in (domain.train, domain.valid) if prefix is not None]
    dataset_files = [manifest.path, *(path for prefix in prefixes for path in (*paths_of(prefix), bytes_path(prefix)))]
    dataset_files += [manifest.tokenizer.file] if manifest.tokenizer else []
    try:
        resolved = listing.resolve()
        if resolved in {path.resolve() for path in dataset_files}:
            return [Fault(subject, "a file of the data set", rule, remedy)]
        if not resolved.exists():
            missing_folder = Fault(subject, "no such folder", "an existing folder", "create it")
            return [] if resolved.parent.is_dir() else [missing_folder]
        if not resolved.is_file():
            return [Fault(subject, "not a regular file", rule, remedy)]
        with resolved.open("rb") as file:
            lines = iter(lambda: file.readline(_MAX_LINE_BYTES), b"")
            first = next(lines, b"")
            is_listing = bool(_CHECKSUM.fullmatch(first)) and all(_CHECKSUM.fullmatch(line) for line in lines)
    except (OSError, ValueError) as error:
        return [Fault(subject, str(error), rule, remedy)]
    return [] if is_listing else [Fault(subject, "another file already exists", rule, remedy)]


def compare_checksums(listing: Path, files: list[Path]) -> list[Fault]:
    """Returns the faults of files whose SHA-256 differs from a checksum file or is missing in it."""
    subject = f"--checksums {listing}"
    try:
        pairs = [line.split("  ", 1) for line in listing.read_text(encoding="utf-8").splitlines() if line]
        digests = {(listing.parent / name).resolve(): digest for digest, name in pairs}
    except (OSError, ValueError) as error:
        rule = "lines 'SHA-256  path', as written by --write-checksums"
        return [Fault(subject, str(error), rule, "give a checksum file")]
    faults = []
    for path in files:
        expected = digests.get(path.resolve())
        if expected is None:
            faults.append(Fault(subject, f"no line for {path}", "a line for each file", "write the checksums again"))
        elif sha256_of(path) != expected:
            rule = f"{expected[:12]}, as in {listing}"
            faults.append(Fault(str(path), "another SHA-256", rule, "copy the file again"))
    return faults
