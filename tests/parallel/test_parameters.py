"""Parameters: initial values by name, sharding and unsharding at any number of ranks.

Run alone: python -m pytest tests/parallel/test_parameters.py
"""

from __future__ import annotations

import pytest
import torch

from megatron_doremi.parallel import parameters
from megatron_doremi.parallel.parameters import ParameterSpec, initial_values, shard, unshard


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    "spec",
    [
        ParameterSpec((8, 3), dim=0),
        ParameterSpec((3, 8), dim=1),
        ParameterSpec((16, 3), dim=0, blocks=2),
        ParameterSpec((9, 3), dim=0, padded=12),
        ParameterSpec((5,)),
    ],
)
def test_unshard_joins_the_shards_to_the_full_tensor(spec, size):
    full = torch.arange(torch.Size(spec.shape).numel(), dtype=torch.float32).view(spec.shape) + 1
    shards = [shard(full, spec, size, rank) for rank in range(size)]
    assert all(part.shape == spec.local_shape(size) for part in shards)
    assert torch.equal(unshard(shards, spec), full)


def test_each_block_is_sharded_separately():
    """Gate rows 0-3 and up rows 4-7: rank 1 of 2 holds rows 2, 3 and 6, 7."""
    full = torch.arange(8.0).view(8, 1)
    spec = ParameterSpec((8, 1), dim=0, blocks=2)
    assert shard(full, spec, 2, 1).flatten().tolist() == [2, 3, 6, 7]


def test_initial_values_depend_on_seed_and_name_alone():
    spec = ParameterSpec((64, 64), std=0.02)
    values = initial_values(spec, "layers.0.mlp.fc1.weight", 7)
    torch.manual_seed(99)
    assert torch.equal(values, initial_values(spec, "layers.0.mlp.fc1.weight", 7))
    assert not torch.equal(values, initial_values(spec, "layers.1.mlp.fc1.weight", 7))
    assert not torch.equal(values, initial_values(spec, "layers.0.mlp.fc1.weight", 8))
    assert values.std().item() == pytest.approx(0.02, rel=0.05)
    assert abs(values.mean().item()) < 0.002


@pytest.mark.parametrize("drawn", [16, 64, 1 << 18])
@pytest.mark.parametrize(
    "spec",
    [
        ParameterSpec((64, 7), dim=0, std=0.02),
        ParameterSpec((64, 7), dim=0, blocks=2, std=0.02),
        ParameterSpec((50, 16), dim=1, std=0.02),
        ParameterSpec((50, 16), dim=1, blocks=2, std=0.02),
        ParameterSpec((3, 4), dim=1, std=0.02),
        ParameterSpec((53, 3), dim=0, padded=56, std=0.02),
        ParameterSpec((5, 3), dim=0, padded=16, std=0.02),
        ParameterSpec((37, 11), std=0.02),
        ParameterSpec((9,), std=0.02),
        ParameterSpec((128, 64), dim=0, std=1.0),
        ParameterSpec((53,), dim=0, padded=56, constant=1.0),
        ParameterSpec((24,), constant=1.0),
    ],
    ids=lambda spec: f"{spec.shape} dim {spec.dim} blocks {spec.blocks} std {spec.std}",
)
def test_a_shard_is_drawn_without_the_full_tensor(spec, drawn, monkeypatch):
    monkeypatch.setattr(parameters, "_DRAWN", drawn)
    full = initial_values(spec, "name", 3)
    for size in (1, 2, 4):
        for rank in range(size):
            expected = shard(full, spec, size, rank)
            for dtype in (torch.float32, torch.bfloat16):
                out = torch.full(expected.shape, float("nan"), dtype=dtype)
                parameters.fill_initial_shard(out, spec, "name", 3, size, rank)
                assert torch.equal(out, expected.to(dtype)), (size, rank)
