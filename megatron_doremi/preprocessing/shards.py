"""What the tasks of an array job leave, and how it becomes one data set.

Task I of N writes its pairs into OUT/shards/SPLIT-I-of-N, with a shard.json that says what they are and by which run
they were made. Joined in the order of their tasks they are, byte for byte, what one process would have written.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import model_validator
from pydantic_core import PydanticCustomError

from megatron_doremi.data.indexed_dataset import IndexedDataset
from megatron_doremi.data.manifest import TokenizerEntry, TokenizerInfo, tokenizer_info
from megatron_doremi.errors import ConfigError, Fault, raise_if_any
from megatron_doremi.preprocessing.outputs import Key, Outputs
from megatron_doremi.preprocessing.sources import Shard
from megatron_doremi.storage.files import atomic_write_text
from megatron_doremi.storage.formats import (
    Count,
    FileName,
    Name,
    Positive,
    Schema,
    Sha256,
    read_checked,
    sealed,
)

SHARDS = "shards"


class ShardTokenizer(TokenizerEntry):
    """The tokenizer of a shard, whose file lies in its folder."""

    file: FileName


class ShardPair(Schema):
    """A pair in the folder of a shard."""

    domain: Name
    split: Literal["train", "valid"]
    prefix: FileName
    documents: Count
    bytes: Count


class ShardEntry(Schema):
    """shard.json."""

    FORMAT: ClassVar[str] = "megatron-doremi-shard/2"
    # Version 0.1 wrote no SHA-256.
    OLDER_FORMATS: ClassVar[tuple[str, ...]] = ("megatron-doremi-shard/1",)
    SEALED: ClassVar[bool] = True
    shard: Count
    num_shards: Positive
    split: Literal["train", "valid"]
    run: Sha256
    order: list[Name]
    tokenizer: ShardTokenizer
    pairs: list[ShardPair]

    @model_validator(mode="after")
    def _consistent(self) -> ShardEntry:
        if self.shard >= self.num_shards:
            raise PydanticCustomError("shard", "shard should be below num_shards")
        keys = {(pair.domain, pair.split) for pair in self.pairs}
        if min(len(keys), len({pair.prefix.casefold() for pair in self.pairs})) < len(self.pairs):
            raise PydanticCustomError("pairs", "a pair should be listed once")
        return self


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
    entry = {
        "format": ShardEntry.FORMAT,
        "shard": data.shard.index,
        "num_shards": data.shard.count,
        "split": data.split,
    }
    entry |= {"run": data.run, "order": list(data.order), "tokenizer": tokenizer, "pairs": pairs}
    atomic_write_text(data.folder / "shard.json", json.dumps(sealed(entry), indent=2) + "\n")


def load_shard(folder: Path) -> ShardData:
    """Reads a task's shard.json, which names files of its own folder alone. Raises ConfigError where it is none."""
    path = folder / "shard.json"
    entry = read_checked(path, f"shard {path}", ShardEntry, "run that task again")
    tokenizer = tokenizer_info(entry.tokenizer, folder)
    pairs: dict[Key, Pair] = {}
    for pair in entry.pairs:
        pairs[pair.domain, pair.split] = Pair(folder / pair.prefix, pair.documents, pair.bytes)
    shard = Shard(entry.shard, entry.num_shards)
    return ShardData(folder, shard, entry.split, entry.run, tokenizer, pairs, tuple(entry.order))


def shard_folders(output_dir: Path, split: str) -> list[Path]:
    """The folders that are named like tasks of a split. A copy under another name, such as .bak, is none."""
    pattern = re.compile(rf"{split}-[0-9]{{5,}}-of-[0-9]{{5,}}")
    folders = (output_dir / SHARDS).glob(f"{split}-*-of-*")
    return sorted(path for path in folders if pattern.fullmatch(path.name) and path.is_dir())


def ignored_folders(output_dir: Path, split: str) -> list[Path]:
    """What lies beside the folders of the tasks under names that only resemble theirs."""
    known = set(shard_folders(output_dir, split))
    return sorted(path for path in (output_dir / SHARDS).glob(f"*{split}-*-of-*") if path not in known)


def load_shards(output_dir: Path, split: str) -> list[ShardData]:
    """The shards of a split in their order. Raises ConfigError where one is missing, or not of the same run."""
    folders = shard_folders(output_dir, split)
    where = f"--output-dir {output_dir}"
    if not folders:
        rule = f"folders {SHARDS}/{split}-I-of-N"
        raise ConfigError(Fault(where, f"no shards of the {split} split", rule, "run preprocess_data.py --shard first"))
    shards: list[ShardData] = []
    faults: list[Fault] = []
    for folder in folders:
        try:
            each = load_shard(folder)
        except ConfigError as error:
            faults += error.faults
            continue
        if folder != shard_folder(output_dir, split, each.shard) or each.split != split:
            value = f"shard {each.shard.index} of {each.shard.count} of the {each.split} split"
            rule = f"the task that the folder is named by, {shard_folder(output_dir, each.split, each.shard).name}"
            faults.append(Fault(str(folder), value, rule, "rename the folder, or run that task again"))
        shards.append(each)
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
