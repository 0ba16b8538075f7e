"""Joins what the tasks of an array job left into one data set.

    for I in 0 1 2 3: python tools/preprocess_data.py --shard I --num-shards 4 --output-dir data --split train ...
    python tools/merge_datasets.py --output-dir data --split train

Every task has to be there, complete and of one run: the same inputs, settings and tokenizer. The result is, byte for
byte, what one process would have written. Pairs are copied a piece at a time, whatever their size; the shards stay.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm

from megatron_doremi.data.indexed_dataset import dtype_for, paths_of
from megatron_doremi.data.manifest import load_manifest, overwriting_faults, print_warnings
from megatron_doremi.errors import ConfigError, Fault, raise_if_any, run_or_exit
from megatron_doremi.preprocessing.outputs import Outputs, check_same_tokenizer, manifest_after, publish, train_prefixes
from megatron_doremi.preprocessing.shards import SHARDS, ignored_folders, load_shards, merge
from megatron_doremi.preprocessing.workspace import Workspace
from megatron_doremi.storage.files import atomic_write_bytes, sha256_of


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--output-dir", required=True, type=Path, metavar="DIR", help="as given to the tasks")
    parser.add_argument("--split", choices=("train", "valid"), default="train", help="(default: train)")
    return parser


def main() -> int:
    """Checks the shards, copies them and publishes the manifest."""
    args = build_parser().parse_args()
    for path in ignored_folders(args.output_dir, args.split):
        print(f"warning: {path} is not the folder of a task and is not read", file=sys.stderr)
    shards = load_shards(args.output_dir, args.split)
    source = shards[0].tokenizer
    if not source.file.is_file() or sha256_of(source.file) != source.sha256:
        rule = f"the tokenizer with SHA-256 {source.sha256[:12]}"
        raise ConfigError(Fault(str(source.file), "missing or another file", rule, "put it back"))
    tokenizer = replace(source, file=args.output_dir / source.file.name)
    manifest_path = args.output_dir / "domains.json"
    known = {}
    if args.split == "train":
        raise_if_any(overwriting_faults(manifest_path))
    else:
        train = load_manifest(manifest_path)
        check_same_tokenizer(train, tokenizer)
        known = train_prefixes(train, args.output_dir)
    partial = args.output_dir / f".partial-{args.split}"
    outputs = Outputs(args.output_dir, partial, dtype_for(tokenizer.vocab_size), known)
    pairs = [pair for each in shards for pair in each.pairs.values()]
    size = sum(paths_of(pair.prefix)[0].stat().st_size for pair in pairs if paths_of(pair.prefix)[0].is_file())
    with Workspace(partial, outputs, {}, resume=False) as workspace:
        with tqdm(total=size, unit="B", unit_scale=True, desc=f"merging {args.split}", mininterval=0.5) as bar:
            for count in merge(shards, outputs):
                bar.update(count)
        if not outputs.by_key:
            raise ConfigError(Fault("--output-dir", "no documents in any shard", "text", "give inputs that hold some"))
        moved = outputs.keep_in_train() if args.split == "train" else []
        manifest = manifest_after(manifest_path, args.split, outputs.by_key, tokenizer, shards[0].order)
        atomic_write_bytes(tokenizer.file, source.file.read_bytes())
        publish(outputs, manifest, args.split)
        workspace.remove()
    print_warnings(load_manifest(manifest_path))
    for domain in moved:
        print(f"domain {domain!r}: all of it fell to the held-out part; it stays in the train split")
    documents = sum(output.documents for output in outputs.by_key.values())
    print(f"merged {len(shards)} shards: {len(outputs.by_key)} pairs, {documents:,} documents")
    print(f"{args.output_dir / SHARDS} is not needed any more once you are content")
    return 0


if __name__ == "__main__":
    run_or_exit(main)
