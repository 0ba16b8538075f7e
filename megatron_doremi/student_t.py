"""Quantiles of Student's t distribution, for intervals of means of few values."""

from __future__ import annotations

import math
from functools import lru_cache

CONFIDENCE = 0.95


@lru_cache(maxsize=4096)
def student_t_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """The t > 0 with P(|T| <= t) = `confidence` for Student's distribution with `degrees` >= 1 degrees of freedom."""
    low, high = 0.0, math.pi / 2
    for _ in range(52):
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
