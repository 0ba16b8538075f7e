"""Parameters: initial values by name, sharding and unsharding at any number of ranks.

Run alone: python -m pytest tests/parallel/test_parameters.py
"""

from __future__ import annotations

import pytest
import torch

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
