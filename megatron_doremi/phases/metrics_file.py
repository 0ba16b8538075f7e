"""metrics.jsonl and the TensorBoard events: files to which a run appends, and how they resume.

Both are opened once and written in place, so that a link stays a link. A record is written in full or not at all.
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

from megatron_doremi.storage.files import AppendFile

_BLOCK = 1 << 20
# A line of a run with thousands of domains; of a longer one only the beginning is read.
_LONGEST_LINE = 1 << 22
# So many lines of iterations that stay show that what lies before them stays too.
_ENOUGH_LINES = 64
_ITERATION = re.compile(rb'"iteration"\s*:\s*(-?\d{1,18})(?![\d.eE])')


class MetricsFile:
    """metrics.jsonl: one line an entry, never a repeated iteration."""

    def __init__(self, path: Path, last_iteration: float, recorded_bytes: int | None = None):
        """Opens the file for the iterations after `last_iteration`.

        Lines of later iterations, which a run wrote after its last checkpoint, and a torn last line are dropped.
        Everything before them stays as it is, byte for byte, damaged lines included.

        Args:
            recorded_bytes: size of the file when the checkpoint was taken, where the checkpoint holds it: the file
                is then cut there without being read, as long as the lines on both sides confirm it.
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
        """Appends a line; floats in full precision (Python's shortest text that reads back the same).

        Raises:
            OSError: the line could not be written and is lost; the next one starts on a new line all the same.
        """
        line = json.dumps(entry).encode() + b"\n"
        if self._torn:
            size = self._file.size()
            line = (b"" if size == 0 or self._file.read(size - 1, size) == b"\n" else b"\n") + line
        self._torn = True
        self._file.append(line)
        self._torn = False

    def make_durable(self) -> None:
        """Waits until what was written is on the disk."""
        self._file.make_durable()

    def close(self) -> None:
        """Makes the file durable and closes it."""
        try:
            self._file.make_durable()
        finally:
            self._file.close()


def kept_bytes(file: AppendFile, last_iteration: float, recorded_bytes: int | None = None) -> int:
    """How much of a metrics file stays where a run resumes after `last_iteration`; see `MetricsFile`.

    Without a recorded size the lines are read from the end: iterations rise, so the file is cut where the fewest lines
    contradict it, for a damaged line may give another iteration than was written. Of two such places the first is
    taken: rather a line too few than an iteration twice.
    """
    size = file.size()
    if recorded_bytes is not None and _confirmed(file, recorded_bytes, last_iteration):
        return recorded_bytes
    end = size
    if size and file.read(size - 1, size) != b"\n":
        end = next(_line_starts(file, size))
    kept, following = end, end
    # Lines that contradict a cut before this line, less those that contradict a cut at the end.
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
    """Whether the lines before and after a recorded size are of iterations up to and after the last one."""
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
        # Nothing but a torn line may follow.
        return size - recorded < _LONGEST_LINE
    after = _iteration(file, recorded, recorded + length, last_iteration)
    return after is not None and after > last_iteration


def _line_starts(file: AppendFile, end: int) -> Iterator[int]:
    """Where the lines before `end` begin, the last one first; the file is read in blocks, from there backward."""
    for high in range(end, 0, -_BLOCK):
        low = max(0, high - _BLOCK)
        block = file.read(low, high)
        # The newline at the very end ends the last line and begins none.
        place = block.rfind(b"\n", 0, len(block) - (high == end))
        while place >= 0:
            yield low + place + 1
            place = block.rfind(b"\n", 0, place)
    if end:
        yield 0


def _iteration(file: AppendFile, start: int, end: int, last_iteration: float) -> float | None:
    """The iteration of the line between two places; None where it has none that can be trusted.

    Of a line that is damaged elsewhere the number counts where it lies past `last_iteration`, for such a line goes.
    """
    line = file.read(start, min(end, start + _LONGEST_LINE))
    try:
        found = json.loads(line)["iteration"]
        if isinstance(found, int | float) and not isinstance(found, bool) and not math.isnan(found):
            return found
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        pass
    match = _ITERATION.search(line)
    number = int(match.group(1)) if match else None
    return number if number is not None and number > last_iteration else None


class EventsFile:
    """A file of TensorBoard events, written in the thread that calls: an error is raised where it happens."""

    def __init__(self, folder: Path, iteration: int):
        """Starts a new file in a folder, which is made; TensorBoard drops what older files hold past `iteration`."""
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{time.time_ns()}"
        self._file = AppendFile(folder / name)
        self._append(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if iteration:
            restart = SessionLog(status=SessionLog.SessionStatus.START)
            self._append(Event(wall_time=time.time(), step=iteration + 1, session_log=restart))

    def write(self, entry: Mapping[str, Any]) -> None:
        """Appends the numbers of a metrics line. Raises OSError where that fails; they are lost then."""
        values = []
        for key, value in entry.items():
            if isinstance(value, Mapping):
                values += [Summary.Value(tag=f"{key}/{name}", simple_value=number) for name, number in value.items()]
            elif key != "iteration":
                values.append(Summary.Value(tag=key, simple_value=value))
        self._append(Event(wall_time=time.time(), step=entry["iteration"], summary=Summary(value=values)))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _append(self, event: Event) -> None:
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self._file.append(record.getvalue())
