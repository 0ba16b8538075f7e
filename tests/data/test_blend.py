"""The blend: quotas, order and resumption, for any weights, batch size and seed.

Run alone: python -m pytest tests/data/test_blend.py
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_doremi.data.blend import Blend, BlendState, quotas
from megatron_doremi.data.permutation import key_of, permute


def mixtures(max_domains=22):
    return st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=max_domains).map(lambda raw: np.array(raw) / np.sum(raw))


def blend_of(counts, batch_size, seed=7):
    return Blend(tuple(f"domain {i}" for i in range(len(counts))), tuple(counts), batch_size, seed)


@given(st.integers(1, 5000), st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_permutation_takes_every_place_once(size, key):
    assert sorted(permute(np.arange(size), size, key)) == list(range(size))


def test_permutation_is_the_same_on_every_machine():
    """Pinned values: a change of the function would silently reorder every resumed run."""
    assert permute(np.arange(10), 10, key_of(1234, "domain", "Books", 0)).tolist() == [
        0,
        5,
        9,
        3,
        7,
        2,
        6,
        4,
        8,
        1,
    ]
    assert permute(np.array([0, 10**12 - 1]), 10**12, 42).tolist() == [798054005900, 321902284151]


def test_permutation_mixes():
    """Neighbors do not stay neighbors, and other keys give other orders."""
    order = permute(np.arange(10_000), 10_000, 1)
    assert np.mean(np.abs(np.diff(order)) <= 10) < 0.01
    assert abs(np.corrcoef(np.arange(10_000), order)[0, 1]) < 0.05
    assert np.mean(order == permute(np.arange(10_000), 10_000, 2)) < 0.01


@given(mixtures(), st.integers(1, 64), st.integers(1, 60))
@settings(max_examples=150, deadline=None)
def test_quotas_follow_the_weights(weights, batch_size, steps):
    """Each batch holds floor or ceil of a share; the total stays within a window of the exact share."""
    credits, total = np.zeros(len(weights)), np.zeros(len(weights))
    for step in range(1, steps + 1):
        counts, credits = quotas(weights, credits, batch_size)
        shares = batch_size * weights
        assert counts.sum() == batch_size
        assert (counts >= np.floor(shares + 1e-9)).all()
        assert (counts <= np.ceil(shares - 1e-9)).all()
        total += counts
        assert np.abs(total - step * shares).max() < 1.0
    assert np.abs(credits - (steps * batch_size * weights - total)).max() < 1e-9


@given(st.lists(mixtures(8), min_size=2, max_size=12), st.integers(1, 32))
@settings(max_examples=80, deadline=None)
def test_quotas_under_changing_weights_lose_nothing(mixes, batch_size):
    """Weights that change every step: all windows handed out, credits bounded, none for a weight of zero."""
    k = min(len(m) for m in mixes)
    credits = np.zeros(k)
    for mix in mixes:
        weights = mix[:k] / mix[:k].sum()
        counts, credits = quotas(weights, credits, batch_size)
        assert counts.sum() == batch_size
        assert abs(credits.sum()) < 1e-6
        assert np.abs(credits).max() < len(mixes)


def test_a_weight_of_zero_gets_nothing():
    counts, _ = quotas(np.array([0.5, 0.0, 0.5]), np.array([0.0, 0.9, 0.0]), 5)
    assert counts[1] == 0


def test_uniform_22_domains_into_16_windows():
    """More domains than windows: none is absent for more than two batches."""
    credits, gaps = np.zeros(22), np.zeros(22)
    for _ in range(200):
        counts, credits = quotas(np.full(22, 1 / 22), credits, 16)
        assert counts.max() == 1
        gaps = np.where(counts > 0, 0, gaps + 1)
        assert gaps.max() <= 1


def test_each_window_once_an_epoch():
    blend, state = blend_of([7, 12], batch_size=4), BlendState.start(2)
    seen = {0: [], 1: []}
    for _ in range(60):
        batch, state = blend.next_batch(state, np.array([0.3, 0.7]))
        for domain, window in zip(batch.domains, batch.windows, strict=True):
            seen[domain].append(window)
    # Within a batch windows are shuffled, so epochs are told apart by the cursor, not by the batch's order.
    for domain, size in ((0, 7), (1, 12)):
        ordered = blend.windows_at(domain, 0, len(seen[domain]))
        assert sorted(ordered.tolist()) == sorted(seen[domain])
        for epoch in range(len(ordered) // size):
            assert sorted(ordered[epoch * size : (epoch + 1) * size]) == list(range(size))
    assert blend.windows_at(0, 0, 7).tolist() != blend.windows_at(0, 7, 7).tolist()


def test_resume_from_json_at_any_step():
    blend, weights = blend_of([50, 60, 70], 8), np.array([0.2, 0.3, 0.5])
    states, batches, state = [], [], BlendState.start(3)
    for _ in range(20):
        states.append(state)
        batch, state = blend.next_batch(state, weights)
        batches.append(batch)
    for at in (0, 7, 19):
        entry = json.loads(json.dumps(states[at].to_dict(blend.names)))
        again = BlendState.from_dict(entry, blend.names)
        for batch in batches[at:]:
            repeated, again = blend.next_batch(again, weights)
            assert repeated.domains.tolist() == batch.domains.tolist()
            assert repeated.windows.tolist() == batch.windows.tolist()


def test_a_domain_keeps_its_order_when_others_come_and_go():
    one = blend_of([40, 40], 4)
    other = Blend(("new", "domain 1", "domain 0"), (9, 40, 40), 4, 7)
    assert one.windows_at(0, 0, 80).tolist() == other.windows_at(2, 0, 80).tolist()


def test_a_missing_domain_in_a_state_is_an_error():
    with pytest.raises(KeyError):
        BlendState.from_dict(BlendState.start(1).to_dict(["a"]), ["b"])
