"""What a person sees of work that takes a while: bars at a terminal, and now and then a line in a log file."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron_doremi.console import CONSOLE_ERRORS, BestEffortWriter, is_terminal, say

# Work that takes longer than this is announced.
_SILENT_SECONDS = 5.0
# Between two lines of a log file: at least, and at most.
_SHORTEST_PAUSE, _LONGEST_PAUSE = 5.0, 60.0


class LinePacer:
    """Decides when a log file gets its next line: often at first, then rarely.

    A pause is half of the time since the start, but at least 5 s and at most 60 s. One minute gives about seven lines,
    an hour about eighty.
    """

    def __init__(self, now: float):
        """
        Args:
            now: seconds of a monotonic clock.
        """
        self._began, self._last = now, now

    def due(self, now: float) -> bool:
        """Whether a line is due; if so, the next pause begins."""
        pause = min(max((self._last - self._began) / 2, _SHORTEST_PAUSE), _LONGEST_PAUSE)
        if now - self._last < pause:
            return False
        self._last = now
        return True


def duration(seconds: float) -> str:
    """A time span in its two largest units: "45 s", "4 min 09 s", "2 h 05 min", "3 d 04 h"."""
    total = round(seconds)
    for size, unit, smaller, small_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if total >= size:
            return f"{total // size:,} {unit} {total % size // smaller:02} {small_unit}"
    return f"{total} s"


@contextmanager
def stage(doing: str, shown: bool = True) -> Iterator[None]:
    """Says what the program is doing if the `with` block takes longer than five seconds, then at growing pauses.

    Args:
        doing: such as "loading iter_0000100".
        shown: false on all ranks but one.
    """
    if not shown:
        yield
        return
    done = threading.Event()
    announced: list[float] = []
    began = time.monotonic()

    def announce() -> None:
        pause = _SILENT_SECONDS
        while not done.wait(pause):
            seconds = time.monotonic() - began
            say(f"{doing} ..." + (f" {duration(seconds)}" if announced else ""))
            announced.append(seconds)
            pause = min(max(seconds, _SHORTEST_PAUSE), _LONGEST_PAUSE)

    thread = threading.Thread(target=announce, name="stage", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    if len(announced) > 1:
        say(f"{doing}: done in {duration(time.monotonic() - began)}")


class Progress:
    """Progress of a loop: a bar on stderr at a terminal, else lines on stdout by `LinePacer`.

    Nothing is shown of a loop that takes less than five seconds.
    """

    def __init__(self, doing: str, total: int, unit: str, shown: bool = True, delay: float = _SILENT_SECONDS):
        """
        Args:
            doing: what the loop does, such as "scoring".
            total: number of units.
            unit: name of one, such as "window".
            shown: false on all ranks but one.
            delay: seconds until a bar appears.
        """
        self._doing, self._total, self._unit, self._shown = doing, total, unit, shown
        self._done, self._began = 0, time.monotonic()
        self._pacer = LinePacer(self._began)
        self._write = BestEffortWriter("the console", CONSOLE_ERRORS)
        self._bar: Any = None
        if shown and is_terminal(sys.stderr):
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, unit=unit, desc=doing, delay=delay, leave=False, dynamic_ncols=True, unit_scale=True
            )

    def update(self, count: int) -> None:
        """Adds `count` finished units."""
        self._done += count
        if self._bar is not None:
            self._bar.total = max(self._total, self._done)
            self._write(lambda: self._bar.update(count))
        elif self._shown and self._pacer.due(time.monotonic()):
            say(self._line())

    def skip(self, count: int) -> None:
        """Takes `count` units, which need not be done, out of the total."""
        self._total = max(self._total - count, self._done)

    def close(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._write(self._bar.close)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _line(self) -> str:
        total, seconds = max(self._total, self._done, 1), max(time.monotonic() - self._began, 1e-9)
        rate = self._done / seconds
        text = f"{self._doing}: {self._done:,} of {total:,} {self._unit}s ({100 * self._done // total} %), "
        left = duration((total - self._done) / rate) if rate else "unknown time"
        return text + f"{rate:,.0f} {self._unit}s/s, {left} left"
