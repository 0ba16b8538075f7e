"""Group DRO against values computed by hand and against Algorithm 1 in plain Python.

Run alone: python -m pytest tests/mixture/test_domain_weights.py
"""

from __future__ import annotations

import math

import pytest
import torch

from megatron_doremi.mixture.group_dro import DomainWeights, token_scores
from megatron_doremi.mixture.statistics import (
    batch_coefficients,
    domain_coefficients,
    domain_stats,
    weighted_loss,
)


def scored(loss, domains, k, reference=None, objective="excess"):
    """Per-domain sums of token losses, scored as in Group DRO."""
    return domain_stats(loss, domains, k, token_scores(loss.double(), reference, objective))


def step(state: DomainWeights, excess: list[float], targets: list[float], eta=1.0, c=1e-3) -> DomainWeights:
    """An update from per-domain means and counts."""
    sums = [e * t for e, t in zip(excess, targets, strict=True)]
    return state.update(torch.tensor(sums, dtype=torch.float64), torch.tensor(targets, dtype=torch.float64), eta, c)


def test_three_domains_three_steps_by_hand():
    """eta = log 2 and excesses of 0 and 1 make every factor 1 or 2; c = 0.1 keeps the fractions short.

    Step 1: lambda (1, 0, 1):  alpha' (2, 1, 2)/3   -> (2/5, 1/5, 2/5) -> * .9 + .1/3
    Step 2: lambda (0, 1, -):  the third domain is absent and keeps its 1.
    Step 3: lambda (0, 0, 0):  nothing but the smoothing moves.
    """
    eta, c = math.log(2.0), 0.1
    floor = 0.1 / 3
    state = DomainWeights.start(3)
    assert state.weights.tolist() == [1 / 3] * 3

    state = step(state, [1.0, 0.0, 1.0], [10, 10, 10], eta, c)
    first = [0.36 + floor, 0.18 + floor, 0.36 + floor]
    assert state.weights.tolist() == pytest.approx(first, abs=1e-15)

    state = step(state, [0.0, 1.0, 0.0], [10, 10, 0], eta, c)
    assert state.excess.tolist() == [0.0, 1.0, 1.0]
    a, b, d = first[0], 2 * first[1], 2 * first[2]
    total = a + b + d
    second = [0.9 * a / total + floor, 0.9 * b / total + floor, 0.9 * d / total + floor]
    assert state.weights.tolist() == pytest.approx(second, abs=1e-15)
    # The same by hand in decimals: a = .393333, b = .426667, d = .786667, total 1.606667.
    assert state.weights.tolist() == pytest.approx([0.25366528, 0.27233748, 0.47399723], abs=1e-8)

    state = step(state, [0.0, 0.0, 0.0], [10, 10, 10], eta, c)
    third = [0.9 * x + floor for x in second]
    assert state.weights.tolist() == pytest.approx(third, abs=1e-15)

    mean = [(x + y + z) / 3 for x, y, z in zip(first, second, third, strict=True)]
    assert state.mean().tolist() == pytest.approx(mean, abs=1e-15)
    assert state.steps == 3


