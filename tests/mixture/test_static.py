"""Static mixtures against values computed by hand.

Run alone: python -m pytest tests/mixture/test_static.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_doremi.data.manifest import Domain, Manifest
from megatron_doremi.errors import ConfigError
from megatron_doremi.mixture.static import (
    Budget,
    StaticMixture,
    resolve_weights,
    temperature_weights,
    unimax_weights,
)


def manifest(*tokens: int) -> Manifest:
    domains = (Domain(f"domain {i}", Path(f"d{i}"), None, n, 1, n) for i, n in enumerate(tokens))
    return Manifest(tuple(domains), None, Path("domains.json"))


def test_temperatures_by_hand():
    """Roots of 1, 16 and 81: at T = 4 they are 1, 2 and 3, at T = 2 they are 1, 4 and 9."""
    assert temperature_weights([1, 16, 81], 4.0).tolist() == pytest.approx([1 / 6, 2 / 6, 3 / 6], abs=1e-15)
    assert temperature_weights([1, 16, 81], 2.0).tolist() == pytest.approx([1 / 14, 4 / 14, 9 / 14], abs=1e-15)
    assert temperature_weights([1, 16, 81], 1.0).tolist() == pytest.approx([1 / 98, 16 / 98, 81 / 98], abs=1e-15)
    # Flat at the end; and N^(1/T) far above the largest float64.
    assert temperature_weights([10, 10**12, 10**6], 1e9).tolist() == pytest.approx([1 / 3] * 3, abs=1e-7)
    assert temperature_weights([10**12, 10**12], 1e-3).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("temperature", ["1e-3", "5e-324"])
def test_a_temperature_that_leaves_nothing_to_a_domain_is_refused(temperature):
    """The smallest float gave weights of NaN, which a run took."""
    with pytest.raises(ConfigError, match="give a larger T"):
        resolve_weights(f"temperature:{temperature}", manifest(10, 1000))


@pytest.mark.parametrize(
    ("budget", "max_epochs", "expected"),
    [
        # No cap binds: 30 for each of three domains.
        (90, 1.0, [1 / 3, 1 / 3, 1 / 3]),
        # The smallest gives all of its 40; the others share the 260 that are left.
        (300, 1.0, [130 / 300, 40 / 300, 130 / 300]),
        # 40 and 200 of the two smaller ones, 360 of the largest, which has 1,000.
        (600, 1.0, [360 / 600, 40 / 600, 200 / 600]),
        # Twice over: 80, 400 and the rest of 1,480.
        (1480, 2.0, [1000 / 1480, 80 / 1480, 400 / 1480]),
        # Every cap binds.
        (1240, 1.0, [1000 / 1240, 40 / 1240, 200 / 1240]),
    ],
)
def test_unimax_by_hand(budget, max_epochs, expected):
    weights = unimax_weights(Budget(budget, [1000, 40, 200], max_epochs))
    assert weights.tolist() == pytest.approx(expected, abs=1e-15)
    assert weights.sum() == pytest.approx(1.0, abs=1e-15)


def test_unimax_serves_domains_of_the_same_size_alike():
    assert unimax_weights(Budget(500, [100, 400, 100], 1.0)).tolist() == pytest.approx([0.2, 0.6, 0.2], abs=1e-15)


def test_a_budget_that_no_cap_can_fill_is_a_fault():
    with pytest.raises(ValueError, match="less than the budget"):
        unimax_weights(Budget(1241, [1000, 40, 200], 1.0))
    with pytest.raises(ConfigError) as error:
        resolve_weights("unimax", manifest(1000, 40, 200), False, budget=Budget(2481, [1000, 40, 200], 2.0))
    (fault,) = error.value.faults
    assert "2,480 tokens in 2 epochs" in fault.value
    assert "2,481" in fault.rule
    assert "--max-epochs-per-domain" in fault.remedy


def test_settings_that_are_resolved():
    sizes = manifest(1, 16, 81)
    assert resolve_weights("uniform", sizes, False).tolist() == [1 / 3] * 3
    assert resolve_weights("natural", sizes, False).tolist() == [1 / 98, 16 / 98, 81 / 98]
    assert resolve_weights("temperature:4", sizes, False).tolist() == pytest.approx([1 / 6, 2 / 6, 3 / 6], abs=1e-15)
    unimax = resolve_weights("unimax", sizes, False, budget=Budget(90, [1000, 40, 200], 1.0))
    assert unimax.tolist() == [1 / 3] * 3


@pytest.mark.parametrize(
    ("setting", "rule"),
    [
        ("temperature:", "T above 0"),
        ("temperature:0", "T above 0"),
        ("temperature:-2", "T above 0"),
        ("temperature:nan", "T above 0"),
        ("temperature:inf", "T above 0"),
        ("temperature:hot", "T above 0"),
        # A share of 1e-24.
        ("temperature:0.25", "shares of at least"),
        ("temperature:1e-300", "a small T gives the largest domains everything"),
        ("unimax", "a cap"),
        ("given", "weight prefix"),
    ],
)
def test_settings_that_are_faults(setting, rule):
    with pytest.raises(ConfigError) as error:
        resolve_weights(setting, manifest(1, 10**6), False)
    (fault,) = error.value.faults
    assert rule in fault.rule


def test_a_static_mixture_is_a_controller():
    weights = temperature_weights([1, 16, 81], 4.0)
    mixture = StaticMixture(weights)
    assert mixture.sampling_weights(1).tolist() == mixture.sampling_weights(10**6).tolist() == weights.tolist()
    assert mixture.loss_weights() is None
    assert (mixture.learns, mixture.needs_reference, mixture.before_backward) == (False, False, False)
    assert mixture.samples_ahead
