"""What the tasks of an array job leave, and how it becomes one data set.

Task I of N writes its pairs into OUT/shards/SPLIT-I-of-N, with a shard.json that says what they are and by which run
they were made. Joined in the order of their tasks they are, byte for byte, what one process would have written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_doremi.data.files import atomic_write_text, read_json_object
from megatron_doremi.data.indexed_dataset import IndexedDataset
from megatron_doremi.data.manifest import TokenizerInfo
from megatron_doremi.data.outputs import Key, Outputs
from megatron_doremi.data.sources import Shard
from megatron_doremi.errors import ConfigError, Fault, raise_if_any

SHARD_FORMAT = "megatron-doremi-shard/1"
SHARDS = "shards"


@dataclass(frozen=True)
class Pair:
    """A pair of a shard."""

    prefix: Path
    documents: int
    bytes: int


@dataclass(frozen=True)
class ShardData:
    """What one task left.

    Attributes:
        run: a hash of all that its result depends on but for the number of the task.
        order: the names of the domains in their order, where the run was given a list.
    """

    folder: Path
    shard: Shard
    split: str
    run: str
    tokenizer: TokenizerInfo
    pairs: dict[Key, Pair]
    order: tuple[str, ...]


def shard_folder(output_dir: Path, split: str, shard: Shard) -> Path:
    """Where a task writes."""
    return output_dir / SHARDS / f"{split}-{shard.index:05d}-of-{shard.count:05d}"


def run_of(settings: Mapping[str, Any]) -> str:
    """The hash of a run's settings, the same for all its tasks."""
    # Copies of the inputs on the disks of nodes have times of their own.
    common = {**settings, "shard": None, "inputs": [entry[:2] for entry in settings["inputs"]]}
    return hashlib.sha256(json.dumps(common, sort_keys=True).encode()).hexdigest()


def save_shard(data: ShardData) -> None:
    """Writes shard.json, which says that the folder is complete."""
    tokenizer = {**vars(data.tokenizer), "file": data.tokenizer.file.name}
    pairs = [
        {"domain": domain, "split": split, "prefix": pair.prefix.name, "documents": pair.documents, "bytes": pair.bytes}
        for (domain, split), pair in data.pairs.items()
    ]
    entry = {"format": SHARD_FORMAT, "shard": data.shard.index, "num_shards": data.shard.count, "split": data.split}
    entry |= {"run": data.run, "order": list(data.order), "tokenizer": tokenizer, "pairs": pairs}
    atomic_write_text(data.folder / "shard.json", json.dumps(entry, indent=2) + "\n")


def load_shard(folder: Path) -> ShardData:
    """Reads a task's shard.json. Raises ConfigError where it is none."""
    path = folder / "shard.json"
    entry = read_json_object(path, f"shard {path}")
    try:
        if entry["format"] != SHARD_FORMAT:
            raise ValueError(f"format {entry['format']!r}")
        known = entry["tokenizer"]
        tokenizer = TokenizerInfo(
            str(known["type"]),
            folder / str(known["file"]),
            str(known["sha256"]),
            int(known["vocab_size"]),
            int(known["eod"]),
        )
        pairs = {
            (str(pair["domain"]), str(pair["split"])): Pair(
                folder / str(pair["prefix"]), int(pair["documents"]), int(pair["bytes"])
            )
            for pair in entry["pairs"]
        }
        shard = Shard(int(entry["shard"]), int(entry["num_shards"]))
        order = tuple(str(name) for name in entry["order"])
        return ShardData(folder, shard, str(entry["split"]), str(entry["run"]), tokenizer, pairs, order)
    except (KeyError, TypeError, ValueError) as error:
        rule = "the shard.json of tools/preprocess_data.py"
        raise ConfigError(Fault(f"shard {path}", repr(error), rule, "run that task again")) from error


def load_shards(output_dir: Path, split: str) -> list[ShardData]:
    """The shards of a split in their order. Raises ConfigError where one is missing, or not of the same run."""
    folders = sorted((output_dir / SHARDS).glob(f"{split}-*-of-*"))
    where = f"--output-dir {output_dir}"
    if not folders:
        rule = f"folders {SHARDS}/{split}-I-of-N"
        raise ConfigError(Fault(where, f"no shards of the {split} split", rule, "run preprocess_data.py --shard first"))
    shards: list[ShardData] = []
    faults: list[Fault] = []
    for folder in folders:
        try:
            shards.append(load_shard(folder))
        except ConfigError as error:
            faults += error.faults
    raise_if_any(faults)
    count = shards[0].shard.count
    missing = sorted(set(range(count)) - {each.shard.index for each in shards})
    if any(each.shard.count != count for each in shards):
        counts = ", ".join(str(number) for number in sorted({each.shard.count for each in shards}))
        faults.append(Fault(where, f"shards of {counts} tasks", "those of one array job", "remove the others"))
    elif missing:
        value = "no shard " + ", ".join(map(str, missing[:20])) + (" ..." if len(missing) > 20 else "")
        faults.append(Fault(where, value, f"all of 0 to {count - 1}", "run these tasks again"))
    for each in shards:
        same = (each.tokenizer.sha256, each.tokenizer.eod) == (shards[0].tokenizer.sha256, shards[0].tokenizer.eod)
        if each.run != shards[0].run:
            value = "another tokenizer" if not same else "other inputs or settings"
            rule = f"the same as {shards[0].folder.name}"
            faults.append(Fault(str(each.folder), value, rule, "run that task again as the others were"))
    raise_if_any(faults)
    return sorted(shards, key=lambda each: each.shard.index)


def merge(shards: list[ShardData], outputs: Outputs) -> Iterator[int]:
    """Appends all pairs of all shards, in their order; yields bytes of ids as they are written.

    Raises:
        ConfigError: a pair is missing or damaged.
    """
    for each in shards:
        for key, pair in each.pairs.items():
            dataset = IndexedDataset(pair.prefix)
            dataset.check_index()
            if (dataset.num_documents, dataset.dtype) != (pair.documents, outputs.dtype):
                value = f"{dataset.num_documents:,} documents of {dataset.dtype}"
                rule = f"the {pair.documents:,} of {outputs.dtype} that shard.json speaks of"
                raise ConfigError(Fault(str(pair.prefix), value, rule, f"run task {each.shard.index} again"))
            output = outputs.output(key)
            yield from output.writer.add_dataset(dataset)
            output.documents += pair.documents
            output.bytes += pair.bytes


def tokenizer_beside(known: TokenizerInfo, folder: Path) -> TokenizerInfo:
    """The tokenizer of a shard as the data set's."""
    return replace(known, file=folder / known.file.name)
