"""The command line of soak tests that read mutated files: takes kinds, cases and seed, prints counts of outcomes."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

Fuzz = Callable[[Path, str, int, int], Mapping[str, int]]


def read_mutations(description: str, kinds: Iterable[str], fuzz: Fuzz) -> None:
    """Prints, for each kind of file that the command line names, how often each answer came.

    Args:
        kinds: all kinds.
        fuzz: (folder, kind, cases, seed) -> {answer: count}; it raises for a wrong answer.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("cases", type=int, nargs="?", default=1000, help="mutations of each kind (default: 1000)")
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(kinds)} (default: all)")
    parser.add_argument("--seed", type=int, default=1, help="(default: 1)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for kind in args.kinds or kinds:
            began = time.monotonic()
            print(f"{kind}, seed {args.seed}: ", end="", flush=True)
            answers = fuzz(Path(folder), kind, args.cases, args.seed)
            counts = ", ".join(f"{count} {answer}" for answer, count in sorted(answers.items()))
            print(f"{args.cases} mutations in {time.monotonic() - began:.1f} s: {counts}", flush=True)
