"""Collectives over the tensor-parallel group: some that run beside other work, and differentiable ones.

The differentiable ones are the pairs of Megatron-LM (Shoeybi et al. 2019, section 3; Korthikanti et al. 2022 for the
sequence-parallel ones): the backward pass of each is the adjoint of its forward pass, so that a layer sharded over the
group has the gradients of the unsharded layer. They are the identity in a group of one rank.

Two orders of the positions of a batch: the residual stream is [batch, seq, hidden], or with sequence parallelism each
rank's part of it, [batch, seq / t, hidden]. What the ranks gather of that is in the order of ranks, [t batch, seq / t,
hidden], and so is what they scatter: it is the order in which it is sent and received. Layers that look at one position
at a time take it as it is; `batch_first` and `rank_major` copy from one order to the other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_doremi.parallel.groups import TensorGroup

# torch 2.13 renamed these two; the old names still work on 2.11 and warn on 2.13.
all_gather_into = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class Started(NamedTuple):
    """A collective that was started.

    Attributes:
        result: its result, once `finished`.
        work: what to wait for; None in a compiled graph, which has its own wait.
        source: what it reads, which is held until then.
    """

    result: Tensor
    work: dist.Work | None
    source: Tensor


def finished(started: Started) -> Tensor:
    """Waits for a collective, on a GPU only in the order of its kernels; returns its result."""
    if started.work is None:
        result: Tensor = torch.ops._c10d_functional.wait_tensor(started.result)
        return result
    started.work.wait()
    return started.result


def start_gather(x: Tensor, tp_group: TensorGroup) -> Started:
    """[batch, seq / t, hidden] of each rank -> [t batch, seq / t, hidden]."""
    x = x.contiguous()
    if torch.compiler.is_compiling():
        gather = torch.ops._c10d_functional.all_gather_into_tensor
        return Started(gather(x, tp_group.size, _name(tp_group)), None, x)
    result = x.new_empty(tp_group.size * x.shape[0], *x.shape[1:])
    return Started(result, all_gather_into(result, x, group=tp_group.group, async_op=True), x)


def start_scatter_sum(x: Tensor, tp_group: TensorGroup) -> Started:
    """[t batch, seq / t, hidden], summed over ranks -> [batch, seq / t, hidden] of this rank."""
    x = x.contiguous()
    if torch.compiler.is_compiling():
        scatter = torch.ops._c10d_functional.reduce_scatter_tensor
        return Started(scatter(x, "sum", tp_group.size, _name(tp_group)), None, x)
    result = x.new_empty(x.shape[0] // tp_group.size, *x.shape[1:])
    return Started(result, _reduce_scatter(result, x, group=tp_group.group, async_op=True), x)


def start_sum(x: Tensor, tp_group: TensorGroup) -> Started:
    """A tensor summed over ranks; it is lost."""
    x = x.contiguous()
    if torch.compiler.is_compiling():
        return Started(torch.ops._c10d_functional.all_reduce(x, "sum", _name(tp_group)), None, x)
    return Started(x, dist.all_reduce(x, group=tp_group.group, async_op=True), x)


def _name(tp_group: TensorGroup) -> str:
    """Under which a graph's collectives find the group."""
    assert tp_group.group is not None
    name: str = tp_group.group.group_name
    return name


def rank_major(x: Tensor, shards: int) -> Tensor:
    """[batch, seq, ...] -> [shards batch, seq / shards, ...], in the order of ranks; a view of a batch of one."""
    return x if shards == 1 else x.unflatten(1, (shards, -1)).transpose(0, 1).flatten(0, 1)


def batch_first(x: Tensor, shards: int) -> Tensor:
    """[shards batch, seq / shards, ...] in the order of ranks -> [batch, seq, ...]; a view of a batch of one."""
    return x if shards == 1 else x.unflatten(0, (shards, -1)).transpose(0, 1).flatten(1, 2)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp_group: TensorGroup) -> Tensor:
        ctx.tp_group = tp_group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # A gradient may be shared with other branches of the graph: sum a copy.
        return finished(start_sum(grad.clone(), ctx.tp_group)), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp_group: TensorGroup) -> Tensor:
        return finished(start_sum(x.clone(), tp_group))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _ReduceScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp_group: TensorGroup) -> Tensor:
        ctx.tp_group = tp_group
        return finished(start_scatter_sum(x, tp_group))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return finished(start_gather(grad, ctx.tp_group)), None


def copy_to_tp_group(x: Tensor, tp_group: TensorGroup) -> Tensor:
    """For a tensor that is identical on all ranks: identity forward, all-reduce of the gradients backward."""
    return x if tp_group.size == 1 else _Copy.apply(x, tp_group)


def reduce_from_tp_group(x: Tensor, tp_group: TensorGroup) -> Tensor:
    """Sums the partial results of the ranks: all-reduce forward, identity backward."""
    return x if tp_group.size == 1 else _Reduce.apply(x, tp_group)


def reduce_scatter_sequence(x: Tensor, tp_group: TensorGroup) -> Tensor:
    """[t batch, seq / t, hidden], summed over ranks -> [batch, seq / t, hidden]; backward gathers the gradients."""
    return x if tp_group.size == 1 else _ReduceScatterSequence.apply(x, tp_group)
