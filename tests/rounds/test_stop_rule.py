"""When rounds end: the change of a round and its noise, against values computed by hand.

Run alone: python -m pytest tests/rounds/test_stop_rule.py
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_doremi.rounds.stop_rule import movement, noise_of_halves, noise_of_seeds

REFERENCE = np.array([0.5, 0.3, 0.2])


def test_the_change_is_the_largest_difference_from_the_reference():
    moved = movement(REFERENCE, np.array([0.45, 0.3005, 0.2495]), None, "halves", 1e-3)
    assert moved.change == pytest.approx(0.05)
    assert (moved.domain, moved.noise, moved.noise_from, moved.threshold, moved.settled) == (0, None, None, 1e-3, False)
    assert movement(REFERENCE, np.array([0.4995, 0.3, 0.2005]), None, "halves", 1e-3).settled
    moved = movement(REFERENCE, np.array([0.45, 0.3005, 0.2495]), 0.06, "seeds", 1e-3)
    assert (moved.noise_from, moved.threshold, moved.settled) == ("seeds", 0.06, True)


def test_the_noise_of_two_seeds():
    """Of a difference d between two seeds, the mean of both has the standard deviation d / 2, and the difference of two
    such means sqrt(2) times that. Rounds are pooled by their variances."""
    seeds = np.array([[0.40, 0.35, 0.25], [0.44, 0.32, 0.24]])
    assert noise_of_seeds([seeds]) == pytest.approx(0.04 / math.sqrt(2.0))
    other = np.array([[0.4, 0.35, 0.25], [0.4, 0.36, 0.24]])
    assert noise_of_seeds([seeds, other]) == pytest.approx(math.sqrt((0.04**2 + 0.0) / 2 / 2))
    three = np.array([[0.3, 0.7], [0.4, 0.6], [0.5, 0.5]])
    assert noise_of_seeds([three]) == pytest.approx(math.sqrt(2 / 3) * 0.1)


def test_the_noise_of_the_halves_of_a_difference():
    """Both proxies move alike over their steps; only what differs between them is noise."""
    drift = np.linspace(0.0, 0.2, 9)[:, None] * np.array([1.0, -0.5, -0.5])
    before = REFERENCE + drift
    apart = np.repeat([[0.01, -0.01, 0.0], [-0.02, 0.01, 0.01]], [4, 5], axis=0)
    assert noise_of_halves(before + apart, before) == pytest.approx(0.03 / 2)
    assert noise_of_halves(before, before) == pytest.approx(0.0)
    # A proxy that ended early is compared over the steps that both have.
    assert noise_of_halves((before + apart)[:8], before) == pytest.approx(0.03 / 2)


def test_the_noise_has_the_size_of_a_change_that_is_nothing_but_noise():
    """Rounds that differ by autocorrelated noise alone: the noise is about the standard deviation of the change."""
    generator = np.random.default_rng(5)
    changes, noises = [], []
    for _ in range(400):
        walks = np.zeros((2, 400))
        steps = generator.normal(size=(2, 400))
        for t in range(1, 400):
            walks[:, t] = 0.9 * walks[:, t - 1] + steps[:, t]
        now, before = walks[0][:, None], walks[1][:, None]
        changes.append(float((now - before).mean()))
        noises.append(noise_of_halves(now, before))
    assert np.mean(np.square(noises)) == pytest.approx(np.var(changes), rel=0.2)
