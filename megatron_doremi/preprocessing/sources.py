"""Splits input files (JSON lines and arrays, CSV, Parquet, Arrow, text) into blocks, which workers parse.

One process splits a file, so any number of workers can share a large one. The boundaries of blocks are deterministic,
so a run can resume at a block, and the tasks of an array job can divide the blocks without communication.
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
from megatron_doremi.preprocessing.arrow_rows import arrow_blocks, open_arrow
from megatron_doremi.preprocessing.columns import check_columns, csv_header
from megatron_doremi.preprocessing.decompression import TRUNCATED, BrokenFile, UnreadableFile, not_utf8, text_parts
from megatron_doremi.preprocessing.inputs import ARROW, CSV, PARQUET, TEXT, InputFile
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

# What messages call a record of a block; "line" if not listed.
_UNITS = {"elements": "element", "rows": "row", "document": "document"}


class BadLine(ValueError):
    """A line, row or element that is not a document. The message says why."""


class BadFile(BadLine):
    """A fault of a file and not of a single line, or the place where a file is truncated or damaged.

    Attributes:
        place: where messages locate the fault, such as "line 7"; "" for the file itself.
    """

    def __init__(self, message: str, place: str = ""):
        super().__init__(message)
        self.place = place


@dataclass(frozen=True)
class Block:
    """Records of a file.

    Attributes:
        file: the path as given.
        first: number of the first line, element or row, counted from 1.
        data: complete lines, CSV records or array elements with their terminators; rows; or the text of a file.
        position: bytes of the file (on disk, compressed) read so far.
        broken: whether the file cannot be read beyond this block.
        problem: the fault that follows the data, or "".
        unreadable: whether that fault concerns the entire file.
        kind: "lines", "records" (CSV), "elements" (of a JSON array), "rows", or "document" (the text of one file).
        header: column names of "records".
        domain: the domain of all documents, if the file's folder gives it.
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
        """The number of the first line, element or row after this block."""
        if isinstance(self.data, bytes):
            return self.first + self.data.count(ELEMENT_END if self.kind == "elements" else b"\n")
        return self.first + self.data.num_rows

    @property
    def size(self) -> int:
        """Size of the data in bytes."""
        return len(self.data) if isinstance(self.data, bytes) else int(self.data.nbytes)

    def place(self, number: int) -> str:
        """Returns the location of a record for messages, such as "line 7"."""
        return f"{_UNITS.get(self.kind, 'line')} {number:d}"


@dataclass(frozen=True)
class Text:
    """A record without fields: the text of a file."""

    text: str


def as_input(file: InputFile | Path) -> InputFile:
    """Wraps a path as an InputFile whose folder gives no domain."""
    return file if isinstance(file, InputFile) else InputFile(file)


def read_blocks(
    file: InputFile | Path, columns: Sequence[str], needed: Callable[[str | None], Sequence[str]] | None = None
) -> Iterator[Block]:
    """Yields the blocks of a file.

    Args:
        columns: the columns to read from a Parquet or Arrow file.
        needed: returns the columns that a CSV, Parquet or Arrow file must have, given the domain of its folder; None
            requires all of `columns`.

    Raises:
        ConfigError: a column of a CSV, Parquet or Arrow file is missing or duplicated.
        RunError: the disk fails.
    """
    source = as_input(file)
    required = columns if needed is None else needed(source.domain)
    blocks = _read_rows(source, columns, required) if source.kind in (PARQUET, ARROW) else _read_text(source, required)
    try:
        for block in blocks:
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
            contents: Iterator[bytes | LongLine]
            parts = _chain(head, parts)
            if source.kind == TEXT:
                kind, contents = "document", _joined(parts)
            elif source.kind == CSV:
                kind, contents = "records", csv_blocks(parts)
                header = csv_header(path, next(contents, b""), needed) if head else ()
                number += 1
            elif source.may_be_array and head.lstrip()[:1] == b"[":
                kind, contents = "elements", element_blocks(parts)
            else:
                contents = line_blocks(parts)
            for content in contents:
                if isinstance(content, LongLine):
                    problem = f"longer than {RECORD_BYTES >> 20} MiB"
                    yield Block(str(path), number, b"", raw.tell(), problem=problem)
                    number += 1
                    continue
                block = Block(str(path), number, content, raw.tell(), kind=kind, header=header)
                number = block.next_number
                yield block
        except BrokenFile as error:
            unreadable = isinstance(error, UnreadableFile)
            problem = str(error) if unreadable else _with_progress(error, kind, number, raw.tell(), path)
            yield Block(str(path), number, b"", raw.tell(), True, problem, unreadable, kind, header)


