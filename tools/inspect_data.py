"""Inspects a data set: prints sizes, documents or samples of a blend, or verifies the files.

    python tools/inspect_data.py counts --domains data/domains.json
    python tools/inspect_data.py documents --domains data/domains.json --domain Books --first 10 --count 2
    python tools/inspect_data.py window --domains data/domains.json --number 50 --seq-length 64 --global-batch-size 48
    python tools/inspect_data.py verify --domains data/domains.json --write-checksums data/SHA256SUMS

A window is a training sample. With a global batch size of B, number n is row n % B of step n // B + 1, in every layout.
`verify` reads every id; its checksum file has the format of sha256sum, which can check it as well.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

if not __package__:
    # Run as a script: the package is beside this folder.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from megatron_doremi.data.blend import Blend, BlendState, too_short, window_count
from megatron_doremi.data.document_bytes import bytes_path, document_bytes
from megatron_doremi.data.indexed_dataset import IndexedDataset, paths_of
from megatron_doremi.data.manifest import Manifest, load_manifest, print_warnings
from megatron_doremi.errors import ConfigError, Fault, raise_if_any, run_or_exit
from megatron_doremi.mixture.static import Budget, resolve_weights
from megatron_doremi.preprocessing.tokenizer import Tokenizer, load_tokenizer
from megatron_doremi.storage.files import atomic_write_text, sha256_of

_IDS_PER_READ = 1 << 22
# Steps of a blend that may be replayed to find a window, which takes some hours.
_MAX_STEPS = 100_000_000
_CHECKSUM = re.compile(rb"[0-9a-f]{64}  .+\.(bin|idx|bytes)\r?\n?")
_MAX_LINE_BYTES = 1 << 14


def build_parser() -> argparse.ArgumentParser:
    """Builds the command-line parser."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{counts,documents,window,verify}")
    for name, text in (
        ("counts", "print the documents, tokens and bytes per token of each domain"),
        ("documents", "print documents of a domain"),
        ("window", "print a training sample of a blend"),
        ("verify", "read all data and compare it with the manifest and, if given, checksums"),
    ):
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.add_argument("--domains", required=True, type=Path, metavar="FILE", help="manifest of the data set")
        if name in ("counts", "documents"):
            split_help = "split to inspect (default: train)"
            command.add_argument("--split", choices=("train", "valid"), default="train", help=split_help)
        if name == "documents":
            command.add_argument("--domain", required=True, metavar="NAME", help="domain of the documents")
            first_help = "index of the first document, from 0 (default: 0)"
            command.add_argument("--first", type=int, default=0, metavar="N", help=first_help)
            command.add_argument("--count", type=int, default=1, metavar="N", help="number of documents (default: 1)")
        if name == "window":
            _add_window_options(command)
        if name == "verify":
            read_help = "checksum file to compare the files with, in the format of sha256sum (default: none)"
            command.add_argument("--checksums", type=Path, metavar="FILE", help=read_help)
            write_help = "checksum file to write, in the format of sha256sum (default: none)"
            command.add_argument("--write-checksums", type=Path, metavar="FILE", help=write_help)
    return parser


def _add_window_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--number", required=True, type=int, metavar="N", help="index of the sample in training, from 0")
    weights_help = "domain weights of the training run: a mixture or a weights file (default: uniform)"
    add("--domain-weights", default="uniform", metavar="WEIGHTS", help=weights_help)
    mismatch_help = "accept weights that were learned with another tokenizer (default: refuse them)"
    add("--allow-tokenizer-mismatch", action="store_true", help=mismatch_help)
    iters_help = "--train-iters of the training run; only unimax needs it (default: 0)"
    add("--train-iters", type=int, default=0, metavar="N", help=iters_help)
    epochs_help = "--max-epochs-per-domain of the training run; only unimax needs it (default: 0)"
    add("--max-epochs-per-domain", type=float, default=0.0, metavar="E", help=epochs_help)
    add("--seq-length", required=True, type=int, metavar="N", help="tokens per sample")
    add("--global-batch-size", required=True, type=int, metavar="N", help="samples per step")
    add("--seed", type=int, default=1234, metavar="N", help="seed of the training run (default: 1234)")


def open_manifest(path: Path) -> Manifest:
    """Loads a manifest and prints its warnings. Raises ConfigError."""
    manifest = load_manifest(path)
    print_warnings(manifest)
    return manifest


