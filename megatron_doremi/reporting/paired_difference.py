"""The difference between two methods over paired seeds, with its 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_doremi.student_t import student_t_quantile


@dataclass(frozen=True)
class PairedDifference:
    """The differences a - b of n pairs of runs; each pair shares its seed, windows and initial weights.

    Attributes:
        count: n.
        mean: of the differences, in their unit.
        standard_deviation: of one difference, sqrt(sum (d - mean)^2 / (n - 1)); None for n = 1.
        interval: (low, high), 95 %, mean +- t(n - 1) * standard_deviation / sqrt(n) with Student's t; None for n = 1.
            It covers the mean over seeds if differences are normally distributed over seeds.
    """

    count: int
    mean: float
    standard_deviation: float | None
    interval: tuple[float, float] | None

    @property
    def sign(self) -> int:
        """1 or -1 if the interval lies on one side of 0, else 0: no difference can be seen."""
        if self.interval is None:
            return 0
        low, high = self.interval
        return int(low > 0) - int(high < 0)


def paired_difference(a: Sequence[float], b: Sequence[float]) -> PairedDifference:
    """The differences a - b, pair by pair.

    Args:
        a, b: [n] a figure of two methods, in one unit and order of seeds; n >= 1. NaN makes mean and interval NaN.

    Raises:
        ValueError: the lengths differ, or are 0.
    """
    differences = [x - y for x, y in zip(a, b, strict=True)]
    n = len(differences)
    if not n:
        raise ValueError("no pairs")
    mean = math.fsum(differences) / n
    if n == 1:
        return PairedDifference(n, mean, None, None)
    deviation = math.sqrt(math.fsum((each - mean) ** 2 for each in differences) / (n - 1))
    margin = student_t_quantile(n - 1) * deviation / math.sqrt(n)
    return PairedDifference(n, mean, deviation, (mean - margin, mean + margin))
