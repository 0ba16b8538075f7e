"""Vocabulary parallel cross-entropy against PyTorch's, with padding that must never enter the softmax.

Run alone: python -m pytest tests/parallel/test_cross_entropy.py
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks

from megatron_doremi.parallel.cross_entropy import token_losses
from megatron_doremi.parallel.groups import TensorGroup
from megatron_doremi.parallel.parameters import ParameterSpec, shard

VOCAB, HIDDEN = 21, 6


def example():
    generator = torch.Generator().manual_seed(0)
    hidden = 3 * torch.randn(2, 5, HIDDEN, generator=generator, dtype=torch.float64)
    rows = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, VOCAB, (2, 5), generator=generator)
    targets[0, 0], targets[1, 4] = 0, VOCAB - 1
    scale = torch.rand(2, 5, generator=generator, dtype=torch.float64)
    return hidden, rows, targets, scale


def on_rank(launch, padded):
    import torch.distributed as dist

    from megatron_doremi.training.distributed import join

    join(launch)
    hidden, rows, targets, scale = example()
    spec = ParameterSpec((VOCAB, HIDDEN), dim=0, padded=padded)
    own = shard(rows.float(), spec, launch.world_size, launch.rank)
    # What the padding holds must not matter.
    first = launch.rank * own.shape[0]
    own[max(0, VOCAB - first) :] = 50.0
    own.requires_grad_()
    hidden = hidden.float().requires_grad_()
    group = TensorGroup(dist.group.WORLD, launch.world_size, launch.rank)
    losses = token_losses(hidden, own, targets, VOCAB, group)
    (losses * scale.float()).sum().backward()
    return losses.detach(), hidden.grad, own.grad


@pytest.mark.parametrize(("world", "padded"), [(1, 21), (1, 32), (2, 22), (2, 32), (3, 48), (3, 24)])
def test_losses_and_gradients(world, padded):
    hidden, rows, targets, scale = example()
    hidden.requires_grad_()
    rows.requires_grad_()
    expected = F.cross_entropy((hidden @ rows.T).flatten(0, 1), targets.flatten(), reduction="none").view(2, 5)
    (expected * scale).sum().backward()
    results = on_ranks(world, on_rank, padded)
    for losses, _, _ in results:
        assert torch.equal(losses, results[0][0])
        torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    # Each rank has its rows' share of the gradient of the hidden states.
    torch.testing.assert_close(sum(r[1] for r in results).double(), hidden.grad, rtol=1e-5, atol=1e-5)
    row_gradient = torch.cat([r[2] for r in results])
    torch.testing.assert_close(row_gradient[:VOCAB].double(), rows.grad, rtol=1e-5, atol=1e-5)
    assert row_gradient[VOCAB:].abs().max() == 0 if padded > VOCAB else True
