"""Reads thousands of mutated files of a data set; see tests/data/file_mutations.py.

    python tests/soak/fuzz_files.py                  # a thousand of each, seed 1
    python tests/soak/fuzz_files.py 5000 --seed 7 "journal bytes"

A failure names kind, seed and number of the mutation, with which it comes again.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS / "data")]

from file_mutations import FUZZERS, fuzz


def main() -> None:
    """Prints how often each answer came."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("cases", type=int, nargs="?", default=1000, help="of each kind (default: 1000)")
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(FUZZERS)} (default: all)")
    parser.add_argument("--seed", type=int, default=1, help="(default: 1)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name in args.kinds or FUZZERS:
            began = time.monotonic()
            print(f"{name}, seed {args.seed}: ", end="", flush=True)
            answers = fuzz(Path(folder), name, args.cases, args.seed)
            said = ", ".join(f"{count} {answer}" for answer, count in sorted(answers.items()))
            print(f"{args.cases} mutations in {time.monotonic() - began:.1f} s: {said}", flush=True)


if __name__ == "__main__":
    main()
