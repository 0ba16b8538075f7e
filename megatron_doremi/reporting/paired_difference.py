"""The difference between two methods over paired seeds, with its 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


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


def student_t_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """The t > 0 with P(|T| <= t) = `confidence` for Student's distribution with `degrees` >= 1 degrees of freedom."""
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        if _central_probability(middle, degrees) < confidence:
            low = middle
        else:
            high = middle
    return math.tan(low) * math.sqrt(degrees)


def _central_probability(angle: float, degrees: int) -> float:
    """P(|T| <= t) at t = tan(angle) * sqrt(degrees) (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    # The series has the powers of the cosine from `odd` to degrees - 2, each by two.
    term, total = cosine**odd, 0.0
    for power in range(odd, degrees - 1, 2):
        total += term
        term *= cosine**2 * (power + 1) / (power + 2)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
