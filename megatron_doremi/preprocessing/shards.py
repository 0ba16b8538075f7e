"""The shards that the tasks of an array job write, and their merge into one data set.

Task I of N writes its pairs to OUT/shards/SPLIT-I-of-N, with a shard.json that lists them and identifies the run.
Concatenated in the order of the tasks, they equal the output of a single process, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator
from pydantic_core import PydanticCustomError

from megatron_doremi.data.document_bytes import bytes_path, document_bytes
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
# Sizes of documents that are read at once.
_PART = 1 << 20


class ShardTokenizer(TokenizerEntry):
    """The tokenizer of a shard; its file is in the shard's folder."""

    file: FileName


class ShardPair(Schema):
    """A pair in the shard's folder."""

    domain: Name
    split: Literal["train", "valid"]
    prefix: FileName
    documents: Count
    bytes: Count
    document_bytes: bool = False


class ShardEntry(Schema):
    """The content of shard.json."""

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
    """A pair of a shard.

    Attributes:
        prefix: the path of the pair, without the suffix.
        documents: number of documents.
        bytes: bytes of their UTF-8 text.
        document_bytes: whether the pair has PREFIX.bytes; those of version 0.1 have none.
    """

    prefix: Path
    documents: int
    bytes: int
    document_bytes: bool


@dataclass(frozen=True)
class ShardData:
    """The output of one task.

    Attributes:
        run: hash of everything that the result depends on, except the index of the task.
        order: the order of the domain names, if the run was given a list; else ().
    """

    folder: Path
    shard: Shard
    split: str
    run: str
    tokenizer: TokenizerInfo
    pairs: dict[Key, Pair]
    order: tuple[str, ...]


def shard_folder(output_dir: Path, split: str, shard: Shard) -> Path:
    """Returns the folder to which a task writes."""
    return output_dir / SHARDS / f"{split}-{shard.index:05d}-of-{shard.count:05d}"


def run_of(settings: Mapping[str, Any]) -> str:
    """Returns the hash of a run's settings, which is the same for all of its tasks."""
    # Without modification times: copies of the inputs on the disks of several nodes differ in them.
    common = {**settings, "shard": None, "inputs": [path_and_stat[:2] for path_and_stat in settings["inputs"]]}
    return hashlib.sha256(json.dumps(common, sort_keys=True).encode()).hexdigest()


def save_shard(data: ShardData) -> None:
    """Writes shard.json, which marks the folder as complete."""
    tokenizer = {**vars(data.tokenizer), "file": data.tokenizer.file.name}
    pairs = [
        {"domain": domain, "split": split} | vars(pair) | {"prefix": pair.prefix.name}
        for (domain, split), pair in data.pairs.items()
    ]
    content = {
        "format": ShardEntry.FORMAT,
        "shard": data.shard.index,
        "num_shards": data.shard.count,
        "split": data.split,
        "run": data.run,
        "order": list(data.order),
        "tokenizer": tokenizer,
        "pairs": pairs,
    }
    atomic_write_text(data.folder / "shard.json", json.dumps(sealed(content), indent=2) + "\n")


def load_shard(folder: Path) -> ShardData:
    """Reads the shard.json of a task. It can only refer to files in its own folder. Raises ConfigError."""
    path = folder / "shard.json"
    content = read_checked(path, f"shard {path}", ShardEntry, "run that task again")
    tokenizer = tokenizer_info(content.tokenizer, folder)
    pairs: dict[Key, Pair] = {}
    for pair in content.pairs:
        pairs[pair.domain, pair.split] = Pair(folder / pair.prefix, pair.documents, pair.bytes, pair.document_bytes)
    shard = Shard(content.shard, content.num_shards)
    return ShardData(folder, shard, content.split, content.run, tokenizer, pairs, tuple(content.order))


def shard_folders(output_dir: Path, split: str) -> list[Path]:
    """Returns the folders named like tasks of a split. A copy under another name, such as .bak, does not count."""
    pattern = re.compile(rf"{split}-[0-9]{{5,}}-of-[0-9]{{5,}}")
    folders = (output_dir / SHARDS).glob(f"{split}-*-of-*")
    return sorted(path for path in folders if pattern.fullmatch(path.name) and path.is_dir())