def test_five_domains_three_steps_from_token_losses():
    """Starts from token losses of five domains: the fifth is absent at first, the second beats the reference."""
    # Two targets a window; windows of domains 0, 1, 2, 3 in the first batch.
    proxy = torch.tensor([[3.0, 1.0], [1.0, 1.0], [2.0, 2.0], [5.0, 1.0]])
    reference = torch.tensor([[2.0, 2.0], [2.0, 3.0], [2.0, 2.0], [3.0, 2.0]])
    sums = scored(proxy, torch.tensor([0, 1, 2, 3]), 5, reference)
    # Clipped per token: domain 0 has (1, -1) -> 1; domain 1 (-1, -2) -> 0; domain 2 0; domain 3 (2, -1) -> 2.
    assert sums.score.tolist() == [1.0, 0.0, 0.0, 2.0, 0.0]
    assert sums.loss.tolist() == [4.0, 2.0, 4.0, 6.0, 0.0]
    assert sums.targets.tolist() == [2, 2, 2, 2, 0]

    c, k = 0.05, 5
    state = DomainWeights.start(k).update(sums.score, sums.targets, 1.0, c)
    lam = [0.5, 0.0, 0.0, 1.0, 0.0]
    alpha = algorithm_1([0.2] * k, lam, 1.0, c)
    assert state.weights.tolist() == pytest.approx(alpha, abs=1e-15)
    # e^.5 = 1.648721, e = 2.718282, total 7.367003: .95 * 1.648721 / 7.367003 + .01 = .222608, ...
    decimals = [0.22260819, 0.13895339, 0.13895339, 0.36053165, 0.13895339]
    assert state.weights.tolist() == pytest.approx(decimals, abs=1e-7)

    # Second batch: only domains 1 and 4, domain 1 behind the reference by 2 on one of its two targets.
    sums = scored(
        torch.tensor([[4.0, 0.0], [7.0, 5.0]]),
        torch.tensor([1, 4]),
        5,
        torch.tensor([[2.0, 1.0], [6.0, 5.0]]),
    )
    state = state.update(sums.score, sums.targets, 1.0, c)
    lam = [0.5, 1.0, 0.0, 1.0, 0.5]
    alpha2 = algorithm_1(alpha, lam, 1.0, c)
    assert state.excess.tolist() == lam
    assert state.weights.tolist() == pytest.approx(alpha2, abs=1e-15)

    # Third batch: all domains level with or ahead of the reference.
    sums = scored(torch.ones(5, 2), torch.arange(5), 5, torch.full((5, 2), 1.5))
    state = state.update(sums.score, sums.targets, 1.0, c)
    alpha3 = algorithm_1(alpha2, [0.0] * 5, 1.0, c)
    assert state.weights.tolist() == pytest.approx(alpha3, abs=1e-15)
    assert state.mean().tolist() == pytest.approx(
        [sum(v) / 3 for v in zip(alpha, alpha2, alpha3, strict=True)], abs=1e-15
    )


def algorithm_1(alpha: list[float], excess: list[float], eta: float, c: float) -> list[float]:
    """Lines 6 to 8 of Algorithm 1, without logarithms."""
    raised = [a * math.exp(eta * x) for a, x in zip(alpha, excess, strict=True)]
    return [(1 - c) * r / sum(raised) + c / len(alpha) for r in raised]


def test_absent_from_the_start_counts_as_no_excess():
    state = step(DomainWeights.start(2), [0.0, 3.0], [0, 5])
    assert state.excess.tolist() == [0.0, 3.0]
    assert state.weights.tolist() == pytest.approx(algorithm_1([0.5, 0.5], [0.0, 3.0], 1.0, 1e-3), abs=1e-15)


def test_weights_keep_their_floor_and_sum_to_one_through_huge_excesses():
    state = DomainWeights.start(22)
    for _ in range(50):
        state = step(state, [800.0] + [0.0] * 21, [1.0] * 22)
    assert torch.isfinite(state.weights).all()
    assert state.weights.sum().item() == pytest.approx(1.0, abs=1e-14)
    assert state.weights[1:].tolist() == pytest.approx([1e-3 / 22] * 21, rel=1e-9)


def test_state_survives_json_to_the_bit():
    import json

    state = step(step(DomainWeights.start(3), [0.1, 0.2, 0.3], [3, 3, 3]), [0.7, 0.0, 0.1], [1, 1, 1])
    entry = json.loads(json.dumps(state.to_dict(["a", "b", "c"])))
    again = DomainWeights.from_dict(entry, ["a", "b", "c"], "cpu")
    assert again.weights.tolist() == state.weights.tolist()
    assert again.weight_sum.tolist() == state.weight_sum.tolist()
    assert again.excess.tolist() == state.excess.tolist()
    # By name, not by place: another order of domains gives each its own weight.
    turned = DomainWeights.from_dict(entry, ["c", "a", "b"], "cpu")
    assert turned.weights.tolist() == [state.weights[i].item() for i in (2, 0, 1)]


