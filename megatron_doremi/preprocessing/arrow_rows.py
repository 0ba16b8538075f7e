"""Reads the rows of Arrow IPC files, as the `datasets` library of Hugging Face saves them (`save_to_disk`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import pyarrow
import pyarrow.ipc

from megatron_doremi.preprocessing.decompression import DAMAGED, TRUNCATED, BrokenFile, UnreadableFile
from megatron_doremi.preprocessing.parquet_rows import slices

# The IPC file format starts with this; the stream format, which `datasets` writes, with the size of its schema.
_FILE_MAGIC = b"ARROW1"
# What ends a stream: a reader of pyarrow also accepts a stream truncated between two batches.
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
# A damaged size asks for more memory than there is.
_ARROW_ERRORS = (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError)


@contextlib.contextmanager
def open_arrow(path: Path) -> Iterator[tuple[pyarrow.Schema, Iterator[tuple[pyarrow.RecordBatch, int]]]]:
    """Opens a file; gives its schema, and its batches with the byte of the file after each.

    Raises:
        UnreadableFile: the file is not Arrow.
        BrokenFile: when a batch is read that is truncated or damaged.
        OSError: the disk fails.
    """
    with path.open("rb") as raw:
        is_file = raw.read(len(_FILE_MAGIC)) == _FILE_MAGIC
        raw.seek(0)
        try:
            reader = pyarrow.ipc.open_file(raw) if is_file else pyarrow.ipc.open_stream(raw)
            schema = reader.schema
            schema.names  # noqa: B018 - raises if the names are damaged
        except _ARROW_ERRORS as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise UnreadableFile("the file is not Arrow, or its schema is damaged") from error
        yield schema, _file_batches(raw, reader) if is_file else _stream_batches(raw, reader)


def _file_batches(
    raw: BinaryIO, reader: pyarrow.ipc.RecordBatchFileReader
) -> Iterator[tuple[pyarrow.RecordBatch, int]]:
    for number in range(reader.num_record_batches):
        try:
            batch = reader.get_batch(number)
            batch.validate(full=True)
        except _ARROW_ERRORS as error:
            raise _fault(error) from error
        yield batch, raw.tell()


def _stream_batches(
    raw: BinaryIO, reader: pyarrow.ipc.RecordBatchStreamReader
) -> Iterator[tuple[pyarrow.RecordBatch, int]]:
    while True:
        try:
            batch = reader.read_next_batch()
            batch.validate(full=True)
        except StopIteration:
            break
        except _ARROW_ERRORS as error:
            raise _fault(error) from error
        yield batch, raw.tell()
    raw.seek(max(0, raw.tell() - len(_END_OF_STREAM)))
    if raw.read(len(_END_OF_STREAM)) != _END_OF_STREAM:
        raise BrokenFile(TRUNCATED)


def _fault(error: Exception) -> Exception:
    """The exception to raise for one of pyarrow's: itself if the machine failed, else a BrokenFile."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    if isinstance(error, MemoryError):
        return BrokenFile(f"{DAMAGED}, or a batch of its rows does not fit into memory")
    message = " ".join(str(error).split())
    if "Expected to be able to read" in message or "Expected to read" in message:
        return BrokenFile(TRUNCATED)
    return BrokenFile(f"{DAMAGED} (Arrow: {message[:200]})")


def arrow_blocks(
    batches: Iterator[tuple[pyarrow.RecordBatch, int]], columns: Sequence[str]
) -> Iterator[tuple[pyarrow.RecordBatch, int]]:
    """Yields batches of about the size of a block with only `columns`, and the byte of the file after each."""
    for batch, position in batches:
        for part in slices(batch.select(list(columns))):
            yield part, position