def open_tokenizer(manifest: Manifest) -> Tokenizer | None:
    """Loads the manifest's tokenizer, if it has one. Raises ConfigError if its file has changed."""
    info = manifest.tokenizer
    if info is None:
        return None
    tokenizer = load_tokenizer(info.type, info.file, eod=info.eod)
    if tokenizer.sha256 == info.sha256 and (tokenizer.vocab_size, tokenizer.eod) != (info.vocab_size, info.eod):
        value = f"vocab_size {info.vocab_size}, eod {info.eod}"
        rule = f"those of {info.file.name}: vocab_size {tokenizer.vocab_size}, eod {tokenizer.eod}"
        raise ConfigError(Fault(f"tokenizer of {manifest.path}", value, rule, "make the manifest again"))
    if tokenizer.sha256 != info.sha256:
        raise ConfigError(
            Fault(
                f"tokenizer {info.file}",
                f"SHA-256 {tokenizer.sha256[:12]}",
                f"{info.sha256[:12]}, the tokenizer that encoded the data",
                "restore that file, or make the data set again",
            )
        )
    return tokenizer


def as_text(ids: NDArray[np.int64], tokenizer: Tokenizer | None) -> str:
    """Returns the text of ids, or the ids as text if there is no tokenizer."""
    return " ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids)


def open_split(manifest: Manifest, split: str) -> Iterator[tuple[str, IndexedDataset]]:
    """Yields (domain, pair) for each domain with data in a split. Reading an id checks it against the vocabulary."""
    vocab_size = manifest.tokenizer.vocab_size if manifest.tokenizer else 0
    for domain in manifest.domains:
        prefix = domain.train if split == "train" else domain.valid
        if prefix is not None:
            yield domain.name, IndexedDataset(prefix, vocab_size)


def document_lengths(dataset: IndexedDataset) -> NDArray[np.int64]:
    """Returns the tokens per document, [documents]."""
    ends = np.concatenate([[0], np.cumsum(dataset.sequence_lengths, dtype=np.int64)])
    return np.diff(ends[dataset.document_indices])


def counts(args: argparse.Namespace) -> None:
    """Prints a table of the domains."""
    manifest = open_manifest(args.domains)
    sizes = {domain.name: domain.bytes for domain in manifest.domains}
    width = max(map(len, (*manifest.names, "domain")))
    columns = ("documents", "tokens", "bytes/token", "shortest", "median", "longest")
    print(f"{'domain':<{width}}" + "".join(f"{column:>16}" for column in columns))
    for name, dataset in open_split(manifest, args.split):
        dataset.check_index()
        lengths = document_lengths(dataset)
        # The manifest has the bytes of the train split only.
        has_bytes = args.split == "train" and dataset.num_tokens
        ratio = f"{sizes[name] / dataset.num_tokens:.2f}" if has_bytes else "-"
        quantiles = [int(np.quantile(lengths, q, method="lower")) if len(lengths) else 0 for q in (0.0, 0.5, 1.0)]
        row = (f"{dataset.num_documents:,}", f"{dataset.num_tokens:,}", ratio, *(f"{value:,}" for value in quantiles))
        print(f"{name:<{width}}" + "".join(f"{cell:>16}" for cell in row))


def documents(args: argparse.Namespace) -> None:
    """Prints documents, each below a line that identifies it."""
    manifest = open_manifest(args.domains)
    datasets = dict(open_split(manifest, args.split))
    if args.domain not in datasets:
        rule = f"a domain with {args.split} data: " + ", ".join(map(repr, datasets))
        raise ConfigError(Fault("--domain", repr(args.domain), rule, "give one of these"))
    dataset = datasets[args.domain]
    end = args.first + args.count
    if args.first < 0 or args.count < 1 or end > dataset.num_documents:
        value, rule = f"{args.first} to {end - 1}", f"documents 0 to {dataset.num_documents - 1:,}"
        raise ConfigError(Fault("--first, --count", value, rule, "give numbers in that range"))
    tokenizer = open_tokenizer(manifest)
    for number in range(args.first, end):
        ids = dataset.document(number)
        print(f"== {args.domain}, {args.split}, document {number:,}: {len(ids):,} tokens")
        print(as_text(ids, tokenizer))


