"""Paired differences over seeds, by hand, and Student's t against a printed table.

Run alone: python -m pytest tests/reporting/test_paired_difference.py
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_doremi.reporting.paired_difference import paired_difference
from megatron_doremi.student_t import student_t_quantile


@pytest.mark.parametrize(
    ("degrees", "t"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706), (6, 2.4469), (7, 2.3646), (9, 2.2622)]
    + [(10, 2.2281), (29, 2.0452), (30, 2.0423), (1000, 1.9623)],
)
def test_students_t_against_a_printed_table(degrees, t):
    assert student_t_quantile(degrees) == pytest.approx(t, abs=5e-5)


def test_another_confidence():
    assert student_t_quantile(4, 0.99) == pytest.approx(4.6041, abs=5e-5)


def test_by_hand():
    """Differences -1, -2, -3: mean -2, standard deviation 1."""
    result = paired_difference([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    assert (result.count, result.mean, result.standard_deviation) == (3, -2.0, 1.0)
    # With two degrees of freedom P(|T| <= t) = t / sqrt(2 + t^2).
    margin = math.sqrt(2 * 0.95**2 / (1 - 0.95**2)) / math.sqrt(3)
    assert result.interval == pytest.approx((-2 - margin, -2 + margin), rel=1e-12)
    assert result.sign == 0
    assert paired_difference([3.0, 3.1], [1.0, 1.1]).sign == 1
    assert paired_difference([1.0, 1.1, 1.3], [2.0, 2.0, 2.0]).sign == -1
    assert paired_difference([1.0, 1.0], [1.0, 1.0]).sign == 0


def test_one_pair_has_no_interval():
    result = paired_difference([1.0], [0.5])
    assert (result.mean, result.standard_deviation, result.interval, result.sign) == (0.5, None, None, 0)


def test_pairs_must_match():
    with pytest.raises(ValueError, match="shorter"):
        paired_difference([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="no pairs"):
        paired_difference([], [])


def test_nan_is_never_a_difference():
    result = paired_difference([1.0, math.nan], [0.0, 0.0])
    assert math.isnan(result.mean)
    assert result.sign == 0


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_interval_covers_the_mean_of_normal_differences(n):
    """95 % of 2,000 draws, within four standard errors of that share."""
    draws = np.random.default_rng(1).normal(0.3, 2.0, (2000, n))
    covered = [low <= 0.3 <= high for low, high in (paired_difference(d, [0.0] * n).interval for d in draws.tolist())]
    assert abs(np.mean(covered) - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 2000)
