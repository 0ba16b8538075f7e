"""Inspects a data set: an overview with what looks wrong, or sizes, documents, samples of a blend, a verification.

    python tools/inspect_data.py data/domains.json
    python tools/inspect_data.py data/domains.json --tokens 1000000000 --domain-weights proxy/domain_weights.json
    python tools/inspect_data.py counts --domains data/domains.json
    python tools/inspect_data.py documents --domains data/domains.json --domain Books --first 10 --count 2
    python tools/inspect_data.py window --domains data/domains.json --number 50 --seq-length 64 --global-batch-size 48
    python tools/inspect_data.py verify --domains data/domains.json --write-checksums data/SHA256SUMS

A window is a training sample. With a global batch size of B, number n is row n % B of step n // B + 1, in every layout.
`verify` reads every id; its checksum file has the format of sha256sum, which can check it as well.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

if not __package__:
    # Run as a script: the package is beside this folder.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from numpy.typing import NDArray

from megatron_doremi.console import COLUMNS, print_stdout
from megatron_doremi.data.blend import Blend, BlendState, too_short, window_count
from megatron_doremi.data.domain_names import read_domain_names
from megatron_doremi.data.indexed_dataset import IndexedDataset
from megatron_doremi.data.manifest import Manifest, load_manifest, print_warnings
from megatron_doremi.errors import ConfigError, Fault, raise_if_any, run_or_exit
from megatron_doremi.flag_parser import FlagParser
from megatron_doremi.mixture.static import Budget, resolve_weights
from megatron_doremi.preprocessing.overview import (
    count_duplicates,
    duplicate_remarks,
    pairs_of,
    read_sizes,
    remarks,
    shown_domains,
    size_table,
)
from megatron_doremi.preprocessing.verification import (
    compare_checksums,
    listing_faults,
    verify_pairs,
    write_checksums,
)
from megatron_doremi.progress import Progress
from megatron_doremi.text_table import shown_text, table_lines, width_of
from megatron_doremi.tokenization.tokenizer import Tokenizer, dataset_tokenizer

# Steps of a blend that may be replayed to find a window, which takes some hours.
_MAX_STEPS = 100_000_000
OVERVIEW = "overview"
COMMANDS = (OVERVIEW, "counts", "documents", "window", "verify")
# Bytes of ids up to which an overview counts duplicates unasked: about a minute of reading and hashing.
_AUTO_BYTES = 10 * 10**9
# Tokens that are decoded for the sample of a domain.
_SAMPLE_TOKENS = 80


def whole_number(text: str) -> int:
    """Parses 2000000000, 2_000_000_000 or 2e9. Raises ValueError."""
    with contextlib.suppress(ValueError):
        return int(text)
    if not float(text).is_integer():
        raise ValueError(text)
    return int(float(text))


def build_parser() -> argparse.ArgumentParser:
    """Builds the command-line parser."""
    parser = FlagParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}")
    for name, text in (
        (OVERVIEW, "print the domains, a sample of each, and what looks wrong (the default command)"),
        ("counts", "print the documents, tokens and bytes per token of each domain"),
        ("documents", "print documents of a domain"),
        ("window", "print a training sample of a blend"),
        ("verify", "read all data and compare it with the manifest and, if given, checksums"),
    ):
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        if name == OVERVIEW:
            _add_overview_options(command)
            continue
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


def _add_overview_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("domains", type=Path, metavar="MANIFEST", help="manifest of the data set")
    tokens_help = "tokens that a run reads, to show the epochs of each domain (default: none)"
    add("--tokens", type=whole_number, default=0, metavar="N", help=tokens_help)
    add("--train-iters", type=int, default=0, metavar="N", help="instead of --tokens: steps of the run (default: none)")
    batch_help = "samples per step, with --train-iters (default: 0)"
    add("--global-batch-size", type=int, default=0, metavar="N", help=batch_help)
    length_help = "tokens per sample, with --train-iters (default: 0)"
    add("--seq-length", type=int, default=0, metavar="N", help=length_help)
    weights_help = "domain weights of the run: a mixture or a weights file (default: natural)"
    add("--domain-weights", metavar="WEIGHTS", help=weights_help)
    _add_weights_options(command)
    cap_help = "--max-epochs-per-domain of the run; only unimax needs it (default: 0)"
    add("--max-epochs-per-domain", type=float, default=0.0, metavar="E", help=cap_help)
    add("--all", action="store_true", help="show every domain (default: of more than 40 the largest and the smallest)")
    duplicates_help = (
        f"count duplicate documents: auto only in data of up to {_AUTO_BYTES // 10**9} GB of ids, all in any, none "
        "(default: auto)"
    )
    add("--duplicates", choices=("auto", "all", "none"), default="auto", help=duplicates_help)


def _add_weights_options(command: argparse.ArgumentParser) -> None:
    names_help = "JSON file {name in the weights file: name in the manifest} (default: names are the manifest's)"
    command.add_argument("--domain-names", type=Path, metavar="MAP", help=names_help)
    mismatch_help = "accept weights that were learned with another tokenizer (default: refuse them)"
    command.add_argument("--allow-tokenizer-mismatch", action="store_true", help=mismatch_help)


def _add_window_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--number", required=True, type=int, metavar="N", help="index of the sample in training, from 0")
    weights_help = "domain weights of the training run: a mixture or a weights file (default: uniform)"
    add("--domain-weights", default="uniform", metavar="WEIGHTS", help=weights_help)
    _add_weights_options(command)
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


def as_text(ids: NDArray[np.int64], tokenizer: Tokenizer | None) -> str:
    """Returns the text of ids, or the ids as text if there is no tokenizer."""
    return " ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids)


def overview(args: argparse.Namespace) -> None:
    """Prints the domains, a decoded sample of each, and what looks wrong."""
    manifest = load_manifest(args.domains)
    weights, budget = weights_and_budget(args, manifest)
    tokenizer = dataset_tokenizer(manifest)
    sizes = read_sizes(manifest)
    epochs = None
    if budget:
        tokens = [each.train.num_tokens for each in sizes]
        # As training counts them: in windows.
        in_windows = [args.seq_length * window_count(count, args.seq_length) for count in tokens if args.seq_length]
        epochs = budget * weights / np.maximum(1.0, in_windows or tokens)
    shown = shown_domains([each.train.num_tokens for each in sizes], args.all)
    named = f"{manifest.path}: {len(sizes):,} domains"
    print_stdout(named + (f", tokenizer {manifest.tokenizer.type}" if manifest.tokenizer else ", no tokenizer"))
    given = args.domain_weights is not None or budget
    for line in size_table(sizes, shown, weights if given else None, epochs):
        print(line)
    print("\nA sample of each domain:")
    for index in shown:
        print(sample_line(sizes[index].domain.name, sizes[index].train, tokenizer), flush=True)
    lines, note = remarks(manifest, sizes, epochs), ""
    if args.duplicates != "none":
        size = sum(dataset.num_tokens * dataset.dtype.itemsize for _, _, dataset in pairs_of(sizes))
        if args.duplicates == "all" or size <= _AUTO_BYTES:
            duplicates = count_duplicates(manifest, sizes, size)
            lines += duplicate_remarks(manifest.names, duplicates)
            note = (
                f" (duplicates: estimated from {duplicates.part:.2%} of the documents)" if duplicates.part < 1 else ""
            )
        else:
            note = f" (duplicates: not counted in {size / 1e9:,.0f} GB of ids; --duplicates all counts them)"
    print(f"\nWhat looks wrong{note}:" if lines else f"\nNothing looks wrong{note}.")
    for line in lines:
        print_stdout(f"  {line}")


def weights_and_budget(args: argparse.Namespace, manifest: Manifest) -> tuple[NDArray[np.float64], int]:
    """Returns the weights of `overview`, [k], and the tokens of its budget, or 0. Raises ConfigError."""
    faults = [
        Fault(flag, f"{value:,}", f"from 0 to {largest:,}", "give a number in that range")
        for flag, value, largest in (
            ("--tokens", args.tokens, 10**18),
            ("--train-iters", args.train_iters, 10**9),
            ("--global-batch-size", args.global_batch_size, 1 << 24),
            ("--seq-length", args.seq_length, 1 << 31),
        )
        if not 0 <= value <= largest
    ]
    if args.train_iters and (args.tokens or not (args.global_batch_size and args.seq_length)):
        rule = "--global-batch-size and --seq-length beside it, and no --tokens"
        faults.append(Fault("--train-iters", f"{args.train_iters:,}", rule, "give both, or only --tokens"))
    raise_if_any(faults)
    tokens = args.tokens or args.train_iters * args.global_batch_size * args.seq_length
    cap = args.max_epochs_per_domain
    budget = Budget(tokens, [domain.tokens for domain in manifest.domains], cap) if tokens and cap else None
    return _weights(args, manifest, budget), tokens


def _weights(args: argparse.Namespace, manifest: Manifest, budget: Budget | None) -> NDArray[np.float64]:
    """Returns the weights of --domain-weights, [k]. Raises ConfigError."""
    renames = read_domain_names(args.domain_names) if args.domain_names else None
    setting = args.domain_weights or "natural"
    return resolve_weights(setting, manifest, args.allow_tokenizer_mismatch, budget=budget, renames=renames)


def sample_line(name: str, dataset: IndexedDataset, tokenizer: Tokenizer | None) -> str:
    """Returns a line with the beginning of the document in the middle of a pair."""
    label = shown_text(name, 24)
    indent = " " * (24 - width_of(label))
    text = "no documents"
    if dataset.num_documents:
        text = as_text(dataset.document(dataset.num_documents // 2)[:_SAMPLE_TOKENS], tokenizer)
    return f"  {label}{indent}  {shown_text(text, COLUMNS - 28)}"


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
    rows = []
    for name, dataset in open_split(manifest, args.split):
        dataset.check_index()
        lengths = document_lengths(dataset)
        # The manifest has the bytes of the train split only.
        has_bytes = args.split == "train" and dataset.num_tokens
        ratio = f"{sizes[name] / dataset.num_tokens:.2f}" if has_bytes else "-"
        quantiles = [int(np.quantile(lengths, q, method="lower")) if len(lengths) else 0 for q in (0.0, 0.5, 1.0)]
        rows.append(
            [name, f"{dataset.num_documents:,}", f"{dataset.num_tokens:,}", ratio, *map("{:,}".format, quantiles)]
        )
    header = ("domain", "documents", "tokens", "bytes/token", "shortest", "median", "longest")
    for line in table_lines(header, rows):
        print(line)


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
    tokenizer = dataset_tokenizer(manifest)
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
    weights = _weights(args, manifest, budget)
    blend = Blend(manifest.names, sizes, args.global_batch_size, args.seed)
    step, row = divmod(args.number, args.global_batch_size)
    state = BlendState.start(len(datasets))
    # The blend carries credits from step to step, so it is replayed from the first step.
    with Progress("replaying the blend", step, "step") as progress:
        for _ in range(step):
            _, state = blend.advance(state, weights)
            progress.update(1)
    batch, _ = blend.next_batch(state, weights)
    domain, window_index = int(batch.domains[row]), int(batch.windows[row])
    ids = datasets[domain].tokens(window_index * args.seq_length, args.seq_length + 1)
    cursor = int(state.cursors[domain])
    batch_windows = blend.windows_at(domain, cursor, int((batch.domains == domain).sum()))
    epoch = (cursor + int(np.argmax(batch_windows == window_index))) // sizes[domain]
    print_stdout(
        f"== sample {args.number:,}: step {step + 1:,}, row {row}; {manifest.names[domain]}, window {window_index:,} "
        f"of {sizes[domain]:,}, epoch {epoch + 1}"
    )
    print(as_text(ids, dataset_tokenizer(manifest)))


def verify(args: argparse.Namespace) -> None:
    """Reads every id of every pair, compares sizes and checksums with the expected ones, and writes checksums."""
    manifest = open_manifest(args.domains)
    if args.write_checksums:
        raise_if_any(listing_faults(args.write_checksums, manifest))
    verified = verify_pairs(manifest)
    try:
        dataset_tokenizer(manifest)
    except ConfigError as error:
        verified.faults[:0] = error.faults
    if args.checksums and not verified.faults:
        verified.faults += compare_checksums(args.checksums, verified.files)
    raise_if_any(verified.faults)
    if args.write_checksums:
        write_checksums(args.write_checksums, verified.files)
    print(f"verified: {len(verified.files)} files of {len(manifest.domains)} domains, {verified.tokens:,} tokens")
    if verified.without_sizes:
        print(f"{verified.without_sizes} pairs have no PREFIX.bytes, so runs report no bits per byte for them")


def main() -> int:
    """Runs the command and returns the exit code."""
    argv = sys.argv[1:]
    if argv and argv[0] not in (*COMMANDS, "-h", "--help", "--version"):
        argv.insert(0, OVERVIEW)
    args = build_parser().parse_args(argv)
    functions = {OVERVIEW: overview, "counts": counts, "documents": documents, "window": window, "verify": verify}
    functions[args.command](args)
    return 0


def command() -> None:
    """Runs `main` as a program."""
    run_or_exit(main)


if __name__ == "__main__":
    command()