def window(args: argparse.Namespace) -> None:
    """Prints one training sample of a blend, and its domain, window and epoch."""
    faults = [
        Fault(flag, str(value), f"from {smallest} to {largest:,}", "give a number in that range")
        for flag, value, smallest, largest in (
            ("--number", args.number, 0, _MAX_STEPS * max(1, args.global_batch_size) - 1),
            ("--seq-length", args.seq_length, 1, 1 << 31),
            ("--global-batch-size", args.global_batch_size, 1, 1 << 24),
            ("--seed", args.seed, 0, (1 << 63) - 1),
            ("--train-iters", args.train_iters, 0, 10**9),
        )
        if not smallest <= value <= largest
    ]
    raise_if_any(faults)
    manifest = open_manifest(args.domains)
    datasets = [dataset for _, dataset in open_split(manifest, "train")]
    short = [
        too_short(domain.name, domain.train, dataset.num_tokens, args.seq_length)
        for domain, dataset in zip(manifest.domains, datasets, strict=True)
    ]
    raise_if_any([fault for fault in short if fault is not None])
    sizes = tuple(window_count(dataset.num_tokens, args.seq_length) for dataset in datasets)
    budget = None
    if args.train_iters and args.max_epochs_per_domain:
        windows = args.train_iters * args.global_batch_size
        budget = Budget(windows * args.seq_length, [n * args.seq_length for n in sizes], args.max_epochs_per_domain)
    weights = resolve_weights(args.domain_weights, manifest, args.allow_tokenizer_mismatch, budget=budget)
    blend = Blend(manifest.names, sizes, args.global_batch_size, args.seed)
    step, row = divmod(args.number, args.global_batch_size)
    state = BlendState.start(len(datasets))
    # The blend carries credits from step to step, so it is replayed from the first step.
    for _ in tqdm(range(step), unit="step", leave=False, disable=step < 10_000):
        _, state = blend.next_batch(state, weights)
    batch, _ = blend.next_batch(state, weights)
    domain, window_index = int(batch.domains[row]), int(batch.windows[row])
    ids = datasets[domain].tokens(window_index * args.seq_length, args.seq_length + 1)
    cursor = int(state.cursors[domain])
    batch_windows = blend.windows_at(domain, cursor, int((batch.domains == domain).sum()))
    epoch = (cursor + int(np.argmax(batch_windows == window_index))) // sizes[domain]
    print(
        f"== sample {args.number:,}: step {step + 1:,}, row {row}; {manifest.names[domain]}, window {window_index:,} "
        f"of {sizes[domain]:,}, epoch {epoch + 1}"
    )
    print(as_text(ids, open_tokenizer(manifest)))


def verify(args: argparse.Namespace) -> None:
    """Reads every id of every pair, compares sizes and checksums with the expected ones, and writes checksums."""
    manifest = open_manifest(args.domains)
    faults: list[Fault] = []
    files: list[Path] = []
    total = without_sizes = 0
    if args.write_checksums:
        faults += listing_faults(args.write_checksums, manifest)
        raise_if_any(faults)
    try:
        open_tokenizer(manifest)
    except ConfigError as error:
        faults += error.faults
    for domain in manifest.domains:
        for split, prefix in (("train", domain.train), ("valid", domain.valid)):
            if prefix is None:
                continue
            try:
                dataset = IndexedDataset(prefix, manifest.tokenizer.vocab_size if manifest.tokenizer else 0)
                dataset.check_index()
                for start in range(0, dataset.num_tokens, _IDS_PER_READ):
                    dataset.tokens(start, min(_IDS_PER_READ, dataset.num_tokens - start))
                sizes = document_bytes(prefix)
            except ConfigError as error:
                faults += error.faults
                continue
            if split == "train" and (dataset.num_tokens, dataset.num_documents) != (domain.tokens, domain.documents):
                value = f"{dataset.num_tokens:,} tokens, {dataset.num_documents:,} documents"
                rule = f"{domain.tokens:,} tokens, {domain.documents:,} documents, as in the manifest"
                faults.append(Fault(str(prefix), value, rule, "make the data set again with tools/preprocess_data.py"))
            # Megatron-LM's lists name no tokenizer and have no bytes of text.
            if sizes is not None and manifest.tokenizer is not None:
                faults += size_faults(prefix, sizes, domain.bytes if split == "train" else None)
            total += dataset.num_tokens
            without_sizes += sizes is None
            files += [*paths_of(prefix), *([] if sizes is None else [bytes_path(prefix)])]
    if args.checksums and not faults:
        faults += compare_checksums(args.checksums, files)
    raise_if_any(faults)
    if args.write_checksums:
        listing = args.write_checksums.resolve()
        folder = listing.parent
        lines = [f"{sha256_of(path)}  {os.path.relpath(path.resolve(), folder)}\n" for path in files]
        atomic_write_text(listing, "".join(lines))
    print(f"verified: {len(files)} files of {len(manifest.domains)} domains, {total:,} tokens")
    if without_sizes:
        print(f"{without_sizes} pairs have no PREFIX.bytes, so runs report no bits per byte for them")


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


def main() -> int:
    """Runs the command and returns the exit code."""
    args = build_parser().parse_args()
    {"counts": counts, "documents": documents, "window": window, "verify": verify}[args.command](args)
    return 0


def command() -> None:
    """Runs `main` as a program."""
    run_or_exit(main)


if __name__ == "__main__":
    command()
