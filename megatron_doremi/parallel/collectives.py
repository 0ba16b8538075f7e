"""Differentiable collectives over the tensor-parallel group.

The pairs of Megatron-LM (Shoeybi et al. 2019, section 3; Korthikanti et al. 2022 for the sequence-parallel
ones): the backward pass of each is the adjoint of its forward pass, so that a layer sharded over the group
has the gradients of the unsharded layer. All are the identity in a group of one rank. Sequence is dimension 1:
activations are [batch, seq, hidden].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_doremi.parallel.groups import TensorGroup

# torch 2.13 renamed these two; the old names still work on 2.11 and warn on 2.13.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def _sum(x: Tensor, tp_group: TensorGroup) -> Tensor:
    x = x.contiguous()
    dist.all_reduce(x, group=tp_group.group)
    return x


def _gather(x: Tensor, tp_group: TensorGroup) -> Tensor:
    """[batch, seq / t, hidden] of each rank -> [batch, seq, hidden]."""
    batch, part, hidden = x.shape
    parts = x.new_empty(tp_group.size * batch, part, hidden)
    _all_gather(parts, x.contiguous(), group=tp_group.group)
    parts = parts.view(tp_group.size, batch, part, hidden)
    return parts.transpose(0, 1).reshape(batch, tp_group.size * part, hidden)


def _scatter_sum(x: Tensor, tp_group: TensorGroup) -> Tensor:
    """[batch, seq, hidden] summed over ranks -> [batch, seq / t, hidden] of this rank."""
    batch, seq, hidden = x.shape
    part = seq // tp_group.size
    parts = x.view(batch, tp_group.size, part, hidden).transpose(0, 1).contiguous()
    local = x.new_empty(batch, part, hidden)
    _reduce_scatter(local, parts.view(tp_group.size * batch, part, hidden), group=tp_group.group)
    return local


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp_group: TensorGroup) -> Tensor:
        ctx.tp_group = tp_group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # A gradient may be shared with other branches of the graph: sum a copy.
        return _sum(grad.clone(), ctx.tp_group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp_group: TensorGroup) -> Tensor:
        return _sum(x.clone(), tp_group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp_group: TensorGroup) -> Tensor:
        ctx.tp_group = tp_group
        return _gather(x, tp_group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _scatter_sum(grad.contiguous(), ctx.tp_group), None


class _ReduceScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp_group: TensorGroup) -> Tensor:
        ctx.tp_group = tp_group
        return _scatter_sum(x.contiguous(), tp_group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gather(grad, ctx.tp_group), None


def copy_to_tp_group(x: Tensor, tp_group: TensorGroup) -> Tensor:
    """For a tensor that is identical on all ranks: identity forward, all-reduce of the gradients backward."""
    return x if tp_group.size == 1 else _Copy.apply(x, tp_group)


def reduce_from_tp_group(x: Tensor, tp_group: TensorGroup) -> Tensor:
    """Sums the partial results of the ranks: all-reduce forward, identity backward."""
    return x if tp_group.size == 1 else _Reduce.apply(x, tp_group)


def gather_sequence(x: Tensor, tp_group: TensorGroup) -> Tensor:
    """[batch, seq / t, hidden] -> [batch, seq, hidden]; backward reduce-scatters the gradients."""
    return x if tp_group.size == 1 else _GatherSequence.apply(x, tp_group)


def reduce_scatter_sequence(x: Tensor, tp_group: TensorGroup) -> Tensor:
    """[batch, seq, hidden] summed over ranks -> [batch, seq / t, hidden]; backward all-gathers the gradients."""
    return x if tp_group.size == 1 else _ReduceScatterSequence.apply(x, tp_group)
