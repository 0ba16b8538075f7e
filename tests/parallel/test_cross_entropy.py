"""Vocabulary-parallel cross-entropy against PyTorch's, with padding that must never enter the softmax.

Run alone: python -m pytest tests/parallel/test_cross_entropy.py
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks
from torch.utils.checkpoint import checkpoint

from megatron_doremi.execution import Execution
from megatron_doremi.parallel.cross_entropy import losses_and_normalizers, token_losses
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


def on_rank(launch, padded, dtype=torch.float32, chunk=0, z_loss=0.0):
    import torch.distributed as dist

    from megatron_doremi.cluster.process_group import join

    join(launch)
    hidden, rows, targets, scale = example()
    spec = ParameterSpec((VOCAB, HIDDEN), dim=0, padded=padded)
    weight = shard(rows.to(dtype), spec, launch.world_size, launch.rank)
    # The values of the padding must have no effect.
    first = launch.rank * weight.shape[0]
    weight[max(0, VOCAB - first) :] = 50.0
    weight.requires_grad_()
    hidden = hidden.to(dtype).requires_grad_()
    group = TensorGroup(dist.group.WORLD, launch.world_size, launch.rank)
    losses, normalizers = losses_and_normalizers(
        hidden, weight, targets, VOCAB, group, Execution(loss_chunk_tokens=chunk)
    )
    total = (losses * scale.float()).sum()
    if z_loss:
        total = total + z_loss * normalizers.square().sum()
    total.backward()
    return losses.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize(("world", "padded"), [(1, 21), (1, 32), (2, 22), (2, 32), (3, 48), (3, 24)])
def test_losses_and_gradients(world, padded, z_loss):
    """The z-loss is a multiple of the sum of the squared normalizers; it leaves the losses as they are."""
    hidden, rows, targets, scale = example()
    hidden.requires_grad_()
    rows.requires_grad_()
    expected = F.cross_entropy((hidden @ rows.T).flatten(0, 1), targets.flatten(), reduction="none").view(2, 5)
    ((expected * scale).sum() + z_loss * (hidden @ rows.T).logsumexp(-1).square().sum()).backward()
    results = on_ranks(world, on_rank, padded, torch.float32, 3 if z_loss else 0, z_loss)
    for losses, _, _ in results:
        assert torch.equal(losses, results[0][0])
        torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    for _, gradient, _ in results:
        torch.testing.assert_close(gradient.double(), hidden.grad, rtol=1e-5, atol=1e-5)
    row_gradient = torch.cat([r[2] for r in results])
    torch.testing.assert_close(row_gradient[:VOCAB].double(), rows.grad, rtol=1e-5, atol=1e-5)
    assert row_gradient[VOCAB:].abs().max() == 0 if padded > VOCAB else True


@pytest.mark.parametrize("chunk", [0, 3])
def test_a_gradient_of_the_normalizers_alone(chunk):
    """That of the logarithm of the sum of exponentials is the softmax."""
    hidden, rows, targets, _ = example()
    probabilities = (hidden @ rows.T).softmax(-1)
    hidden.requires_grad_()
    execution = Execution(loss_chunk_tokens=chunk)
    _, normalizers = losses_and_normalizers(hidden, rows, targets, VOCAB, TensorGroup(None, 1, 0), execution)
    normalizers.sum().backward()
    torch.testing.assert_close(hidden.grad, probabilities @ rows)


@pytest.mark.parametrize(("world", "padded", "chunk"), [(1, 32, 0), (1, 32, 3), (2, 32, 3), (3, 48, 3), (3, 48, 0)])
def test_padding_does_not_enter_the_softmax_in_bfloat16(world, padded, chunk):
    """In bfloat16 the product includes the padding rows; in some of these cases a rank holds only padding."""
    hidden, rows, targets, scale = example()
    hidden, rows = (value.bfloat16().double().requires_grad_() for value in (hidden, rows))
    expected = F.cross_entropy((hidden @ rows.T).flatten(0, 1), targets.flatten(), reduction="none").view(2, 5)
    (expected * scale).sum().backward()
    results = on_ranks(world, on_rank, padded, torch.bfloat16, chunk)
    for losses, gradient, _ in results:
        torch.testing.assert_close(losses.double(), expected.detach(), rtol=2e-2, atol=5e-2)
        torch.testing.assert_close(gradient.double(), hidden.grad, rtol=2e-2, atol=5e-2)
    row_gradient = torch.cat([r[2] for r in results])
    torch.testing.assert_close(row_gradient[:VOCAB].double(), rows.grad, rtol=2e-2, atol=5e-2)
    assert row_gradient[VOCAB:].abs().max() == 0


@pytest.mark.parametrize("vocab", [VOCAB, 32])
def test_chunks_in_float32_equal_recomputation_by_autograd(vocab):
    """The losses to the last bit, the gradients to rounding."""
    generator = torch.Generator().manual_seed(1)
    hidden, rows = torch.randn(2, 24, 16, generator=generator), torch.randn(32, 16, generator=generator)
    targets, scale = torch.randint(0, vocab, (2, 24), generator=generator), torch.rand(2, 24, generator=generator)

    def by_autograd(hidden, weight):
        def part(h, t):
            return F.cross_entropy(F.linear(h, weight[:vocab]), t, reduction="none")

        chunks = zip(hidden.flatten(0, 1).split(5), targets.flatten().split(5), strict=True)
        return torch.cat([checkpoint(part, h, t, use_reentrant=False) for h, t in chunks]).view_as(targets)

    def by_chunks(hidden, weight):
        return token_losses(hidden, weight, targets, vocab, TensorGroup(None, 1, 0), Execution(loss_chunk_tokens=5))

    results = []
    for losses_of in (by_autograd, by_chunks):
        h, w = hidden.clone().requires_grad_(), rows.clone().requires_grad_()
        losses = losses_of(h, w)
        (losses * scale).sum().backward()
        results.append((losses.detach(), h.grad, w.grad))
    (losses, *gradients), (found, *others) = results
    assert torch.equal(losses, found)
    for gradient, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(other, gradient, rtol=1e-5, atol=1e-6)
