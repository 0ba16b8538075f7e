"""Looks into a data set: sizes, documents, what a blend reads, and whether the files are whole.

    python tools/inspect_data.py counts --domains data/domains.json
    python tools/inspect_data.py documents --domains data/domains.json --domain Books --first 10 --count 2
    python tools/inspect_data.py window --domains data/domains.json --number 50 --seq-length 64 --global-batch-size 48
    python tools/inspect_data.py verify --domains data/domains.json --write-checksums data/SHA256SUMS

A window is a sample of training: number n is place n % B of step n // B, as every layout reads it. `verify` reads
every id; its checksums are in the form of sha256sum, which can check them too.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from megatron_doremi.data.blend import Blend, BlendState, too_short, window_count
from megatron_doremi.data.indexed_dataset import IndexedDataset, paths_of
from megatron_doremi.data.manifest import Manifest, load_manifest, print_warnings
from megatron_doremi.errors import ConfigError, Fault, raise_if_any, run_or_exit
from megatron_doremi.mixture.static import Budget, resolve_weights
from megatron_doremi.preprocessing.tokenizer import Tokenizer, load_tokenizer
from megatron_doremi.storage.files import atomic_write_text, sha256_of

_IDS_AT_ONCE = 1 << 22
# Steps that a blend is played through to find a window: some hours.
_MOST_STEPS = 100_000_000
_CHECKSUM = re.compile(rb"[0-9a-f]{64}  .+\.(bin|idx)\r?\n?")
_LONGEST_LINE = 1 << 14


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{counts,documents,window,verify}")
    for name, text in (
        ("counts", "documents, tokens and bytes of each domain"),
        ("documents", "print documents of a domain"),
        ("window", "print a sample of a blend"),
        ("verify", "read everything and compare it with the manifest"),
    ):
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.add_argument("--domains", required=True, type=Path, metavar="FILE", help="the manifest")
        if name in ("counts", "documents"):
            command.add_argument("--split", choices=("train", "valid"), default="train", help="(default: train)")
        if name == "documents":
            command.add_argument("--domain", required=True, metavar="NAME")
            command.add_argument("--first", type=int, default=0, metavar="N", help="from 0 (default: 0)")
            command.add_argument("--count", type=int, default=1, metavar="N", help="(default: 1)")
        if name == "window":
            command.add_argument("--number", required=True, type=int, metavar="N", help="of the sample, from 0")
            command.add_argument("--domain-weights", default="uniform", help="as in training (default: uniform)")
            command.add_argument("--allow-tokenizer-mismatch", action="store_true")
            command.add_argument("--train-iters", type=int, default=0, metavar="N", help="as in training, for unimax")
            command.add_argument(
                "--max-epochs-per-domain", type=float, default=0.0, metavar="E", help="as in training, for unimax"
            )
            command.add_argument("--seq-length", required=True, type=int, metavar="N")
            command.add_argument("--global-batch-size", required=True, type=int, metavar="N")
            command.add_argument("--seed", type=int, default=1234, metavar="N", help="(default: 1234)")
        if name == "verify":
            command.add_argument("--checksums", type=Path, metavar="FILE", help="compare the files with these")
            command.add_argument("--write-checksums", type=Path, metavar="FILE", help="write theirs")
    return parser


def open_manifest(path: Path) -> Manifest:
    """Reads a manifest, and prints what it warns of. Raises ConfigError."""
    manifest = load_manifest(path)
    print_warnings(manifest)
    return manifest


def open_tokenizer(manifest: Manifest) -> Tokenizer | None:
    """The manifest's tokenizer, None where it names none. Raises ConfigError where it is another file by now."""
    info = manifest.tokenizer
    if info is None:
        return None
    tokenizer = load_tokenizer(info.type, info.file, eod=info.eod)
    if tokenizer.sha256 == info.sha256 and (tokenizer.vocab_size, tokenizer.eod) != (info.vocab_size, info.eod):
        value = f"vocab_size {info.vocab_size}, eod {info.eod}"
        rule = f"what {info.file.name} has: {tokenizer.vocab_size}, {tokenizer.eod}"
        raise ConfigError(Fault(f"tokenizer of {manifest.path}", value, rule, "make the manifest again"))
    if tokenizer.sha256 != info.sha256:
        raise ConfigError(
            Fault(
                f"tokenizer {info.file}",
                f"SHA-256 {tokenizer.sha256[:12]}",
                f"the one that made the ids, {info.sha256[:12]}",
                "put that file back, or make the data set again",
            )
        )
    return tokenizer


