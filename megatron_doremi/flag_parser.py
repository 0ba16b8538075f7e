"""The command-line parser of every program: it collects faults instead of exiting at the first, and suggests flags."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from megatron_doremi.errors import Fault, raise_if_any
from megatron_doremi.version import version_text


class _Version(argparse.Action):
    """Prints the versions and exits."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(version_text(), flush=True)
        parser.exit()


class FlagParser(argparse.ArgumentParser):
    """A parser with --version, whose `parse_args` raises ConfigError, and `parse_known_args` argparse.ArgumentError."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        help_text = "print the versions and exit"
        self.add_argument("--version", action=_Version, nargs=0, default=argparse.SUPPRESS, help=help_text)

    def error(self, message: str) -> NoReturn:
        raise argparse.ArgumentError(None, message)

    def _print_message(self, message: str, file: Any = None) -> None:
        # argparse's own hides that nothing can be written.
        print(message, end="", file=file or sys.stdout, flush=True)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> argparse.Namespace:
        """Parses a command line; None takes that of the program. Raises ConfigError with every unknown flag, or with
        the first other error."""
        argv = sys.argv[1:] if args is None else list(args)
        faults: list[Fault] = []
        known, unknown = namespace, []
        flags = self.flags(argv)
        try:
            known, unknown = self.parse_known_args(argv, namespace)
        except argparse.ArgumentError as error:
            # A misspelled flag may be why another one is missing.
            unknown = [word for word in argv if word.startswith("--") and word.split("=")[0] not in flags]
            if not unknown:
                faults.append(Fault("command line", str(error), "each flag with its value", "see --help"))
        raise_if_any(faults + unknown_faults(unknown, flags))
        return known

    def flags(self, argv: Sequence[str]) -> list[str]:
        """The flags of this parser and of the subcommand that the command line names."""
        flags: list[str] = []
        for action in self._actions:
            flags += action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                chosen = [parser for name, parser in action.choices.items() if name in argv]
                flags += [flag for parser in chosen for each in parser._actions for flag in each.option_strings]
        return [flag for flag in flags if flag.startswith("--")]


def unknown_faults(unknown: Sequence[str], flags: Sequence[str]) -> list[Fault]:
    """A fault for each word that a parser does not know, with the flag that it may be meant to be.

    Args:
        unknown: the words, in their order.
        flags: the flags of the program.
    """
    faults = []
    previous = ""
    for word in unknown:
        # The value that follows an unknown flag is part of the same fault.
        if word.startswith("-") or not previous.startswith("-"):
            near = difflib.get_close_matches(word.split("=")[0], flags, n=1)
            remedy = f"did you mean {near[0]}?" if near else "see --help for all flags"
            rule = "a flag of this version" if word.startswith("-") else "each value follows its flag"
            faults.append(Fault("command line", word, rule, remedy))
        previous = word
    return faults