def _chain(head: bytes, parts: Iterator[bytes]) -> Iterator[bytes]:
    yield head
    yield from parts


def _joined(parts: Iterator[bytes]) -> Iterator[bytes]:
    """Yields all parts joined, or nothing if they are empty."""
    pending: list[bytes] = []
    for part in parts:
        pending.append(part)
        if sum(map(len, pending)) > RECORD_BYTES:
            raise UnreadableFile(f"the file exceeds {RECORD_BYTES >> 20} MiB: split the text into documents")
    if any(pending):
        yield b"".join(pending)


def _with_progress(error: BrokenFile, kind: str, number: int, position: int, path: Path) -> str:
    """Appends to the message how much of the file was read."""
    size, unit = path.stat().st_size, _UNITS.get(kind, "line")
    percent = 100 * position / max(1, size)
    return f"{error}; read {number - 1:,} {unit}s, {position:,} of {size:,} bytes on disk ({percent:.0f} %)"


def _read_rows(source: InputFile, columns: Sequence[str], needed: Sequence[str]) -> Iterator[Block]:
    path = source.path
    size, number, position = path.stat().st_size, 1, 0
    try:
        rows = _arrow_rows if source.kind == ARROW else _parquet_rows
        for batch, position in rows(path, columns, needed):
            yield Block(str(path), number, batch, position, kind="rows")
            number += batch.num_rows
    except BrokenFile as error:
        unreadable = isinstance(error, UnreadableFile)
        problem = str(error) if unreadable else _with_progress(error, "rows", number, position, path)
        yield Block(str(path), number, b"", size, True, problem, unreadable, "rows")


def _parquet_rows(
    path: Path, columns: Sequence[str], needed: Sequence[str]
) -> Iterator[tuple[pyarrow.RecordBatch, int]]:
    """Yields batches and the byte of the file after each, as estimated from the number of rows."""
    size, done = path.stat().st_size, 0
    with open_parquet(path) as file:
        check_columns(path, file.schema_arrow.names, needed)
        present = [name for name in columns if name in file.schema_arrow.names]
        for batch in row_batches(file, present):
            done += batch.num_rows
            yield batch, size * done // max(1, file.metadata.num_rows)


def _arrow_rows(path: Path, columns: Sequence[str], needed: Sequence[str]) -> Iterator[tuple[pyarrow.RecordBatch, int]]:
    with open_arrow(path) as (schema, batches):
        check_columns(path, schema.names, needed)
        yield from arrow_blocks(batches, [name for name in columns if name in schema.names])


def parse_block(block: Block) -> Iterator[tuple[int, Any]]:
    """Yields (number, record) for each row, element or non-blank line; a BadLine in place of a record that cannot be
    parsed, and for the fault that follows the data."""
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
        yield from _csv_rows(block, block.data)
    elif block.data:
        yield block.first, _text(block.data)
    if block.broken or block.problem:
        place = "" if block.unreadable else block.place(block.next_number)
        problem = block.problem or TRUNCATED
        yield block.next_number, BadFile(problem, place) if block.broken else BadLine(problem)


def _parsed(line: bytes) -> Any:
    with contextlib.suppress(orjson.JSONDecodeError):
        return orjson.loads(line)
    # json also accepts NaN and a byte order mark, and distinguishes a wrong encoding from wrong JSON.
    try:
        return json.loads(line.removeprefix(b"\xef\xbb\xbf").decode("utf-8"))
    except UnicodeDecodeError:
        return _bad_encoding(line)
    except (ValueError, RecursionError):
        # Pretty-printed objects span lines.
        return BadLine("not JSON on one line: jq -c . FILE > NEW" if line.strip() == b"{" else "not JSON")


