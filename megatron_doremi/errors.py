"""Faults of the user's input, collected and said in one message.

A fault is *the subject, the value given, the rule, the remedy*. Checks append faults to a list and raise once,
so that a user of a 512-GPU job hears of everything that is wrong at the first start and not of one thing
a start. Programs turn a ConfigError into exit code 2 without a traceback (`run_or_exit`); an `assert` in
this code base is always about our own mistakes.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from megatron_doremi.console import CONSOLE_ERRORS, mend_streams, tolerate_any_character
from megatron_doremi.open_files import raise_open_files_limit

EXIT_USER_ERROR = 2
EXIT_NO_READER = 141
# For the last words and the flush of both streams, which nobody may read any more.
_SECONDS_FOR_LAST_WORDS = 10.0
# What taking apart a value of the wrong shape or size raises.
MALFORMED = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError)


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with the input.

    Attributes:
        subject: the flag, file or entry at fault, spelled as the user spells it.
        value: what was given (already formatted), or "" where there is nothing to show.
        rule: what would have been right.
        remedy: what to do.
    """

    subject: str
    value: str
    rule: str
    remedy: str

    def __str__(self) -> str:
        given = f": {self.value}" if self.value else ""
        return f"{self.subject}{given}\n      rule:   {self.rule}\n      remedy: {self.remedy}"


class ConfigError(Exception):
    """The user's input is wrong. Carries every fault that was found."""

    def __init__(self, faults: Fault | Sequence[Fault]):
        self.faults: tuple[Fault, ...] = (faults,) if isinstance(faults, Fault) else tuple(faults)
        assert self.faults, "a ConfigError needs at least one fault"
        super().__init__(self._message())

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[Fault, ...]]]:
        """As workers send it to the process that started them."""
        return ConfigError, (self.faults,)

    def _message(self) -> str:
        count = len(self.faults)
        head = "1 fault in the input:" if count == 1 else f"{count} faults in the input:"
        return "\n".join([head, *(f"  [{n}] {fault}" for n, fault in enumerate(self.faults, 1))])


class RunError(Exception):
    """A run cannot go on for a reason that lies in the machine or in the training: said without a traceback, exit 1."""


class ReportedElsewhere(Exception):
    """The program ends with `code`; another process of the run says why."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


def machine_failure(error: OSError) -> RunError:
    """What an error of the operating system (full disk, lost file) says to the user."""
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return RunError(": ".join([" -> ".join(names), error.strerror or str(error)] if names else [str(error)]))


def error_text(error: ConfigError | RunError | OSError) -> str:
    """An error as JSON, for another rank, which raises `error_of` it."""
    if isinstance(error, ConfigError):
        return json.dumps({"faults": [asdict(fault) for fault in error.faults]})
    return json.dumps({"failure": str(machine_failure(error) if isinstance(error, OSError) else error)})


def error_of(text: str) -> ConfigError | RunError:
    """The error that another rank wrote by `error_text`; of an OSError, what `machine_failure` makes of it."""
    entry = json.loads(text)
    if "faults" in entry:
        return ConfigError([Fault(**fault) for fault in entry["faults"]])
    return RunError(entry["failure"])


def raise_if_any(faults: Sequence[Fault]) -> None:
    """Raises one ConfigError that holds all `faults`; returns if there are none."""
    if faults:
        raise ConfigError(faults)


def run_or_exit(main: Callable[[], int | None], at_once: bool = False) -> None:
    """Runs `main` as a program: exits with its result, or with one clear message: 2 on a ConfigError, 1 on a RunError
    or an OSError. Where the reader of stdout is gone (`| head`), it exits silently with 141, as after SIGPIPE.

    A ReportedElsewhere exits with its code and prints nothing: one rank reports for all (cluster/error_report.py).

    Args:
        at_once: end the process without waiting for other threads or running atexit functions: the interpreter joins
            every ThreadPoolExecutor's thread, also one that hangs in a file system. Whatever has to be closed, `main`
            closes; an exception that is not caught ends with its traceback and 1.
    """
    tolerate_any_character()
    raise_open_files_limit()
    # Held to the end: its frames hold generators, and closing one may wait for a thread.
    held: list[BaseException] = []
    words = ""
    try:
        code = main() or 0
    except BrokenPipeError as error:
        held.append(error)
        code = EXIT_NO_READER
    except (ConfigError, RunError, OSError) as error:
        held.append(error)
        words = f"error: {machine_failure(error) if isinstance(error, OSError) else error}"
        code = EXIT_USER_ERROR if isinstance(error, ConfigError) else 1
    except ReportedElsewhere as error:
        held.append(error)
        code = error.code
    except KeyboardInterrupt as error:
        held.append(error)
        words, code = "interrupted", 130
    except Exception as error:
        if not at_once:
            raise
        held.append(error)
        words, code = traceback.format_exc().rstrip(), 1
    if not at_once:
        _end_streams(words)
        sys.exit(code)
    last = threading.Thread(target=_end_streams, args=(words,), daemon=True)
    last.start()
    last.join(_SECONDS_FOR_LAST_WORDS)
    os._exit(code)


def _end_streams(words: str) -> None:
    """Prints the last words on stderr, if any, and flushes both streams."""
    if words:
        with contextlib.suppress(*CONSOLE_ERRORS):
            print(words, file=sys.stderr, flush=True)
    mend_streams()
