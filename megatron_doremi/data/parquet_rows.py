"""The rows of Parquet files in batches of bounded size, whatever the file's own statistics say of it."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from megatron_doremi.data.cutting import BLOCK_BYTES
from megatron_doremi.data.decompression import CUT, BrokenFile, UnreadableFile

# Bytes that one step of reading may make of a dictionary's values.
_STEP_BYTES = 1 << 25
# A dictionary gives its values to any number of rows. Where the file does not bound what they hold, a step has as many
# rows as hold this much on average, and no more than this number.
_USUAL_STEP_BYTES, _USUAL_STEP_ROWS = 1 << 15, 256


def open_parquet(path: Path) -> pyarrow.parquet.ParquetFile:
    """Opens a file. Raises BrokenFile, UnreadableFile, or OSError where the disk fails."""
    with path.open("rb") as raw:
        head = raw.read(4)
    if head != b"PAR1"[: len(head)]:
        raise UnreadableFile("the file is not Parquet: give it its true name")
    try:
        # Not mapped, and pages read one after the other: a row group need not fit into memory.
        return pyarrow.parquet.ParquetFile(path, memory_map=False, buffer_size=BLOCK_BYTES)
    except (pyarrow.ArrowException, OSError) as error:
        raise _fault(error) from error


def _fault(error: Exception) -> Exception:
    """What a library's complaint is: a failing disk, or a file that is broken."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None):
        return error
    said = " ".join(str(error).split())
    cut = "magic bytes" in said or "smaller than" in said or "too small" in said or "size is" in said
    return BrokenFile(f"{CUT}: its footer is missing" if cut else f"{CUT} (Parquet: {said[:200]})")


def row_batches(file: pyarrow.parquet.ParquetFile, columns: Sequence[str]) -> Iterator[pyarrow.RecordBatch]:
    """Batches of about `BLOCK_BYTES`, or of one row where that has more. Raises BrokenFile, or OSError."""
    held: list[pyarrow.RecordBatch] = []
    size = 0
    steps = file.iter_batches(_rows_at_once(file, columns), columns=list(columns), use_threads=False)
    while True:
        fault: Exception | None = None
        try:
            step = next(steps, None)
        except (pyarrow.ArrowException, OSError) as error:
            step, fault = None, _fault(error)
        for batch in _cut(step) if step is not None else ():
            if held and size + batch.nbytes > BLOCK_BYTES:
                yield pyarrow.concat_batches(held)
                held, size = [], 0
            held.append(batch)
            size += batch.nbytes
        if step is None and held:
            yield pyarrow.concat_batches(held)
        if fault is not None:
            raise fault
        if step is None:
            return


def _cut(batch: pyarrow.RecordBatch) -> Iterator[pyarrow.RecordBatch]:
    """Slices of at most about `BLOCK_BYTES`."""
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
        # A copy: a slice takes all of its batch along on its way to a worker.
        yield pyarrow.concat_batches([batch.slice(start, end - start)])
        start = end


def _rows_at_once(file: pyarrow.parquet.ParquetFile, columns: Sequence[str]) -> int:
    """Rows that one step of reading takes, from what the file's metadata bounds."""
    metadata = file.metadata
    rows, largest, total = max(1, metadata.num_rows), 1, 1
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            if column.path_in_schema.split(".")[0] in columns:
                largest = max(largest, column.total_uncompressed_size)
                total += column.total_uncompressed_size
    plain = max(1, rows * BLOCK_BYTES // total)
    bounded = _STEP_BYTES // largest
    usual = min(_USUAL_STEP_ROWS, rows * _USUAL_STEP_BYTES // total)
    return max(1, min(plain, max(bounded, usual)))
