"""The files that a run appends to, metrics.jsonl and TensorBoard events, and how a resumed run continues them.

Both are opened once and written in place, so that a symbolic link remains one. A record is written in full or not at
all.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from megatron_doremi.phases.charts import chart_layout, scalars
from megatron_doremi.storage.files import AppendFile

_BLOCK = 1 << 20
# Longer than a line of a run with thousands of domains; only this much of a longer line is read.
_LONGEST_LINE = 1 << 22
# After this many lines to keep, read from the end, everything before them is kept too.
_ENOUGH_LINES = 64
_ITERATION = re.compile(rb'"iteration"\s*:\s*(-?\d{1,18})(?![\d.eE])')


class MetricsFile:
    """metrics.jsonl: one line per entry; a resumed run repeats no iteration."""

    def __init__(self, path: Path, last_iteration: float, recorded_bytes: int | None = None):
        """Opens the file to append the iterations after `last_iteration`.

        Lines of later iterations, which a run wrote after its last checkpoint, and a torn last line are removed.
        Everything before them is kept byte for byte, including damaged lines.

        Args:
            recorded_bytes: size of the file recorded in the checkpoint, if any: the file is truncated to it without
                being read, provided that the lines on both sides confirm it.

        Raises:
            OSError: the file cannot be opened, read or truncated.
        """
        self._file = AppendFile(path)
        size = self._file.size()
        kept = kept_bytes(self._file, last_iteration, recorded_bytes)
        if kept != size:
            self._file.truncate(kept)
        self._torn = False

    def size(self) -> int:
        """Bytes in the file."""
        return self._file.size()

    def write(self, entry: Mapping[str, Any]) -> None:
        """Appends a line, with floats in full precision (Python's shortest text that parses to the same float).

        Raises:
            OSError: the line could not be written and is lost; the next one still starts on a new line.
        """
        line = json.dumps(entry).encode() + b"\n"
        if self._torn:
            size = self._file.size()
            line = (b"" if size == 0 or self._file.read(size - 1, size) == b"\n" else b"\n") + line
        self._torn = True
        self._file.append(line)
        self._torn = False

    def make_durable(self) -> None:
        """Waits until everything written is on disk."""
        self._file.make_durable()

    def close(self) -> None:
        """Makes the file durable and closes it."""
        try:
            self._file.make_durable()
        finally:
            self._file.close()


def kept_bytes(file: AppendFile, last_iteration: float, recorded_bytes: int | None = None) -> int:
    """Returns the size in bytes to which a run that resumes after `last_iteration` truncates a metrics file.

    Without a recorded size the lines are read from the end. Iterations increase, but a damaged line may show another
    iteration than was written, so the file is truncated where the fewest lines contradict it. Of two such places the
    first is used: a missing line is better than a repeated iteration.
    """
    size = file.size()
    if recorded_bytes is not None and _confirmed(file, recorded_bytes, last_iteration):
        return recorded_bytes
    end = size
    if size and file.read(size - 1, size) != b"\n":
        end = next(_line_starts(file, size))
    kept, following = end, end
    # Lines that contradict truncation before this line, minus those that contradict truncation at the end.
    contradictions = fewest = 0
    for start in _line_starts(file, end):
        iteration = _iteration(file, start, following, last_iteration)
        following = start
        if iteration is None:
            continue
        contradictions += 1 if iteration <= last_iteration else -1
        if contradictions <= fewest:
            fewest, kept = contradictions, start
        elif contradictions > fewest + _ENOUGH_LINES:
            break
    return kept


def _confirmed(file: AppendFile, recorded: int, last_iteration: float) -> bool:
    """Whether lines before the recorded size are of iterations up to the last one, and lines after it of later ones."""
    size = file.size()
    if recorded > size or (recorded and file.read(recorded - 1, recorded) != b"\n"):
        return False
    following = recorded
    for start in _line_starts(file, recorded):
        before = _iteration(file, start, following, last_iteration)
        following = start
        if before is not None:
            if before > last_iteration:
                return False
            break
    length = file.read(recorded, recorded + _LONGEST_LINE).find(b"\n") + 1
    if not length:
        # Only a torn line may follow.
        return size - recorded < _LONGEST_LINE
    after = _iteration(file, recorded, recorded + length, last_iteration)
    return after is not None and after > last_iteration


def _line_starts(file: AppendFile, end: int) -> Iterator[int]:
    """Yields the offsets at which the lines before `end` start, last line first; reads the file backward in blocks."""
    for high in range(end, 0, -_BLOCK):
        low = max(0, high - _BLOCK)
        block = file.read(low, high)
        # The newline at the end ends the last line and starts none.
        offset = block.rfind(b"\n", 0, len(block) - (high == end))
        while offset >= 0:
            yield low + offset + 1
            offset = block.rfind(b"\n", 0, offset)
    if end:
        yield 0


def _iteration(file: AppendFile, start: int, end: int, last_iteration: float) -> float | None:
    """Returns the iteration of the line between two offsets, or None if it has no reliable one.

    In a line that is damaged elsewhere, only a number above `last_iteration` counts: such a line is removed.
    """
    line = file.read(start, min(end, start + _LONGEST_LINE))
    try:
        iteration = json.loads(line)["iteration"]
        if isinstance(iteration, int | float) and not isinstance(iteration, bool) and not math.isnan(iteration):
            return iteration
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        pass
    match = _ITERATION.search(line)
    number = int(match.group(1)) if match else None
    return number if number is not None and number > last_iteration else None


class EventsFile:
    """A file of TensorBoard events, written by the calling thread, so that errors are raised to the caller."""

    def __init__(self, folder: Path, iteration: int):
        """Creates a new file, and its folder; tells TensorBoard to ignore events after `iteration` in older files.

        Raises:
            OSError: the file cannot be created.
        """
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{time.time_ns()}"
        self._file = AppendFile(folder / name)
        self._append(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if iteration:
            restart = SessionLog(status=SessionLog.SessionStatus.START)
            self._append(Event(wall_time=time.time(), step=iteration + 1, session_log=restart))
        self._append(Event(wall_time=time.time(), summary=chart_layout()))

    def write(self, entry: Mapping[str, Any]) -> None:
        """Appends the numbers of a metrics line. Raises OSError if they could not be written and are lost."""
        values = [Summary.Value(tag=name, simple_value=number) for name, number in scalars(entry)]
        self._append(Event(wall_time=time.time(), step=entry["iteration"], summary=Summary(value=values)))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _append(self, event: Event) -> None:
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self._file.append(record.getvalue())
