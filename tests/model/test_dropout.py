"""Masks of dropout: their share, their independence of layer, site, head and place, and what recomputation sees.

Run alone: python -m pytest tests/model/test_dropout.py
"""

from __future__ import annotations

import itertools

import pytest
import torch
from engines import small_gpt

from megatron_doremi.execution import Execution
from megatron_doremi.model.dropout import (
    AFTER_ATTENTION,
    AFTER_MLP,
    drop_hidden,
    drop_probabilities,
    kept,
    layer_keys,
    mix,
)
from megatron_doremi.model.unpipelined import GPTModel
from megatron_doremi.parallel.context import unsharded

KEYS = torch.tensor([0, 1, 2**32 - 1])


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_the_share_that_is_kept_over_rows_columns_and_windows(rate):
    keep = kept(mix(KEYS), torch.arange(512), torch.arange(384), rate).double()
    for dims, count in (((1, 2), 512 * 384), ((0, 2), 3 * 384), ((0, 1), 3 * 512)):
        # Six standard deviations of a binomial: of 900 shares one lies outside with probability 2e-6.
        assert (keep.mean(dims) - (1 - rate)).abs().max() < 6 * (rate * (1 - rate) / count) ** 0.5


def test_masks_of_windows_layers_sites_heads_places_are_independent():
    """Pairs of masks agree in half of their numbers at a rate of 1/2, within six standard deviations."""
    ones, masks = torch.ones(3, 128, 128), []
    for layer, site in itertools.product((0, 1), (AFTER_ATTENTION, AFTER_MLP)):
        masks += list(drop_hidden(ones, layer_keys(KEYS, layer), site, 0, 0.5))
    masks += list(drop_probabilities(torch.ones(1, 3, 128, 128), layer_keys(KEYS[:1], 0), 0, 0.5)[0])
    masks += [masks[0].roll(1, 0), masks[0].roll(1, 1), masks[0].T]
    for a, b in itertools.combinations(masks, 2):
        assert ((a == b).double().mean() - 0.5).abs() < 6 * 0.5 / 128


def test_parts_of_positions_and_of_heads_have_their_parts_of_the_mask():
    x = torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(0))
    whole = drop_hidden(x, KEYS, AFTER_MLP, 0, 0.3)
    assert torch.equal(whole[:, 4:], drop_hidden(x[:, 4:], KEYS, AFTER_MLP, 4, 0.3))
    p = torch.rand(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drop_probabilities(p, KEYS, 0, 0.3)[:, 2:], drop_probabilities(p[:, 2:], KEYS, 2, 0.3))
    # What is kept grows, so that the mean stays.
    assert torch.allclose(whole[whole != 0], x[whole != 0] / 0.7)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_drops_the_same(recompute):
    gpt = small_gpt(max_positions=12)
    ids = torch.randint(0, 53, (3, 13), generator=torch.Generator().manual_seed(1))
    gradients, losses = [], []
    for way in ("none", recompute):
        execution = Execution(way, attention_dropout=0.2, hidden_dropout=0.3)
        model = GPTModel(gpt, unsharded(torch.device("cpu")), 3, execution)
        losses.append(model(ids[:, :-1], ids[:, 1:], KEYS))
        losses[-1].mean().backward()
        gradients.append([parameter.grad for _, parameter in model.model_parameters()])
    assert torch.equal(*losses)
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    # Without keys, as in evaluation, nothing is dropped.
    plain = GPTModel(gpt, unsharded(torch.device("cpu")), 3, Execution())
    assert torch.equal(model(ids[:, :-1], ids[:, 1:]), plain(ids[:, :-1], ids[:, 1:]))
