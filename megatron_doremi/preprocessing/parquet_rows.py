"""Reads the rows of Parquet files in batches of bounded size, without trusting the statistics in the file."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from megatron_doremi.preprocessing.decompression import DAMAGED, TRUNCATED, BrokenFile, UnreadableFile
from megatron_doremi.preprocessing.record_blocks import BLOCK_BYTES

# The first rows of a row group are measured to choose the rows of a step: about _STEP_BYTES, at most _MAX_STEP_ROWS.
_MEASURED_ROWS, _STEP_BYTES, _MAX_STEP_ROWS = 16, 1 << 23, 256
# Exceptions that pyarrow raises for damaged files; the built-in ones come from decoding their names and numbers.
_PARQUET_ERRORS = (pyarrow.ArrowException, OSError, ValueError, OverflowError)


def open_parquet(path: Path) -> pyarrow.parquet.ParquetFile:
    """Opens a file. Raises BrokenFile, UnreadableFile, or OSError if the disk fails."""
    with path.open("rb") as raw:
        head = raw.read(4)
    if head != b"PAR1"[: len(head)]:
        raise UnreadableFile("the file is not Parquet: correct its suffix")
    try:
        # Without a memory map, and reading page by page: a row group need not fit in memory.
        options = {"memory_map": False, "buffer_size": BLOCK_BYTES, "page_checksum_verification": True}
        file = pyarrow.parquet.ParquetFile(path, **options)
        file.schema_arrow.names  # noqa: B018 - raises if the footer is damaged
    except _PARQUET_ERRORS as error:
        raise _fault(error) from error
    return file


def _fault(error: Exception) -> Exception:
    """Returns the exception to raise for one of pyarrow's: itself if the machine failed, else a BrokenFile."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None):
        return error
    message = " ".join(str(error).split())
    if any(words in message for words in ("magic bytes", "smaller than", "too small", "size is")):
        return BrokenFile(f"{TRUNCATED}: its footer is missing")
    return BrokenFile(f"{DAMAGED} (Parquet: {message[:200]})")


def row_batches(file: pyarrow.parquet.ParquetFile, columns: Sequence[str]) -> Iterator[pyarrow.RecordBatch]:
    """Yields batches of about `BLOCK_BYTES`; a larger row is a batch of its own. Raises BrokenFile or OSError."""
    pending: list[pyarrow.RecordBatch] = []
    size = rows = 0
    steps = _steps(file, columns)
    while True:
        fault: Exception | None = None
        try:
            step = next(steps, None)
        except _PARQUET_ERRORS as error:
            step, fault = None, _fault(error)
        rows += step.num_rows if step is not None else 0
        if step is None and fault is None and rows != file.metadata.num_rows:
            # pyarrow does not compare the row count in the footer with the rows that it reads.
            fault = BrokenFile(f"{DAMAGED} (Parquet: it holds {rows:,} of {file.metadata.num_rows:,} rows)")
        for batch in slices(step) if step is not None else ():
            if pending and size + batch.nbytes > BLOCK_BYTES:
                yield pyarrow.concat_batches(pending)
                pending, size = [], 0
            pending.append(batch)
            size += batch.nbytes
        if step is None and pending:
            yield pyarrow.concat_batches(pending)
        if fault is not None:
            raise fault
        if step is None:
            return


def _steps(file: pyarrow.parquet.ParquetFile, columns: Sequence[str]) -> Iterator[pyarrow.RecordBatch]:
    """Yields the rows of each row group; the size of its first rows decides how many come at a time.

    The footer does not give the size of rows in memory: any number of rows may share one dictionary value. Querying
    column metadata of a damaged file aborts the process (pyarrow 26), while reading the column raises.
    """
    for group in range(file.num_row_groups):
        selection = {"row_groups": [group], "columns": list(columns), "use_threads": False}
        first = next(file.iter_batches(_MEASURED_ROWS, **selection), None)
        if first is not None and first.num_rows:
            largest = max(first.slice(row, 1).nbytes for row in range(first.num_rows))
            step_rows = max(1, min(_MAX_STEP_ROWS, _STEP_BYTES // max(1, largest)))
            yield from file.iter_batches(step_rows, **selection)


def slices(batch: pyarrow.RecordBatch) -> Iterator[pyarrow.RecordBatch]:
    """Splits a batch into slices of about `BLOCK_BYTES` or less."""
    if batch.nbytes <= BLOCK_BYTES or batch.num_rows < 2:
        yield batch
        return
    sizes = np.zeros(batch.num_rows, dtype=np.int64)
    for row in range(batch.num_rows):
        sizes[row] = batch.slice(row, 1).nbytes
    ends = np.cumsum(sizes).tolist()
    start = 0
    while start < batch.num_rows:
        before = ends[start - 1] if start else 0
        end = max(start + 1, bisect.bisect_right(ends, before + BLOCK_BYTES))
        # Copy: pickling a slice for a worker would pickle its entire batch.
        yield pyarrow.concat_batches([batch.slice(start, end - start)])
        start = end
