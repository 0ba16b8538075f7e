"""Bootstrap intervals over documents: against the analytic standard error, their coverage, and groups of documents.

Run alone: python -m pytest tests/phases/test_bootstrap.py
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_doremi.phases.bootstrap import MAX_GROUPS, RESAMPLES, degrees_of_sum, group_of, interval, resample
from megatron_doremi.student_t import student_t_quantile


def corpus(generator, documents):
    """Sums of losses and targets by document: lengths differ by orders of magnitude, shorter ones are harder."""
    targets = np.maximum(1, np.exp(generator.normal(5.5, 1.0, documents)).round())
    mean = 2.5 + 0.35 * generator.normal(size=documents) - 0.05 * (np.log(targets) - 5.5)
    return targets * mean + 2.5 * np.sqrt(targets) * generator.normal(size=documents), targets


def standard_error(loss, targets):
    """Of the ratio of sums, by its first-order expansion (Cochran 1977, section 2.11)."""
    n, ratio = len(loss), loss.sum() / targets.sum()
    return math.sqrt(n / (n - 1) * ((loss - ratio * targets) ** 2).sum()) / targets.sum()


def grouped(values, groups):
    return np.bincount(groups, values, minlength=MAX_GROUPS)[None, :]


def resampled(loss, targets, name="a"):
    """The loss of each resample, and its interval."""
    drawn = resample([name], loss, targets, targets)
    ratios = (drawn.loss / drawn.targets)[:, 0]
    return ratios, interval(loss.sum() / targets.sum(), ratios, drawn.degrees[0])


def test_resamples_draw_one_less_than_the_documents_with_replacement():
    """Sums of powers of a base tell how often each document was drawn; empty groups are never drawn."""
    n = 5
    loss = np.array([[0.0, *(10.0 ** np.arange(n)), 0.0]])
    targets = (loss > 0).astype(float)
    drawn = resample(["a"], loss, targets, 2 * targets)
    assert drawn.loss.shape == (RESAMPLES, 1)
    assert drawn.degrees.tolist() == [n - 1]
    assert (drawn.targets == n - 1).all()
    assert (drawn.text_bytes == 2 * drawn.targets).all()
    digits = np.array([[int(value) // 10**place % 10 for place in range(n)] for value in drawn.loss[:, 0]])
    assert (digits.sum(axis=1) == n - 1).all()
    # Each document is drawn (n - 1) / n times in the mean, with the variance of a binomial.
    error = math.sqrt((n - 1) / n * (1 - 1 / n) / RESAMPLES)
    assert np.abs(digits.mean(axis=0) - (n - 1) / n).max() < 4 * error


@pytest.mark.parametrize("documents", [30, 900, 30_000])
def test_spread_and_interval_against_the_analytic_standard_error(documents):
    """A spread over r resamples, or g groups, has a relative error of 1 / sqrt(2 r), or 1 / sqrt(2 g)."""
    loss, targets = corpus(np.random.default_rng(documents), documents)
    groups = group_of(np.arange(documents), documents)
    ratios, (low, high) = resampled(grouped(loss, groups), grouped(targets, groups))
    expected = standard_error(loss, targets)
    error = 1 / math.sqrt(2 * RESAMPLES) + (1 / math.sqrt(2 * MAX_GROUPS) if documents > MAX_GROUPS else 0)
    assert ratios.std() == pytest.approx(expected, rel=4 * error)
    assert (high - low) / (2 * student_t_quantile(min(documents, MAX_GROUPS) - 1) * expected) == pytest.approx(
        1, abs=0.2
    )
    assert low < loss.sum() / targets.sum() < high


def test_the_variance_is_right_with_three_documents_too():
    """The ratio is a mean where documents are equally long: of 1, 2 and 6, whose sample variance is 7."""
    ratios, _ = resampled(np.array([[1.0, 2.0, 6.0]]), np.ones((1, 3)))
    assert ratios.std() == pytest.approx(math.sqrt(7 / 3), rel=4 / math.sqrt(2 * RESAMPLES))


@pytest.mark.parametrize(
    ("documents", "expected", "samples"), [(2, 0.87, 300), (5, 0.93, 300), (40, 0.93, 300), (3000, 0.95, 100)]
)
def test_coverage(documents, expected, samples):
    """How often the interval holds the ratio of the population, as the module's text says."""
    loss, targets = corpus(np.random.default_rng(0), 2_000_000)
    truth, covered = loss.sum() / targets.sum(), 0
    groups = group_of(np.arange(documents), documents)
    for sample in range(samples):
        chosen = np.random.default_rng([documents, sample]).integers(0, len(loss), documents)
        sums = grouped(loss[chosen], groups), grouped(targets[chosen], groups)
        _, (low, high) = resampled(*sums, str(sample))
        covered += low <= truth <= high
    assert abs(covered / samples - expected) < 3 * math.sqrt(expected * (1 - expected) / samples)


