"""Console output that never ends the program: a closed pipe or terminal and a full disk are tolerated."""

from __future__ import annotations

import contextlib
import os
import select
import sys
from collections.abc import Callable
from typing import TextIO

# Errors of writing to a stream. ValueError: the stream is closed, or its encoding has no such character.
CONSOLE_ERRORS = (OSError, ValueError)


def escape_unencodable_characters() -> None:
    """Makes stdout and stderr print characters that their encoding does not have as backslash escapes."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def print_stdout(text: str) -> None:
    """Prints a line to stdout; silently drops it if that fails."""
    if sys.stdout is not None and not _try_print(sys.stdout, text):
        flush_streams()


def print_stderr(text: str) -> None:
    """Prints a line to stderr, or to stdout if that fails; silently drops it if both fail."""
    for stream in (sys.stderr, sys.stdout):
        if stream is not None and _try_print(stream, text):
            return
    flush_streams()


def warn(text: str) -> None:
    """Prints a warning by `print_stderr`."""
    print_stderr(f"warning: {text}")


def _try_print(stream: TextIO, line: str) -> bool:
    try:
        print(line, file=stream, flush=True)
    except CONSOLE_ERRORS:
        return False
    return True


def flush_streams() -> None:
    """Flushes stdout and stderr, and redirects them to the null device if nobody can read them any more.

    Otherwise the interpreter's own flush at exit would fail on what is still buffered, and change the exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(*CONSOLE_ERRORS):
            if stream is not None and _is_broken(stream.fileno()):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream.fileno())
                os.close(null)
        with contextlib.suppress(*CONSOLE_ERRORS):
            if stream is not None:
                stream.flush()


def _is_broken(descriptor: int) -> bool:
    """Whether the other end of a pipe or terminal is closed. A full disk does not count: space may become free."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    broken = select.POLLERR | select.POLLHUP | select.POLLNVAL
    return any(event & broken for _, event in poll.poll(0))


class BestEffortWriter:
    """Writes to one output of a run. A failed write loses its data; the first one prints a warning."""

    def __init__(self, subject: str, errors: tuple[type[Exception], ...] = (OSError,)):
        """
        Args:
            subject: name of the output, for the warning.
            errors: what a failed write raises: OSError, or `CONSOLE_ERRORS` for a stream.
        """
        self.subject, self._errors = subject, errors
        self._warned = False

    def __call__(self, write: Callable[[], object]) -> None:
        """Calls `write`; turns one of `errors` into a warning, once."""
        try:
            write()
        except self._errors as error:
            flush_streams()
            if not self._warned:
                self._warned = True
                message = f"{self.subject} cannot be written: {error}"
                warn(f"{message}; training continues, but output is lost until a write succeeds")
