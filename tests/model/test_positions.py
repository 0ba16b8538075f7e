"""Positions are an input of a block; the rotary table equals its formula, and a model caches one table.

Run alone: python -m pytest tests/model/test_positions.py
"""

from __future__ import annotations

import math

import pytest
import torch
from engines import small_gpt

from megatron_doremi.model.gpt import Block
from megatron_doremi.model.positions import Positions, Window, rotary_table
from megatron_doremi.parallel.layers import LearnedPositions, TensorParallel

GPT = small_gpt(max_positions=12)


def filled(layer):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
    return layer


def test_the_table_is_its_formula():
    cos, sin = rotary_table(torch.tensor([0, 1, 7]), 4, 100.0)
    angles = [[p, p / 10] for p in (0, 1, 7)]
    assert cos.shape == sin.shape == (3, 1, 1, 2)
    assert cos.view(3, 2) == pytest.approx(torch.tensor([[math.cos(a) for a in row] for row in angles]), abs=1e-6)
    assert sin.view(3, 2) == pytest.approx(torch.tensor([[math.sin(a) for a in row] for row in angles]), abs=1e-6)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_block_takes_positions_of_each_window(recompute):
    """[batch, seq] positions give the same result as [seq] for each window; attention depends only on distances."""
    block = filled(Block(GPT, TensorParallel(), recompute))
    x = torch.randn(2, 12, GPT.hidden_size, generator=torch.Generator().manual_seed(2))
    positions = torch.stack([torch.arange(12), torch.arange(12) % 5])

    def run(x, positions):
        return block(x, Window(positions, rotary_table(positions, GPT.kv_channels, GPT.rotary_base)))

    together = run(x, positions)
    for window in range(2):
        assert torch.allclose(together[window], run(x[window : window + 1], positions[window])[0], atol=1e-5)
    assert torch.allclose(together, run(x, positions + 3), atol=1e-5)
    assert not torch.allclose(together[1], run(x, positions[0])[1], atol=1e-4)


def test_learned_positions_of_each_window():
    layer = filled(LearnedPositions(8, 3, 0.1, TensorParallel()))
    positions = torch.tensor([[0, 1, 2], [0, 0, 1]])
    assert torch.equal(layer(torch.zeros(2, 3, 3), positions), layer.weight[positions])
    assert torch.equal(layer(torch.zeros(2, 3, 3), positions[0]), layer.weight[:3].expand(2, 3, 3))


def test_one_table_is_kept():
    positions = Positions(GPT)
    ids, table, *_ = positions.of_window(12, torch.device("cpu"))
    assert ids.tolist() == list(range(12))
    assert positions.of_window(12, torch.device("cpu"))[1] is table
    assert torch.equal(positions.of_window(6, torch.device("cpu"))[1].cos, table.cos[:6])
    assert positions.of_window(6, torch.device("meta"))[1].cos.is_meta
