"""Files of documents, cut into blocks that travel to workers as they are.

JSON lines and arrays, CSV, Parquet and text. Blocks are cut by one process, so that any number of workers share one
big file, and always at the same places, so that a run can resume at a block and the tasks of an array job can share
the blocks out without any communication.
"""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson
import pyarrow

from megatron_doremi.errors import RunError
from megatron_doremi.preprocessing.columns import check_columns, csv_header
from megatron_doremi.preprocessing.decompression import BrokenFile, UnreadableFile, not_utf8, text_parts
from megatron_doremi.preprocessing.inputs import CSV, PARQUET, TEXT, InputFile
from megatron_doremi.preprocessing.parquet_rows import open_parquet, row_batches
from megatron_doremi.preprocessing.record_blocks import (
    ELEMENT_END,
    RECORD_BYTES,
    LongLine,
    csv_blocks,
    csv_records,
    element_blocks,
    line_blocks,
)

# How entries of a block are called in messages.
_UNITS = {"elements": "element", "rows": "row", "document": "document"}


class BadLine(ValueError):
    """A line that holds no document; says why."""


class BadFile(BadLine):
    """What is wrong with a file, not with one of its lines, or where it breaks off.

    Attributes:
        place: "" or how messages call the place, such as "line 7".
    """

    def __init__(self, said: str, place: str = ""):
        super().__init__(said)
        self.place = place


@dataclass(frozen=True)
class Block:
    """Records of a file.

    Attributes:
        file: path as given.
        first: number of the first line, row or element, from 1 on.
        data: whole lines or records with their ends, elements with theirs, rows, or a text.
        position: bytes of the file (as it lies on disk) read so far.
        broken: the file breaks off behind this block.
        problem: what is wrong behind the data, or "".
        unreadable: that concerns the whole file.
        kind: "lines", "records" (CSV), "elements" (of an array), "rows" or "document" (the whole text of a file).
        header: names of the columns of "records".
        domain: of all documents, where the file's folder says it.
    """

    file: str
    first: int
    data: bytes | pyarrow.RecordBatch
    position: int
    broken: bool = False
    problem: str = ""
    unreadable: bool = False
    kind: str = "lines"
    header: tuple[str, ...] = ()
    domain: str | None = None

    @property
    def next_number(self) -> int:
        """The number of the line after the last one."""
        if isinstance(self.data, bytes):
            return self.first + self.data.count(ELEMENT_END if self.kind == "elements" else b"\n")
        return self.first + self.data.num_rows

    @property
    def size(self) -> int:
        """Bytes of the data."""
        return len(self.data) if isinstance(self.data, bytes) else int(self.data.nbytes)

    def place(self, number: int) -> str:
        """How messages call an entry."""
        return f"{_UNITS.get(self.kind, 'line')} {number:d}"


@dataclass(frozen=True)
class Text:
    """An entry that is a text alone."""

    text: str


def as_input(file: InputFile | Path) -> InputFile:
    """A file whose folder says nothing, of a path."""
    return file if isinstance(file, InputFile) else InputFile(file)


def read_blocks(
    file: InputFile | Path, columns: Sequence[str], needed: Callable[[str | None], Sequence[str]] | None = None
) -> Iterator[Block]:
    """The blocks of a file.

    Args:
        columns: those that are read of a CSV or Parquet file.
        needed: those of them that a file with a folder's domain, or without, has to have; None: all.

    Raises:
        ConfigError: a CSV or Parquet file lacks a column, or has one of another type.
        RunError: the disk fails.
    """
    source = as_input(file)
    must = columns if needed is None else needed(source.domain)
    read = _read_rows(source.path, columns, must) if source.kind == PARQUET else _read_text(source, must)
    try:
        for block in read:
            yield block if source.domain is None else replace(block, domain=source.domain)
    except OSError as error:
        raise RunError(f"cannot read {source.path}: {error.strerror or error}") from error


def _read_text(source: InputFile, needed: Sequence[str]) -> Iterator[Block]:
    path, number = source.path, 1
    kind = "lines"
    header: tuple[str, ...] = ()
    with path.open("rb") as raw:
        parts = text_parts(raw, path)
        try:
            head = next(parts, b"")
            cuts: Iterator[bytes | LongLine]
            parts = _chain(head, parts)
            if source.kind == TEXT:
                kind, cuts = "document", _one(parts)
            elif source.kind == CSV:
                kind, cuts = "records", csv_blocks(parts)
                header = csv_header(path, next(cuts, b""), needed) if head else ()
                number += 1
            elif source.may_be_array and head.lstrip()[:1] == b"[":
                kind, cuts = "elements", element_blocks(parts)
            else:
                cuts = line_blocks(parts)
            for cut in cuts:
                if isinstance(cut, LongLine):
                    said = f"longer than {RECORD_BYTES >> 20} MiB"
                    yield Block(str(path), number, b"", raw.tell(), problem=said)
                    number += 1
                    continue
                block = Block(str(path), number, cut, raw.tell(), kind=kind, header=header)
                number = block.next_number
                yield block
        except BrokenFile as error:
            unreadable = isinstance(error, UnreadableFile)
            said = str(error) if unreadable else _how_far(error, kind, number, raw.tell(), path)
            yield Block(str(path), number, b"", raw.tell(), True, said, unreadable, kind, header)


def _chain(head: bytes, parts: Iterator[bytes]) -> Iterator[bytes]:
    yield head
    yield from parts


