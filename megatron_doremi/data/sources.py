"""Files of documents, cut into blocks that travel to workers whole: JSON lines, plain or compressed, and Parquet.

Blocks are cut by one process, so that any number of workers share one big file, and always at the same places, so that
a run can go on at a block and the tasks of an array job can share the blocks out without a word to each other.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import pyarrow
import pyarrow.parquet
import zstandard

from megatron_doremi.errors import ConfigError, Fault

SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".parquet")
# Of a block: enough to hide its way to a worker and back.
BLOCK_BYTES = 1 << 21
# Bytes of a compressed file that are decompressed at once; what they hold has to fit into memory.
_COMPRESSED = 1 << 15
_BROKEN = (EOFError, OSError, zlib.error, zstandard.ZstdError)


class BadLine(ValueError):
    """A line that holds no document; says why."""


@dataclass(frozen=True)
class Block:
    """Whole lines of JSON, or rows of a Parquet file.

    Attributes:
        file: path as given.
        first: number of the first line or row, from 1 on.
        data: lines with their ends, or rows.
        position: bytes of the file (as it lies on disk) read so far.
        broken: the file breaks off behind this block.
    """

    file: str
    first: int
    data: bytes | pyarrow.RecordBatch
    position: int
    broken: bool = False

    @property
    def following(self) -> int:
        """The number of the line after the last one."""
        return self.first + (self.data.count(b"\n") if isinstance(self.data, bytes) else self.data.num_rows)


def check_inputs(paths: Sequence[Path]) -> list[Fault]:
    """Faults of input files: missing ones, and kinds that are not read."""
    faults = []
    for path in paths:
        if not path.is_file():
            faults.append(Fault("--input", str(path), "an existing file", "check the path"))
        elif not path.name.endswith(SUFFIXES):
            rule = "one of " + ", ".join("*" + suffix for suffix in SUFFIXES)
            faults.append(Fault("--input", str(path), rule, "convert the file to JSON lines"))
    return faults


def read_blocks(path: Path, columns: Sequence[str]) -> Iterator[Block]:
    """The blocks of a file.

    Args:
        columns: those that are read of a Parquet file.

    Raises:
        ConfigError: a Parquet file lacks a column.
    """
    yield from _read_rows(path, columns) if path.suffix == ".parquet" else _read_lines(path)


def _read_lines(path: Path) -> Iterator[Block]:
    number, buffer = 1, bytearray()
    with path.open("rb") as raw:
        parts = _decompressed(raw, path)
        broken = False
        while True:
            try:
                part = next(parts, b"")
            except _BROKEN:
                part, broken = b"", True
            buffer += part
            if part and len(buffer) < BLOCK_BYTES:
                continue
            # The last line of a whole file needs no newline; of a broken one nobody knows how it went on.
            end = len(buffer) if not part and not broken else buffer.rfind(b"\n") + 1
            if end or broken:
                block = Block(str(path), number, bytes(buffer[:end]), raw.tell(), broken)
                del buffer[:end]
                number = block.following
                yield block
            if not part:
                return


def _decompressed(raw: BinaryIO, path: Path) -> Iterator[bytes]:
    """The content of a file in parts. Raises one of `_BROKEN` where it breaks off."""
    if path.name.endswith(".gz"):
        # Reads a little at a time: what came before a break is handed out before the break is met.
        stream = gzip.GzipFile(fileobj=raw)
        while part := stream.read1(_COMPRESSED):
            yield part
    elif path.name.endswith(".zst"):
        yield from _zstandard_frames(raw)
    else:
        while part := raw.read(BLOCK_BYTES):
            yield part


def _zstandard_frames(raw: BinaryIO) -> Iterator[bytes]:
    """The content of all frames; complains of a frame that breaks off, which zstandard's own reader does not."""
    frame, fresh = zstandard.ZstdDecompressor().decompressobj(), True
    while data := raw.read(_COMPRESSED):
        while data:
            part = frame.decompress(data)
            fresh, data = False, b""
            if frame.eof:
                data = frame.unused_data
                frame, fresh = zstandard.ZstdDecompressor().decompressobj(), True
            if part:
                yield part
    if not fresh:
        raise EOFError("the file breaks off")


