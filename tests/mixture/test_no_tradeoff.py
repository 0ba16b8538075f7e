"""examples/no_tradeoff.py: the closed form against the paper's figures and against drawn samples.

Run alone: python -m pytest tests/mixture/test_no_tradeoff.py
"""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest

EXAMPLE = runpy.run_path(str(Path(__file__).resolve().parents[2] / "examples" / "no_tradeoff.py"))


@pytest.mark.parametrize(
    ("weights", "expected"),
    [([1 / 3] * 3, [2.371e-5, 0.002735, 0.003952]), ([0.39, 0.61, 0.0], [1.735e-5, 0.001501, 0.0])],
)
def test_the_closed_form_is_the_papers(weights, expected):
    errors = EXAMPLE["expected_error"](EXAMPLE["DOMAINS"], 500 * np.array(weights))
    assert errors.tolist() == pytest.approx(expected, rel=1e-3)


def test_the_closed_form_is_the_mean_of_drawn_errors():
    """20,000 samples of 30 tokens: the standard error is below 2 % of each mean."""
    generator, domains = np.random.default_rng(3), EXAMPLE["DOMAINS"]
    for domain, expected in zip(domains, EXAMPLE["expected_error"](domains, np.full(3, 30)), strict=True):
        counts = generator.multinomial(30, domain, size=20_000)
        errors = (((1 / 3 + counts) / 31 - domain) ** 2).sum(axis=1)
        assert errors.mean() == pytest.approx(expected, rel=0.03)


def test_the_simulation_spends_its_tokens_and_follows_from_its_seed():
    weights = EXAMPLE["simulate"](1, steps=60)
    assert weights.sum() == pytest.approx(1.0)
    assert weights.tolist() == EXAMPLE["simulate"](1, steps=60).tolist() != EXAMPLE["simulate"](2, steps=60).tolist()