def test_padding_counts_for_nothing():
    sums = domain_stats(torch.tensor([[1.0], [9.0]]), torch.tensor([0, -1]), 2)
    assert sums.loss.tolist() == [1.0, 0.0]
    assert sums.targets.tolist() == [1.0, 0.0]


def test_objective_and_its_gradient_by_hand():
    """J = sum_i alpha_i * mean_i, with unequal numbers of windows, in two micro-batches on one rank."""
    losses = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], requires_grad=True)
    domains = torch.tensor([0, 0, 1])
    weights = torch.tensor([0.25, 0.75], dtype=torch.float64)
    sums = domain_stats(losses, domains, 2)
    coefficients = domain_coefficients(weights, sums.targets, accumulation=2)
    total = sum(weighted_loss(losses[part], domains[part], coefficients) / 2 for part in (slice(0, 1), slice(1, 3)))
    total.backward()
    # Means 2.5 and 5.5.
    assert total.item() == pytest.approx(0.25 * 2.5 + 0.75 * 5.5)
    assert losses.grad.tolist() == [[0.0625, 0.0625], [0.0625, 0.0625], [0.375, 0.375]]


def test_an_absent_domain_has_no_coefficient():
    coefficients = domain_coefficients(
        torch.tensor([0.5, 0.5], dtype=torch.float64), torch.tensor([4.0, 0.0], dtype=torch.float64), 1
    )
    assert coefficients.tolist() == [0.125, 0.0]


def test_objectives_of_the_ablation_by_hand():
    """hardest uses only the proxy's loss; easiest only the reference's loss, negated and not clipped."""
    proxy, reference = torch.tensor([[3.0, 1.0], [2.0, 4.0]]), torch.tensor([[2.0, 2.0], [5.0, 1.0]])
    domains = torch.tensor([0, 1])
    assert scored(proxy, domains, 2, reference, "excess").score.tolist() == [1.0, 3.0]
    assert scored(proxy, domains, 2, reference, "hardest").score.tolist() == [4.0, 6.0]
    assert scored(proxy, domains, 2, None, "hardest").score.tolist() == [4.0, 6.0]
    assert scored(proxy, domains, 2, reference, "easiest").score.tolist() == [-4.0, -6.0]
    # Two targets each: lambda (-2, -3), so the domain that is easier for the reference gains.
    state = DomainWeights.start(2).update(torch.tensor([-4.0, -6.0]), torch.tensor([2.0, 2.0]), 1.0, 0.0)
    assert state.weights.tolist() == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))], abs=1e-7)


def test_the_authors_normalization_by_hand():
    """sum_i w_i L_i / sum_j w_j n_j, w proportional to alpha / q."""
    weights = torch.tensor([0.25, 0.75], dtype=torch.float64)
    targets = torch.tensor([4.0, 2.0], dtype=torch.float64)
    uniform = torch.tensor([0.5, 0.5], dtype=torch.float64)
    # 1 / (.25 * 4 + .75 * 2) = .4
    assert batch_coefficients(weights, targets, uniform, 1).tolist() == pytest.approx([0.1, 0.3])
    assert batch_coefficients(weights, targets, uniform, 3).tolist() == pytest.approx([0.3, 0.9])
    # Sampled in proportion to its weights, the mixture needs no weighing: the plain mean over six tokens.
    assert batch_coefficients(weights, targets, weights, 1).tolist() == pytest.approx([1 / 6, 1 / 6])
    # With equal targets a domain it is the paper's objective.
    equal = torch.tensor([3.0, 3.0], dtype=torch.float64)
    assert torch.allclose(batch_coefficients(weights, equal, uniform, 1), domain_coefficients(weights, equal, 1))
    absent = torch.tensor([4.0, 0.0], dtype=torch.float64)
    assert batch_coefficients(weights, absent, uniform, 1).tolist() == pytest.approx([0.25, 0.0])
