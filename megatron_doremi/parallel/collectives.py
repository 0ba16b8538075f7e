"""Collectives over the tensor group that know their gradients.

The pairs of Megatron-LM (Shoeybi et al. 2019, section 3; Korthikanti et al. 2022 for the sequence-parallel
ones): each forward has the adjoint as its backward, so that a layer cut over the tensor group has the
gradients of the whole layer. All do nothing where the group has one rank. Sequence is dimension 1:
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


def _sum(x: Tensor, tensor: TensorGroup) -> Tensor:
    x = x.contiguous()
    dist.all_reduce(x, group=tensor.group)
    return x


def _gather(x: Tensor, tensor: TensorGroup) -> Tensor:
    """[batch, seq / t, hidden] of each rank -> [batch, seq, hidden]."""
    batch, part, hidden = x.shape
    parts = x.new_empty(tensor.size * batch, part, hidden)
    _all_gather(parts, x.contiguous(), group=tensor.group)
    parts = parts.view(tensor.size, batch, part, hidden)
    return parts.transpose(0, 1).reshape(batch, tensor.size * part, hidden)


def _scatter_sum(x: Tensor, tensor: TensorGroup) -> Tensor:
    """Sum over ranks of [batch, seq, hidden], each rank keeping its part of the positions."""
    batch, seq, hidden = x.shape
    part = seq // tensor.size
    parts = x.view(batch, tensor.size, part, hidden).transpose(0, 1).contiguous()
    own = x.new_empty(batch, part, hidden)
    _reduce_scatter(own, parts.view(tensor.size * batch, part, hidden), group=tensor.group)
    return own


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tensor: TensorGroup) -> Tensor:
        ctx.tensor = tensor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # A gradient may be shared with other branches of the graph: sum a copy.
        return _sum(grad.clone(), ctx.tensor), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tensor: TensorGroup) -> Tensor:
        return _sum(x.clone(), tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tensor: TensorGroup) -> Tensor:
        ctx.tensor = tensor
        return _gather(x, tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _scatter_sum(grad.contiguous(), ctx.tensor), None


class _ReduceScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tensor: TensorGroup) -> Tensor:
        ctx.tensor = tensor
        return _scatter_sum(x.contiguous(), tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gather(grad, ctx.tensor), None


def copy_to_tensor(x: Tensor, tensor: TensorGroup) -> Tensor:
    """Hands the same tensor to every rank: identity forward, sum of the gradients backward."""
    return x if tensor.size == 1 else _Copy.apply(x, tensor)


def reduce_from_tensor(x: Tensor, tensor: TensorGroup) -> Tensor:
    """Sums the ranks' parts: all-reduce forward, identity backward."""
    return x if tensor.size == 1 else _Reduce.apply(x, tensor)


def gather_sequence(x: Tensor, tensor: TensorGroup) -> Tensor:
    """[batch, seq / t, hidden] -> [batch, seq, hidden]; backward sums and splits the gradients."""
    return x if tensor.size == 1 else _GatherSequence.apply(x, tensor)


def reduce_scatter_sequence(x: Tensor, tensor: TensorGroup) -> Tensor:
    """Sums the ranks' [batch, seq, hidden] and leaves each its positions; backward gathers."""
    return x if tensor.size == 1 else _ReduceScatterSequence.apply(x, tensor)
