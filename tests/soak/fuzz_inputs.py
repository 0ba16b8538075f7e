"""Reads thousands of mutated input files of each format; see tests/preprocessing/test_fuzz_inputs.py.

    python tests/soak/fuzz_inputs.py                  # a thousand of each, seed 1
    python tests/soak/fuzz_inputs.py 5000 --seed 7 parquet

A failure names format, seed and number of the mutation, with which it can be repeated.
"""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "data"), str(TESTS / "preprocessing")]

from input_mutations import FILES, fuzz
from mutations import read_mutations

if __name__ == "__main__":
    read_mutations(__doc__.split("\n")[0], FILES, fuzz)
