"""Mutates every file of recorded losses a thousand times: reads give right losses or a ConfigError, no traceback.

    python tests/soak/fuzz_losses.py --cases 1000 --seed 0

A failure names its seed; about a minute for a thousand cases.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from data.fuzz_losses import TARGETS, fuzz


def main() -> None:
    """Runs all targets with the seeds of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", type=int, default=1000, help="mutations of each file (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    args = parser.parse_args()
    for file, old, way in TARGETS:
        with tempfile.TemporaryDirectory() as folder:
            print(f"{file}, {'version 0.1, ' if old else ''}{way}, seed {args.seed}: ", end="", flush=True)
            print(f"{fuzz(Path(folder), file, old, way, args.cases, args.seed)} of {args.cases} refused")


if __name__ == "__main__":
    main()
