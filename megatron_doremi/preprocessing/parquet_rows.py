"""The rows of Parquet files in batches of bounded size, whatever the file's own statistics say of it."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from megatron_doremi.preprocessing.decompression import TRUNCATED, BrokenFile, UnreadableFile
from megatron_doremi.preprocessing.record_blocks import BLOCK_BYTES

# Rows of a row group of which the size is measured, bytes that one step of reading should have by that, and the rows
# that it may have whatever they say.
_FIRST_ROWS, _STEP_BYTES, _MOST_ROWS = 16, 1 << 23, 256
# What the library raises of a damaged file: besides its own, what decoding its names and numbers raises.
_FAULTS = (pyarrow.ArrowException, OSError, ValueError, OverflowError)


def open_parquet(path: Path) -> pyarrow.parquet.ParquetFile:
    """Opens a file. Raises BrokenFile, UnreadableFile, or OSError where the disk fails."""
    with path.open("rb") as raw:
        head = raw.read(4)
    if head != b"PAR1"[: len(head)]:
        raise UnreadableFile("the file is not Parquet: give it its true name")
    try:
        # Not mapped, and pages read one after the other: a row group need not fit into memory.
        options = {"memory_map": False, "buffer_size": BLOCK_BYTES, "page_checksum_verification": True}
        file = pyarrow.parquet.ParquetFile(path, **options)
        file.schema_arrow.names  # noqa: B018 - of a damaged file it cannot be made
    except _FAULTS as error:
        raise _fault(error) from error
    return file


def _fault(error: Exception) -> Exception:
    """What a library's complaint is: a failing disk, or a file that is broken."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None):
        return error
    said = " ".join(str(error).split())
    cut = "magic bytes" in said or "smaller than" in said or "too small" in said or "size is" in said
    return BrokenFile(f"{TRUNCATED}: its footer is missing" if cut else f"{TRUNCATED} (Parquet: {said[:200]})")


def row_batches(file: pyarrow.parquet.ParquetFile, columns: Sequence[str]) -> Iterator[pyarrow.RecordBatch]:
    """Batches of about `BLOCK_BYTES`, or of one row where that has more. Raises BrokenFile, or OSError."""
    held: list[pyarrow.RecordBatch] = []
    size = rows = 0
    steps = _steps(file, columns)
    while True:
        fault: Exception | None = None
        try:
            step = next(steps, None)
        except _FAULTS as error:
            step, fault = None, _fault(error)
        rows += step.num_rows if step is not None else 0
        if step is None and fault is None and rows != file.metadata.num_rows:
            # The library trusts the numbers of a damaged footer.
            fault = BrokenFile(f"{TRUNCATED} (Parquet: it holds {rows:,} of {file.metadata.num_rows:,} rows)")
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


def _steps(file: pyarrow.parquet.ParquetFile, columns: Sequence[str]) -> Iterator[pyarrow.RecordBatch]:
    """The rows of each row group, as many at a time as its first ones suggest.

    The footer does not say what rows hold: a dictionary gives its values to any number of them. And to ask it about
    the columns of a damaged file ends the process (pyarrow 26), where reading them raises.
    """
    for group in range(file.num_row_groups):
        chosen = {"row_groups": [group], "columns": list(columns), "use_threads": False}
        first = next(file.iter_batches(_FIRST_ROWS, **chosen), None)
        if first is not None and first.num_rows:
            largest = max(first.slice(row, 1).nbytes for row in range(first.num_rows))
            yield from file.iter_batches(max(1, min(_MOST_ROWS, _STEP_BYTES // max(1, largest))), **chosen)


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