def _one(parts: Iterator[bytes]) -> Iterator[bytes]:
    """All parts as one."""
    held: list[bytes] = []
    for part in parts:
        held.append(part)
        if sum(map(len, held)) > RECORD_BYTES:
            raise UnreadableFile(f"the file has more than {RECORD_BYTES >> 20} MiB: split the text into documents")
    if any(held):
        yield b"".join(held)


def _how_far(error: BrokenFile, kind: str, number: int, position: int, path: Path) -> str:
    size, unit = path.stat().st_size, _UNITS.get(kind, "line")
    share = 100 * position / max(1, size)
    return f"{error}; read: {number - 1:,} {unit}s, {position:,} of {size:,} bytes on disk ({share:.0f} %)"


def _read_rows(path: Path, columns: Sequence[str], needed: Sequence[str]) -> Iterator[Block]:
    size, number, position = path.stat().st_size, 1, 0
    try:
        with open_parquet(path) as file:
            check_columns(path, file.schema_arrow.names, needed)
            chosen = [name for name in columns if name in file.schema_arrow.names]
            rows = max(1, file.metadata.num_rows)
            for batch in row_batches(file, chosen):
                position = size * (number - 1 + batch.num_rows) // rows
                yield Block(str(path), number, batch, position, kind="rows")
                number += batch.num_rows
    except BrokenFile as error:
        unreadable = isinstance(error, UnreadableFile)
        said = str(error) if unreadable else _how_far(error, "rows", number, position, path)
        yield Block(str(path), number, b"", size, True, said, unreadable, "rows")


def entries(block: Block) -> Iterator[tuple[int, Any]]:
    """(number, what it holds) of each line that is not blank, row or element; a BadLine where it holds nothing."""
    if not isinstance(block.data, bytes):
        columns = {name: block.data.column(name) for name in block.data.schema.names}
        for row in range(block.data.num_rows):
            yield block.first + row, _row(columns, row)
    elif block.kind == "lines":
        for number, line in enumerate(block.data.split(b"\n"), block.first):
            if line and not line.isspace():
                yield number, _parsed(line)
    elif block.kind == "elements":
        for number, element in enumerate(block.data.split(ELEMENT_END)[:-1], block.first):
            yield number, _parsed(element)
    elif block.kind == "records":
        yield from _records(block, block.data)
    elif block.data:
        yield block.first, _text(block.data)
    if block.broken or block.problem:
        place = "" if block.unreadable else block.place(block.next_number)
        said = block.problem or "the file breaks off here"
        yield block.next_number, BadFile(said, place) if block.broken else BadLine(said)


def _parsed(line: bytes) -> Any:
    with contextlib.suppress(orjson.JSONDecodeError):
        return orjson.loads(line)
    # The library knows what is wrong, and takes what is not quite JSON, such as NaN.
    try:
        return json.loads(line.removeprefix(b"\xef\xbb\xbf").decode("utf-8"))
    except UnicodeDecodeError:
        return _bad_encoding(line)
    except (ValueError, RecursionError):
        return BadLine("not JSON")


def _bad_encoding(data: bytes) -> BadLine:
    said = not_utf8(data)
    return BadFile(said) if said.startswith("the file") else BadLine(said)


def _text(data: bytes) -> Text | BadLine:
    try:
        return Text(data.decode("utf-8"))
    except UnicodeDecodeError:
        return _bad_encoding(data)


def _records(block: Block, content: bytes) -> Iterator[tuple[int, Any]]:
    number = block.first
    lines = (line + b"\n" for line in content.removesuffix(b"\n").split(b"\n"))
    for data, fields in csv_records(lines):
        if isinstance(fields, csv.Error):
            # A quote that is not closed takes the lines that follow along.
            more = data.count(b"\n") - 1
            yield number, BadLine(f"not CSV ({fields})" + (f", to line {number + more}" if more else ""))
        elif len(fields) not in (0, len(block.header)):
            yield number, BadLine(f"{len(fields)} fields where the header has {len(block.header)}")
        elif fields:
            try:
                values = (text if text.isascii() else text.encode("latin-1").decode("utf-8") for text in fields)
                yield number, dict(zip(block.header, values, strict=True))
            except UnicodeDecodeError:
                yield number, _bad_encoding(data)
        number += data.count(b"\n")


def _row(columns: dict[str, Any], row: int) -> Any:
    try:
        found = {name: column[row].as_py() for name, column in columns.items()}
        return {k: v.decode("utf-8") if isinstance(v, bytes) else v for k, v in found.items()}
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
    files: Sequence[InputFile | Path],
    columns: Sequence[str],
    shard: Shard,
    skip: int = 0,
    needed: Callable[[str | None], Sequence[str]] | None = None,
) -> Iterator[tuple[Block, Progress]]:
    """The blocks of a shard, in the inputs' order; the shards' blocks, one shard after the other, are all blocks.

    A shard does not open files that lie outside its part. Of the one in which its part begins it reads the beginning
    too, which for a compressed file is the only way, and some thirty times as fast as encoding it.

    Args:
        skip: blocks to leave out, since an earlier run has had them.
        needed: see `read_blocks`.
    """
    sizes = [as_input(file).path.stat().st_size for file in files]
    start, end = shard_bytes(sizes, shard)
    base, blocks = 0, 0
    for file, size in zip(files, sizes, strict=True):
        # An empty file belongs to nobody: it has no blocks.
        if base < end and base + size > start:
            place = base
            for block in read_blocks(file, columns, needed):
                if place >= end:
                    break
                if place >= start:
                    blocks += 1
                    if blocks > skip:
                        yield block, Progress(blocks, base + block.position - start)
                # All of a file's blocks start within it, a last one behind its last byte too.
                place = min(base + block.position, base + size - 1)
        base += size
