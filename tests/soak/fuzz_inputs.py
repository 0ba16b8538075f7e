"""Reads thousands of mutated input files of each format; see tests/preprocessing/test_fuzz_inputs.py.

    python tests/soak/fuzz_inputs.py                  # a thousand of each, seed 0
    python tests/soak/fuzz_inputs.py 5000 --seed 7 parquet

A failure names format, seed and number of the mutation, with which it comes again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "data")]

from input_mutations import FILES, fuzz


def main() -> None:
    """Prints how often each answer came."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("cases", type=int, nargs="?", default=1000, help="of each format (default: 1000)")
    parser.add_argument("formats", nargs="*", metavar="FORMAT", help=f"of {', '.join(FILES)} (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in args.formats or FILES:
            began = time.monotonic()
            print(f"{name}, seed {args.seed}: ", end="", flush=True)
            answers = fuzz(Path(folder), name, args.cases, args.seed)
            said = ", ".join(f"{count} {answer}" for answer, count in sorted(answers.items()))
            print(f"{args.cases} mutations in {time.monotonic() - began:.1f} s: {said}", flush=True)


if __name__ == "__main__":
    main()
