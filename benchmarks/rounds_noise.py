"""Which noise of the weights rounds of DoReMi should end by: estimates from one or two proxies, against other seeds.

    python benchmarks/rounds_noise.py PROXY PROXY...

The proxies differ in their seed alone. Prints the mean over all pairs of the largest difference of a weight, which is
what a round changes by noise; what two halves of a single proxy say (mean over proxies); and what two halves of the
difference of a pair say (`noise_of_halves` in megatron_doremi/rounds/stop_rule.py, mean over pairs).
"""

from __future__ import annotations

import argparse
import math
import sys
from itertools import combinations
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_doremi.reporting.runs import read_run
from megatron_doremi.rounds.stop_rule import noise_of_halves


def main() -> None:
    """Reads the proxies and prints the three figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("proxies", nargs="+", type=Path, metavar="PROXY", help="--save folder of a proxy; at least two")
    paths = parser.parse_args().proxies
    if len(paths) < 2:
        raise SystemExit("error: give at least two proxies, of different seeds")
    runs = [read_run(path, "PROXY") for path in paths]
    weights = [run.weights.ordered(runs[0].weights.names) for run in runs]
    count = min(map(len, weights))
    weights = [each[:count] for each in weights]
    pairs = list(combinations(weights, 2))
    change = np.mean([np.abs(a.mean(axis=0) - b.mean(axis=0)).max() for a, b in pairs])
    # As a difference of two proxies: the halves' means have twice the variance of a proxy's mean.
    single = [
        np.abs(each[: count // 2].mean(0) - each[count // 2 :].mean(0)).max() / math.sqrt(2.0) for each in weights
    ]
    paired = [noise_of_halves(a, b) for a, b in pairs]
    print(
        f"{len(runs)} proxies, {count:,} steps, {weights[0].shape[1]} domains: between seeds {change:.4f}, halves of "
        f"one proxy {np.mean(single):.4f}, halves of the difference {np.mean(paired):.4f}"
    )


if __name__ == "__main__":
    main()
