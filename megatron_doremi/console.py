"""Console output that never ends the program: a closed pipe or terminal and a full disk are tolerated.

Lines appear above the progress bars of a terminal, never beside them (progress.py).
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import textwrap
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import TextIO

COLUMNS = 120

# Errors of writing to a stream. ValueError: the stream is closed, or its encoding has no such character.
CONSOLE_ERRORS = (OSError, ValueError)


def escape_unencodable_characters() -> None:
    """Makes stdout and stderr print characters that their encoding does not have as backslash escapes."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """Prints a message of a run to stdout, with the time of day; see `with_clock`."""
    print_stdout(with_clock(text, time.localtime()))


def with_clock(text: str, now: time.struct_time) -> str:
    """A message after its time of day, HH:MM:SS, wrapped to `COLUMNS`; further lines are indented below the first.

    Words are never split: a line is longer than that only if it holds a longer path.
    """
    clock = time.strftime("%H:%M:%S ", now)
    lines = [part for line in text.splitlines() or [""] for part in wrapped(line, COLUMNS - len(clock))]
    return ("\n" + " " * len(clock)).join([clock + lines[0], *lines[1:]])


def wrapped(line: str, width: int = COLUMNS) -> list[str]:
    """A line in parts of at most `width` characters; parts after the first are indented by four more spaces."""
    if len(line) <= width:
        return [line]
    indent = " " * (len(line) - len(line.lstrip()) + 4)
    parts = textwrap.wrap(
        line,
        width,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
        drop_whitespace=True,
    )
    return parts or [""]


def command_lines(words: Iterable[str]) -> list[str]:
    """Words of a command line on lines of at most `COLUMNS` characters; a backslash continues a line."""
    lines = [""]
    for word in words:
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if len(longer) + len(" \\") <= COLUMNS:
            lines[-1] = longer
        else:
            lines[-1] += " \\"
            lines.append(f"    {word}")
    return lines


def shortened(text: str, width: int) -> str:
    """A text of at most `width` characters: the middle of a longer one is left out."""
    if len(text) <= width:
        return text
    kept = max(width - 3, 0)
    return text[: kept - kept // 2] + "..." + text[len(text) - kept // 2 :]


def wrapped_lines(text: str) -> str:
    """A text whose lines are `wrapped`."""
    return "\n".join(part for line in text.split("\n") for part in wrapped(line))


def print_stdout(text: str) -> None:
    """Prints lines to stdout, wrapped; silently drops them if that fails."""
    if sys.stdout is not None and not _try_print(sys.stdout, wrapped_lines(text)):
        flush_streams()


def print_stderr(text: str) -> None:
    """Prints lines to stderr, wrapped, or to stdout if that fails; silently drops them if both fail."""
    for stream in (sys.stderr, sys.stdout):
        if stream is not None and _try_print(stream, wrapped_lines(text)):
            return
    flush_streams()


def warn(text: str) -> None:
    """Prints a warning by `print_stderr`."""
    print_stderr(f"warning: {text}")


def note(text: str) -> None:
    """Prints what a user may want to know by `print_stderr`."""
    print_stderr(f"note: {text}")


def _try_print(stream: TextIO, line: str) -> bool:
    try:
        with above_bars(stream):
            # One write, so that lines of several threads do not mix.
            stream.write(f"{line}\n")
            stream.flush()
    except CONSOLE_ERRORS:
        return False
    return True


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a stream is a terminal."""
    with contextlib.suppress(*CONSOLE_ERRORS):
        return stream is not None and stream.isatty()
    return False


def below_bars() -> str:
    """What to print before the last message of a process, which cannot wait for its progress bars to be removed."""
    return "\n" if is_terminal(sys.stderr) and "tqdm" in sys.modules else ""


def above_bars(stream: TextIO) -> AbstractContextManager[None]:
    """Removes progress bars from a terminal while a line is printed, and draws them again below it."""
    tqdm = sys.modules.get("tqdm")
    if tqdm is None or not is_terminal(stream):
        return contextlib.nullcontext()
    above: AbstractContextManager[None] = tqdm.tqdm.external_write_mode(file=stream)
    return above


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