def _read_rows(path: Path, columns: Sequence[str]) -> Iterator[Block]:
    size, number = path.stat().st_size, 1
    try:
        file = pyarrow.parquet.ParquetFile(path, memory_map=False)
    except (pyarrow.ArrowException, OSError):
        yield Block(str(path), 1, b"", 0, broken=True)
        return
    with file:
        lacking = [column for column in columns if column not in file.schema_arrow.names]
        if lacking:
            value, names = ", ".join(map(repr, lacking)), ", ".join(map(repr, file.schema_arrow.names))
            rule = f"the columns of the keys, among {names}"
            raise ConfigError(Fault(f"--input {path}", f"no column {value}", rule, "give other keys"))
        rows = max(1, file.metadata.num_rows)
        heavy = sum(file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups))
        at_once = max(1, rows * BLOCK_BYTES // max(BLOCK_BYTES, heavy))
        batches = file.iter_batches(at_once, columns=list(columns))
        while True:
            try:
                batch = next(batches, None)
            except (pyarrow.ArrowException, OSError):
                yield Block(str(path), number, b"", size, broken=True)
                return
            if batch is None:
                return
            position = size * (number - 1 + batch.num_rows) // rows
            yield Block(str(path), number, batch, position)
            number += batch.num_rows


def entries(block: Block) -> Iterator[tuple[int, Any]]:
    """(number, what it holds) of each line that is not blank, or row; a BadLine where it holds nothing."""
    if isinstance(block.data, bytes):
        for number, line in enumerate(block.data.split(b"\n"), block.first):
            if line and not line.isspace():
                yield number, _parsed(line)
    else:
        columns = {name: block.data.column(name) for name in block.data.schema.names}
        for row in range(block.data.num_rows):
            yield block.first + row, _row(columns, row)
    if block.broken:
        yield block.following, BadLine("the file breaks off here")


def _parsed(line: bytes) -> Any:
    with contextlib.suppress(orjson.JSONDecodeError):
        return orjson.loads(line)
    # The library knows what is wrong, and takes what is not quite JSON, such as NaN.
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return BadLine("not UTF-8")
    except (ValueError, RecursionError):
        return BadLine("not JSON")


def _row(columns: dict[str, Any], row: int) -> Any:
    try:
        return {name: column[row].as_py() for name, column in columns.items()}
    except UnicodeDecodeError:
        return BadLine("not UTF-8")


@dataclass(frozen=True)
class Shard:
    """A task of an array job: it reads the blocks that start in its part of the inputs' bytes.

    Attributes:
        index: from 0 on.
        count: how many there are.
    """

    index: int = 0
    count: int = 1


@dataclass(frozen=True)
class Progress:
    """How far the reading is.

    Attributes:
        blocks: blocks of this shard read so far, this one included.
        done: bytes on disk of this shard's part.
    """

    blocks: int
    done: int


def shard_bytes(sizes: Sequence[int], shard: Shard) -> tuple[int, int]:
    """(start, end) of a shard's part of the bytes of all inputs."""
    total = sum(sizes)
    return -(-total * shard.index // shard.count), -(-total * (shard.index + 1) // shard.count)


def read_shard(
    paths: Sequence[Path], columns: Sequence[str], shard: Shard, skip: int = 0
) -> Iterator[tuple[Block, Progress]]:
    """The blocks of a shard, in the inputs' order; the shards' blocks, one shard after the other, are all blocks.

    A shard does not open files that lie outside its part. Of the one in which its part begins it reads the beginning
    too, which for a compressed file is the only way, and some thirty times as fast as encoding it.

    Args:
        skip: blocks to leave out, since an earlier run has had them.
    """
    sizes = [path.stat().st_size for path in paths]
    start, end = shard_bytes(sizes, shard)
    base, blocks = 0, 0
    for path, size in zip(paths, sizes, strict=True):
        # An empty file belongs to nobody: it has no blocks.
        if base < end and base + size > start:
            place = base
            for block in read_blocks(path, columns):
                if place >= end:
                    break
                if place >= start:
                    blocks += 1
                    if blocks > skip:
                        yield block, Progress(blocks, base + block.position - start)
                # All of a file's blocks start within it, a last one behind its last byte too.
                place = min(base + block.position, base + size - 1)
        base += size


def bad_lines_error(bad: list[str], total: int, remedy: str) -> ConfigError:
    """The error of inputs with bad lines.

    Args:
        bad: descriptions of the first of them.
        total: how many there were.
    """
    more = "" if total == len(bad) else f", and {total - len(bad):,} more"
    value = f"{total:,} bad lines: " + "; ".join(bad) + more
    return ConfigError(Fault("--input", value, "lines that each hold a document", remedy))