def _bad_encoding(data: bytes) -> BadLine:
    message = not_utf8(data)
    return BadFile(message) if message.startswith("the file") else BadLine(message)


def _text(data: bytes) -> Text | BadLine:
    try:
        return Text(data.decode("utf-8"))
    except UnicodeDecodeError:
        return _bad_encoding(data)


def _csv_rows(block: Block, content: bytes) -> Iterator[tuple[int, Any]]:
    number = block.first
    lines = (line + b"\n" for line in content.removesuffix(b"\n").split(b"\n"))
    for data, fields in csv_records(lines):
        if isinstance(fields, csv.Error):
            # An unclosed quote also consumes the lines after it.
            extra_lines = data.count(b"\n") - 1
            consumed = f", consumed up to line {number + extra_lines}" if extra_lines else ""
            yield number, BadLine(f"not CSV ({fields}){consumed}")
        elif len(fields) not in (0, len(block.header)):
            yield number, BadLine(f"number of fields: {len(fields)}, in the header: {len(block.header)}")
        elif fields:
            try:
                values = (text if text.isascii() else text.encode("latin-1").decode("utf-8") for text in fields)
                yield number, dict(zip(block.header, values, strict=True))
            except UnicodeDecodeError:
                yield number, _bad_encoding(data)
        number += data.count(b"\n")


def _row(columns: dict[str, Any], row: int) -> Any:
    try:
        values = {name: column[row].as_py() for name, column in columns.items()}
        return {k: v.decode("utf-8") if isinstance(v, bytes) else v for k, v in values.items()}
    except UnicodeDecodeError:
        return BadLine("not UTF-8")


@dataclass(frozen=True)
class Shard:
    """A task of an array job: it reads the blocks that start within its byte range of the inputs.

    Attributes:
        index: from 0 to count - 1.
        count: number of tasks.
    """

    index: int = 0
    count: int = 1


@dataclass(frozen=True)
class Progress:
    """The progress of reading a shard.

    Attributes:
        blocks: blocks of this shard read so far, including the current one.
        done: bytes on disk read so far, counted from the start of the shard's range.
    """

    blocks: int
    done: int


def shard_bytes(sizes: Sequence[int], shard: Shard) -> tuple[int, int]:
    """Returns the byte range (start, end) of a shard within all inputs, in order."""
    total = sum(sizes)
    return -(-total * shard.index // shard.count), -(-total * (shard.index + 1) // shard.count)


def read_shard(
    files: Sequence[InputFile | Path],
    columns: Sequence[str],
    shard: Shard,
    skip: int = 0,
    needed: Callable[[str | None], Sequence[str]] | None = None,
) -> Iterator[tuple[Block, Progress]]:
    """Yields the blocks of a shard, in the order of the inputs. The shards in order yield every block exactly once.

    A shard does not open files outside its range. It reads the file in which its range starts from the beginning:
    compressed files allow nothing else, and reading is about thirty times as fast as encoding.

    Args:
        skip: number of blocks to skip because an earlier run has encoded them.
        needed: see `read_blocks`.
    """
    sizes = [as_input(file).path.stat().st_size for file in files]
    start, end = shard_bytes(sizes, shard)
    base, blocks = 0, 0
    for file, size in zip(files, sizes, strict=True):
        # An empty file has no blocks and belongs to no shard.
        if base < end and base + size > start:
            block_start = base
            for block in read_blocks(file, columns, needed):
                if block_start >= end:
                    break
                if block_start >= start:
                    blocks += 1
                    if blocks > skip:
                        yield block, Progress(blocks, base + block.position - start)
                # A block after the file's last byte must not fall into the next file's shard.
                block_start = min(base + block.position, base + size - 1)
        base += size