def as_text(ids: NDArray[np.int64], tokenizer: Tokenizer | None) -> str:
    """The text of ids; the ids themselves where no tokenizer is known."""
    return " ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids)


def open_split(manifest: Manifest, split: str) -> Iterator[tuple[str, IndexedDataset]]:
    """The pairs of a split, by domain, ids checked against the vocabulary."""
    vocab_size = manifest.tokenizer.vocab_size if manifest.tokenizer else 0
    for domain in manifest.domains:
        prefix = domain.train if split == "train" else domain.valid
        if prefix is not None:
            yield domain.name, IndexedDataset(prefix, vocab_size)


def document_lengths(dataset: IndexedDataset) -> NDArray[np.int64]:
    """[documents] tokens of each document."""
    ends = np.concatenate([[0], np.cumsum(dataset.sequence_lengths, dtype=np.int64)])
    return np.diff(ends[dataset.document_indices])


def counts(args: argparse.Namespace) -> None:
    """Prints a table."""
    manifest = open_manifest(args.domains)
    sizes = {domain.name: domain.bytes for domain in manifest.domains}
    width = max(map(len, (*manifest.names, "domain")))
    columns = ("documents", "tokens", "bytes/token", "shortest", "median", "longest")
    print(f"{'domain':<{width}}" + "".join(f"{column:>16}" for column in columns))
    for name, dataset in open_split(manifest, args.split):
        dataset.check_index()
        lengths = document_lengths(dataset)
        # The manifest keeps the bytes of the train split.
        known = args.split == "train" and dataset.num_tokens
        ratio = f"{sizes[name] / dataset.num_tokens:.2f}" if known else "-"
        spread = [int(np.quantile(lengths, part, method="lower")) if len(lengths) else 0 for part in (0.0, 0.5, 1.0)]
        row = (f"{dataset.num_documents:,}", f"{dataset.num_tokens:,}", ratio, *(f"{value:,}" for value in spread))
        print(f"{name:<{width}}" + "".join(f"{cell:>16}" for cell in row))


def documents(args: argparse.Namespace) -> None:
    """Prints documents, each under a line that says which it is."""
    manifest = open_manifest(args.domains)
    found = dict(open_split(manifest, args.split))
    if args.domain not in found:
        rule = f"a domain with {args.split} data: " + ", ".join(map(repr, found))
        raise ConfigError(Fault("--domain", repr(args.domain), rule, "give one of these"))
    dataset = found[args.domain]
    last = args.first + args.count
    if args.first < 0 or args.count < 1 or last > dataset.num_documents:
        value, rule = f"{args.first} to {last - 1}", f"documents 0 to {dataset.num_documents - 1:,}"
        raise ConfigError(Fault("--first, --count", value, rule, "give numbers in that range"))
    tokenizer = open_tokenizer(manifest)
    for number in range(args.first, last):
        ids = dataset.document(number)
        print(f"== {args.domain}, {args.split}, document {number:,}: {len(ids):,} tokens")
        print(as_text(ids, tokenizer))


