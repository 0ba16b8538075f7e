"""What programs print: a console that cannot be written (closed pipe or terminal, full disk) ends no work."""

from __future__ import annotations

import contextlib
import os
import select
import sys
from collections.abc import Callable
from typing import TextIO

# What writing to a stream raises: ValueError where it was closed, or where its encoding lacks a character.
CONSOLE_ERRORS = (OSError, ValueError)


def tolerate_any_character() -> None:
    """Lets stdout and stderr print every character, escaped where their encoding lacks it."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """Prints a line on stdout, as far as that can be written."""
    if sys.stdout is not None and not _written(sys.stdout, text):
        mend_streams()


def note(text: str) -> None:
    """Prints a line on stderr, or on stdout where stderr cannot be written."""
    for stream in (sys.stderr, sys.stdout):
        if stream is not None and _written(stream, text):
            return
    mend_streams()


def warn(text: str) -> None:
    """Prints a warning; see `note`."""
    note(f"warning: {text}")


def _written(stream: TextIO, line: str) -> bool:
    try:
        print(line, file=stream, flush=True)
    except CONSOLE_ERRORS:
        return False
    return True


def mend_streams() -> None:
    """Points streams whose reader is gone to the null device: what is still in their buffers must not fail again,
    least of all when the interpreter flushes them at its end and changes the exit code."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(*CONSOLE_ERRORS):
            if stream is not None and _has_lost_its_reader(stream.fileno()):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream.fileno())
                os.close(null)
        with contextlib.suppress(*CONSOLE_ERRORS):
            if stream is not None:
                stream.flush()


def _has_lost_its_reader(descriptor: int) -> bool:
    """Whether a pipe or terminal is closed at its other end. A full disk is not: it may get room again."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    gone = select.POLLERR | select.POLLHUP | select.POLLNVAL
    return any(event & gone for _, event in poll.poll(0))


class Guard:
    """Writes to one output of a run; where that fails, it warns once, and the run continues without what was lost."""

    def __init__(self, subject: str, errors: tuple[type[Exception], ...] = (OSError,)):
        """
        Args:
            subject: what the output is, for the warning.
            errors: what writing to it raises: an error of the machine, and of a stream `CONSOLE_ERRORS`.
        """
        self.subject, self._errors = subject, errors
        self._warned = False

    def __call__(self, write: Callable[[], object]) -> None:
        """Calls `write`; one of `errors` becomes a warning."""
        try:
            write()
        except self._errors as error:
            mend_streams()
            if not self._warned:
                self._warned = True
                warn(f"{self.subject} cannot be written: {error}; training continues, what is not written is lost")
