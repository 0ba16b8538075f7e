"""Fuzzes the resumption of metrics.jsonl and races for the lock of a folder, many times the cases of the suite.

    python tests/soak/outputs.py --times 5

A failure names its seed and case. Five times take a few minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    """Runs the tests with more cases; returns pytest's exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--times", type=int, default=5, help="run this many times the cases of the suite (default: 5)")
    os.environ["MEGATRON_DOREMI_FUZZ"] = str(parser.parse_args().times)
    # The tests read the variable when they are imported.
    import pytest

    tests = ROOT / "tests"
    names = [f"{tests}/phases/test_metrics_file.py"]
    names += [f"{tests}/cluster/test_run_lock.py::test_of_many_contenders_exactly_one_takes_the_lock"]
    return int(pytest.main(["-q", "-x", "-k", "fuzzed or many", *names]))


if __name__ == "__main__":
    sys.exit(main())
