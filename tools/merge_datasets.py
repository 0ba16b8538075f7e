"""Merges the shards that the tasks of an array job wrote into one data set.

    for I in 0 1 2 3: python tools/preprocess_data.py --shard I --num-shards 4 --output-dir data --split train ...
    python tools/merge_datasets.py --output-dir data --split train

All tasks must be complete and belong to one run: the same inputs, settings and tokenizer. The result equals the output
of a single process, byte for byte. Memory is bounded regardless of the size of the pairs. The shards are kept.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

if not __package__:
    # Run as a script: the package is beside this folder.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


from megatron_doremi.console import print_stdout, warn
from megatron_doremi.data.indexed_dataset import dtype_for, paths_of
from megatron_doremi.data.manifest import load_manifest, overwriting_faults, print_warnings
from megatron_doremi.errors import ConfigError, Fault, raise_if_any, run_or_exit
from megatron_doremi.flag_parser import FlagParser
from megatron_doremi.preprocessing.outputs import (
    Outputs,
    check_same_tokenizer,
    describe_kept_in_train,
    describe_without_sizes,
    manifest_after,
    publish,
    train_prefixes,
)
from megatron_doremi.preprocessing.shards import SHARDS, ignored_folders, load_shards, merge
from megatron_doremi.preprocessing.workspace import Workspace, partial_folder
from megatron_doremi.progress import Progress
from megatron_doremi.storage.files import atomic_write_bytes, sha256_of


def build_parser() -> argparse.ArgumentParser:
    """Builds the command-line parser."""
    parser = FlagParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    output_help = "folder of the data set, the same --output-dir as that of the tasks"
    parser.add_argument("--output-dir", required=True, type=Path, metavar="DIR", help=output_help)
    split_help = "split whose shards are merged (default: train)"
    parser.add_argument("--split", choices=("train", "valid"), default="train", help=split_help)
    return parser


def main() -> int:
    """Checks the shards, copies them and publishes the manifest. Returns the exit code."""
    args = build_parser().parse_args()
    for path in ignored_folders(args.output_dir, args.split):
        warn(f"ignoring {path}, which is not the folder of a task")
    shards = load_shards(args.output_dir, args.split)
    source = shards[0].tokenizer
    if not source.file.is_file() or sha256_of(source.file) != source.sha256:
        rule = f"the tokenizer with SHA-256 {source.sha256[:12]}"
        raise ConfigError(Fault(str(source.file), "missing or changed", rule, "restore that file"))
    tokenizer = replace(source, file=args.output_dir / source.file.name)
    manifest_path = args.output_dir / "domains.json"
    known = {}
    if args.split == "train":
        raise_if_any(overwriting_faults(manifest_path))
    else:
        train = load_manifest(manifest_path)
        check_same_tokenizer(train, tokenizer)
        known = train_prefixes(train, args.output_dir)
    partial = partial_folder(args.output_dir, args.split)
    outputs = Outputs(args.output_dir, partial, dtype_for(tokenizer.vocab_size), known)
    id_files = [paths_of(pair.prefix)[0] for data in shards for pair in data.pairs.values()]
    size = sum(path.stat().st_size for path in id_files if path.is_file())
    with Workspace(partial, outputs, {}, resume=False) as workspace:
        with Progress(f"merging {args.split}", size, "byte") as progress:
            for count in merge(shards, outputs):
                progress.update(count)
        if not outputs.by_key:
            value, remedy = "no documents in any shard", "preprocess files that hold documents"
            raise ConfigError(Fault("--output-dir", value, "at least one document", remedy))
        moved = outputs.keep_in_train() if args.split == "train" else []
        manifest = manifest_after(manifest_path, args.split, outputs.by_key, tokenizer, shards[0].order)
        atomic_write_bytes(tokenizer.file, source.file.read_bytes())
        publish(outputs, manifest, args.split)
        workspace.remove()
    print_warnings(load_manifest(manifest_path))
    for note in (*map(describe_kept_in_train, moved), *describe_without_sizes(outputs)):
        print_stdout(note)
    documents = sum(output.documents for output in outputs.by_key.values())
    print(f"merged {len(shards)} shards: {len(outputs.by_key)} pairs, {documents:,} documents")
    print_stdout(f"{args.output_dir / SHARDS} is no longer needed; check the result, then delete it")
    return 0


def command() -> None:
    """Runs `main` as a program."""
    run_or_exit(main)


if __name__ == "__main__":
    command()
