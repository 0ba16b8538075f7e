"""Faults of the user's input, collected and reported in one message, and the exit codes of programs.

A fault is *the subject, the value given, the rule, the remedy*. Checks append faults to a list and raise once, so that
the first start of a 512-GPU job reports everything that is wrong, not one fault per start. Programs turn a ConfigError
into exit code 2 without a traceback (`run_or_exit`); an `assert` always concerns a bug of this program.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from megatron_doremi.console import (
    CONSOLE_ERRORS,
    above_bars,
    escape_unencodable_characters,
    flush_streams,
    wrapped_lines,
)
from megatron_doremi.open_files import raise_open_files_limit

EXIT_USER_ERROR = 2
EXIT_BROKEN_PIPE = 141
# Faults of one rule in a row that a message lists.
_SHOWN_OF_A_RULE = 10
# To print the final message and to flush both streams, which block if nobody reads them.
_SECONDS_TO_FLUSH = 10.0
# Errors of unpacking a value of the wrong type, structure or size.
MALFORMED = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError)


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with the input.

    Attributes:
        subject: the flag, file or entry at fault, as the user spells it.
        value: the value given, already formatted; "" if there is none to show.
        rule: what would be valid.
        remedy: what the user can do.
    """

    subject: str
    value: str
    rule: str
    remedy: str

    @property
    def given(self) -> str:
        """The subject and the value, on one line."""
        return f"{self.subject}: {self.value}" if self.value else self.subject

    @property
    def advice(self) -> str:
        """The rule and the remedy, on two lines."""
        return f"      rule:   {self.rule}\n      remedy: {self.remedy}"

    def __str__(self) -> str:
        return f"{self.given}\n{self.advice}"


class ConfigError(Exception):
    """The user's input is wrong; holds every fault."""

    def __init__(self, faults: Fault | Sequence[Fault]):
        self.faults: tuple[Fault, ...] = (faults,) if isinstance(faults, Fault) else tuple(faults)
        assert self.faults, "a ConfigError needs at least one fault"
        super().__init__(self._message())

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[Fault, ...]]]:
        """Pickles the faults, not the message: worker processes raise this error in the process that started them."""
        return ConfigError, (self.faults,)

    def _message(self) -> str:
        count = len(self.faults)
        lines = ["1 fault in the input:" if count == 1 else f"{count} faults in the input:"]
        number = 1
        for _, group in itertools.groupby(self.faults, lambda fault: (fault.rule, fault.remedy)):
            faults = list(group)
            shown = faults[:_SHOWN_OF_A_RULE] if len(faults) > _SHOWN_OF_A_RULE + 1 else faults
            # A rule that several faults in a row break stands once, below the last.
            lines += [f"  [{number + place}] {fault.given}" for place, fault in enumerate(shown[:-1])]
            if len(shown) < len(faults):
                last = f"  [{number + len(shown) - 1}] {shown[-1].given}"
                lines += [last, f"  and {len(faults) - len(shown):,} more like these", shown[-1].advice]
            else:
                lines.append(f"  [{number + len(shown) - 1}] {shown[-1]}")
            number += len(faults)
        return "\n".join(lines)


class RunError(Exception):
    """The run cannot continue because of the machine or of the training itself; exit code 1, no traceback."""


class ReportedElsewhere(Exception):
    """The program exits with `code`; another process of the run reports the reason."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


def machine_failure(error: OSError) -> RunError:
    """An error of the operating system (full disk, missing file) as a message to the user."""
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    message = ": ".join([" -> ".join(names), error.strerror or str(error)] if names else [str(error)])
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        message += "; free disk space or raise the quota there, then run the same command again"
    if error.errno == errno.EFBIG:
        message += "; raise the limit of file sizes (ulimit -f), then run the same command again"
    return RunError(message)


def error_to_json(error: ConfigError | RunError | OSError) -> str:
    """Encodes an error for another rank, which raises it by `error_from_json`."""
    if isinstance(error, ConfigError):
        return json.dumps({"faults": [asdict(fault) for fault in error.faults]})
    return json.dumps({"failure": str(machine_failure(error) if isinstance(error, OSError) else error)})


def error_from_json(text: str) -> ConfigError | RunError:
    """Decodes an error that `error_to_json` encoded; an OSError becomes the RunError of `machine_failure`."""
    report = json.loads(text)
    if "faults" in report:
        return ConfigError([Fault(**fault) for fault in report["faults"]])
    return RunError(report["failure"])


def raise_if_any(faults: Sequence[Fault]) -> None:
    """Raises a ConfigError with all `faults` if there are any."""
    if faults:
        raise ConfigError(faults)


def run_or_exit(main: Callable[[], int | None], skip_cleanup: bool = False) -> None:
    """Runs `main` as a program and exits with its result, or with a message and 2 on a ConfigError, 1 on a RunError or
    an OSError.

    If the reader of stdout is gone (`| head`), exits silently with 141, as after SIGPIPE. On a ReportedElsewhere, exits
    with its code and prints nothing: one rank reports for all (cluster/error_report.py).

    Args:
        skip_cleanup: end the process without waiting for other threads and without running atexit functions: the
            interpreter joins the threads of every ThreadPoolExecutor, even one that hangs in a file system. `main` has
            to close whatever must be closed. Any other exception prints its traceback and exits with 1.
    """
    escape_unencodable_characters()
    raise_open_files_limit()
    # Kept alive until the exit: the frames of an error hold generators, and closing one may wait for a thread.
    kept_errors: list[BaseException] = []
    message = ""
    try:
        code = main() or 0
    except BrokenPipeError as error:
        kept_errors.append(error)
        code = EXIT_BROKEN_PIPE
    except (ConfigError, RunError, OSError) as error:
        kept_errors.append(error)
        message = wrapped_lines(f"error: {machine_failure(error) if isinstance(error, OSError) else error}")
        code = EXIT_USER_ERROR if isinstance(error, ConfigError) else 1
    except ReportedElsewhere as error:
        kept_errors.append(error)
        code = error.code
    except KeyboardInterrupt as error:
        kept_errors.append(error)
        message, code = "interrupted", 130
    except Exception as error:
        if not skip_cleanup:
            raise
        kept_errors.append(error)
        message, code = traceback.format_exc().rstrip(), 1
    if not skip_cleanup:
        _print_and_flush(message)
        sys.exit(code)
    printer = threading.Thread(target=_print_and_flush, args=(message,), daemon=True)
    printer.start()
    printer.join(_SECONDS_TO_FLUSH)
    os._exit(code)


def _print_and_flush(message: str) -> None:
    """Prints the final message, if any, to stderr and flushes both streams."""
    if message and sys.stderr is not None:
        with contextlib.suppress(*CONSOLE_ERRORS), above_bars(sys.stderr):
            print(message, file=sys.stderr, flush=True)
    flush_streams()
