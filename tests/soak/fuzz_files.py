"""Reads thousands of mutated files of a data set; see tests/data/file_mutations.py.

    python tests/soak/fuzz_files.py                  # a thousand of each, seed 1
    python tests/soak/fuzz_files.py 5000 --seed 7 "journal bytes"

A failure names kind, seed and number of the mutation, with which it can be repeated.
"""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS / "data")]

from file_mutations import FUZZERS, fuzz
from mutations import read_mutations

if __name__ == "__main__":
    read_mutations(__doc__.split("\n")[0], FUZZERS, fuzz)