def ignored_folders(output_dir: Path, split: str) -> list[Path]:
    """Returns the paths that are named almost like the folder of a task, such as copies."""
    read = set(shard_folders(output_dir, split))
    return sorted(path for path in (output_dir / SHARDS).glob(f"*{split}-*-of-*") if path not in read)


def load_shards(output_dir: Path, split: str) -> list[ShardData]:
    """Returns the shards of a split in order. Raises ConfigError if one is missing or from another run."""
    folders = shard_folders(output_dir, split)
    subject = f"--output-dir {output_dir}"
    if not folders:
        value, rule = f"no shards of the {split} split", f"folders {SHARDS}/{split}-I-of-N"
        raise ConfigError(Fault(subject, value, rule, "run preprocess_data.py with --shard first"))
    shards: list[ShardData] = []
    faults: list[Fault] = []
    for folder in folders:
        try:
            data = load_shard(folder)
        except ConfigError as error:
            faults += error.faults
            continue
        if folder != shard_folder(output_dir, split, data.shard) or data.split != split:
            value = f"holds shard {data.shard.index} of {data.shard.count} of the {data.split} split"
            rule = f"a folder named after its task, {shard_folder(output_dir, data.split, data.shard).name}"
            faults.append(Fault(str(folder), value, rule, "rename the folder, or run that task again"))
        shards.append(data)
    raise_if_any(faults)
    first = shards[0]
    count = first.shard.count
    missing = sorted(set(range(count)) - {data.shard.index for data in shards})
    if any(data.shard.count != count for data in shards):
        counts = ", ".join(str(number) for number in sorted({data.shard.count for data in shards}))
        faults.append(Fault(subject, f"shards of {counts} tasks", "shards of one array job", "remove the others"))
    elif missing:
        value = "no shard " + ", ".join(map(str, missing[:20])) + (" ..." if len(missing) > 20 else "")
        faults.append(Fault(subject, value, f"all of 0 to {count - 1}", "run these tasks again"))
    for data in shards:
        if data.run != first.run:
            same = (data.tokenizer.sha256, data.tokenizer.eod) == (first.tokenizer.sha256, first.tokenizer.eod)
            value = "other inputs or settings" if same else "another tokenizer"
            rule = f"the same as {first.folder.name}"
            faults.append(Fault(str(data.folder), value, rule, "run that task again with the settings of the others"))
    raise_if_any(faults)
    return sorted(shards, key=lambda data: data.shard.index)


def merge(shards: list[ShardData], outputs: Outputs) -> Iterator[int]:
    """Appends all pairs of all shards, in order; yields the bytes of ids written at each step.

    Raises:
        ConfigError: a pair is missing or damaged.
    """
    without_sizes = {key for data in shards for key, pair in data.pairs.items() if not pair.document_bytes}
    for data in shards:
        for key, pair in data.pairs.items():
            dataset = IndexedDataset(pair.prefix)
            dataset.check_index()
            if (dataset.num_documents, dataset.dtype) != (pair.documents, outputs.dtype):
                value = f"{dataset.num_documents:,} documents of {dataset.dtype}"
                rule = f"{pair.documents:,} documents of {outputs.dtype}, as in shard.json"
                raise ConfigError(Fault(str(pair.prefix), value, rule, f"run task {data.shard.index} again"))
            output = outputs.output(key, with_sizes=key not in without_sizes)
            yield from output.writer.add_dataset(dataset)
            output.documents += pair.documents
            output.bytes += pair.bytes
            if output.sizes is not None:
                for part in _sizes_of(pair, data.shard.index):
                    output.sizes.add(part)


def _sizes_of(pair: Pair, task: int) -> Iterator[NDArray[np.uint32]]:
    """Yields the sizes of a pair's documents, in parts. Raises ConfigError unless they are those of shard.json."""
    sizes, remedy = document_bytes(pair.prefix), f"run task {task} again"
    subject = str(bytes_path(pair.prefix))
    if sizes is None:
        raise ConfigError(Fault(subject, "no such file", "the sizes of the documents, as in shard.json", remedy))
    total = int(sizes.sum(dtype=np.int64))
    if total != pair.bytes:
        raise ConfigError(Fault(subject, f"{total:,} bytes of text", f"{pair.bytes:,}, as in shard.json", remedy))
    for first in range(0, len(sizes), _PART):
        yield sizes[first : first + _PART]