def window(args: argparse.Namespace) -> None:
    """Prints what sample `--number` of a blend is."""
    faults = [
        Fault(flag, str(value), f"from {least} to {most:,}", "give such a number")
        for flag, value, least, most in (
            ("--number", args.number, 0, _MOST_STEPS * max(1, args.global_batch_size) - 1),
            ("--seq-length", args.seq_length, 1, 1 << 31),
            ("--global-batch-size", args.global_batch_size, 1, 1 << 24),
            ("--seed", args.seed, 0, (1 << 63) - 1),
            ("--train-iters", args.train_iters, 0, 10**9),
        )
        if not least <= value <= most
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
    step, place = divmod(args.number, args.global_batch_size)
    state = BlendState.start(len(datasets))
    # Credits are carried from step to step, so the blend is played from its start.
    for _ in tqdm(range(step), unit="step", leave=False, disable=step < 10_000):
        _, state = blend.next_batch(state, weights)
    batch, _ = blend.next_batch(state, weights)
    number, chosen = int(batch.domains[place]), int(batch.windows[place])
    ids = datasets[number].tokens(chosen * args.seq_length, args.seq_length + 1)
    cursor = int(state.cursors[number])
    read = blend.windows_at(number, cursor, int((batch.domains == number).sum()))
    epoch = (cursor + int(np.argmax(read == chosen))) // sizes[number]
    print(
        f"== sample {args.number:,}: step {step + 1:,}, place {place}; {manifest.names[number]}, window {chosen:,} of "
        f"{sizes[number]:,}, epoch {epoch + 1}"
    )
    print(as_text(ids, open_tokenizer(manifest)))


def verify(args: argparse.Namespace) -> None:
    """Reads every id of every pair, and compares sizes and checksums."""
    manifest = open_manifest(args.domains)
    faults: list[Fault] = []
    files: list[Path] = []
    total = 0
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
                for start in range(0, dataset.num_tokens, _IDS_AT_ONCE):
                    dataset.tokens(start, min(_IDS_AT_ONCE, dataset.num_tokens - start))
            except ConfigError as error:
                faults += error.faults
                continue
            found, said = (dataset.num_tokens, dataset.num_documents), (domain.tokens, domain.documents)
            if split == "train" and found != said:
                value, rule = "{:,} tokens, {:,} documents".format(*found), "the manifest's {:,} and {:,}".format(*said)
                faults.append(Fault(str(prefix), value, rule, "make the data set again with tools/preprocess_data.py"))
            total += dataset.num_tokens
            files += paths_of(prefix)
    if args.checksums and not faults:
        faults += compare_checksums(args.checksums, files)
    raise_if_any(faults)
    if args.write_checksums:
        listing = args.write_checksums.resolve()
        folder = listing.parent
        lines = [f"{sha256_of(path)}  {os.path.relpath(path.resolve(), folder)}\n" for path in files]
        atomic_write_text(listing, "".join(lines))
    print(f"whole: {len(files)} files of {len(manifest.domains)} domains, {total:,} tokens")


def listing_faults(listing: Path, manifest: Manifest) -> list[Fault]:
    """A fault where a list of checksums would overwrite anything but an earlier one, or cannot be written."""
    what = f"--write-checksums {listing}"
    rule, remedy = "a new file, or an earlier list of checksums of .bin and .idx files", "give another path"
    prefixes = [prefix for domain in manifest.domains for prefix in (domain.train, domain.valid) if prefix is not None]
    ours = [manifest.path, *(path for prefix in prefixes for path in paths_of(prefix))]
    ours += [manifest.tokenizer.file] if manifest.tokenizer else []
    try:
        real = listing.resolve()
        if real in {path.resolve() for path in ours}:
            return [Fault(what, "a file of the data set", rule, remedy)]
        if not real.exists():
            return [] if real.parent.is_dir() else [Fault(what, "no such folder", "an existing folder", "make it")]
        if not real.is_file():
            return [Fault(what, "no regular file", rule, remedy)]
        with real.open("rb") as file:
            lines = iter(lambda: file.readline(_LONGEST_LINE), b"")
            first = next(lines, b"")
            good = bool(_CHECKSUM.fullmatch(first)) and all(_CHECKSUM.fullmatch(line) for line in lines)
    except (OSError, ValueError) as error:
        return [Fault(what, str(error), rule, remedy)]
    return [] if good else [Fault(what, "another file is there already", rule, remedy)]


def compare_checksums(listing: Path, files: list[Path]) -> list[Fault]:
    """Faults of files that are not what a list in sha256sum's form says, or are not in it."""
    what = f"--checksums {listing}"
    try:
        pairs = [line.split("  ", 1) for line in listing.read_text(encoding="utf-8").splitlines() if line]
        known = {(listing.parent / name).resolve(): digest for digest, name in pairs}
    except (OSError, ValueError) as error:
        return [Fault(what, str(error), "lines 'SHA-256  path', as --write-checksums writes", "give such a file")]
    faults = []
    for path in files:
        expected = known.get(path.resolve())
        if expected is None:
            faults.append(Fault(what, f"no line for {path}", "a line for each file", "write the list again"))
        elif sha256_of(path) != expected:
            faults.append(
                Fault(str(path), "another SHA-256", f"the {expected[:12]} of {listing}", "copy the file again")
            )
    return faults


def main() -> int:
    """Runs the command."""
    args = build_parser().parse_args()
    {"counts": counts, "documents": documents, "window": window, "verify": verify}[args.command](args)
    return 0


if __name__ == "__main__":
    run_or_exit(main)