def test_an_interval_depends_on_the_documents_and_the_name_only():
    generator = np.random.default_rng(2)
    loss, targets = np.stack([corpus(generator, 50)] * 3, axis=1)
    together = resample(["a", "b", "a"], loss, targets, targets).loss
    alone = resample(["b"], loss[1:2], targets[1:2], targets[1:2]).loss
    assert (together[:, 1] == alone[:, 0]).all()
    # Other names draw independently.
    assert abs(np.corrcoef(together[:, 0], together[:, 1])[0, 1]) < 4 / math.sqrt(RESAMPLES)


def test_what_is_unknown_has_no_interval():
    loss = np.array([[0.0, 3.0, 0.0], [0.0, 0.0, 0.0]])
    drawn = resample(["one document", "none"], loss, np.sign(loss), loss)
    assert np.isnan([drawn.loss, drawn.targets, drawn.text_bytes]).all()
    assert drawn.degrees.tolist() == [0, -1]
    assert interval(3.0, drawn.loss[:, 0], 0) is None
    assert interval(1.0, np.array([1.0, math.nan]), 3) is None
    assert interval(1.0, np.array([1.0, math.inf]), 3) is None


def test_an_interval_is_stretched_by_students_t():
    values = np.linspace(1.0, 3.0, 1001)
    low, high = interval(1.5, values, 4)
    stretch = 2.7764 / 1.96
    assert (low, high) == pytest.approx((1.5 - stretch * (1.5 - 1.05), 1.5 + stretch * (2.95 - 1.5)), abs=1e-3)
    ends = [interval(1.5, values, degrees)[1] for degrees in (4 - 1e-12, 4, 4.5, 5)]
    assert ends[0] == pytest.approx(ends[1], rel=1e-9)
    assert ends[1] > ends[2] > ends[3]
    assert interval(1.5, values, 1)[0] == 0.0
    assert interval(2.0, np.full(5, 2.0), 1) == [2.0, 2.0]


def test_degrees_of_a_sum():
    """Equal variances add up their degrees; a domain that has all of the variance has all of the say."""
    terms = np.array([[0.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    assert degrees_of_sum(terms[:, :2], np.array([3, 3])) == pytest.approx(6)
    assert degrees_of_sum(terms, np.array([3, 5, 900])) == pytest.approx(4 / (1 / 3 + 1 / 5))
    assert degrees_of_sum(terms[:, 2:], np.array([900])) == 900
    assert degrees_of_sum(np.array([[0.0, math.nan], [1.0, math.nan]]), np.array([3, 0])) == 1


def test_few_documents_have_a_group_each_and_many_are_spread_evenly():
    assert group_of(np.arange(MAX_GROUPS), MAX_GROUPS).tolist() == list(range(MAX_GROUPS))
    documents = 50 * MAX_GROUPS
    for stride in (1, 2, 7, 64, MAX_GROUPS):
        counts = np.bincount(group_of(np.arange(0, documents * stride, stride), documents * stride))
        assert len(counts) == MAX_GROUPS
        assert 25 <= counts.min() <= counts.max() <= 100
