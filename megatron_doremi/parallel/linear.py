"""Products of layers that are sharded over the tensor-parallel group, with collectives beside them.

The backward pass of a layer sharded by columns sums the gradient of its input over the ranks while it computes that of
its weight (Narayanan et al. 2021; Korthikanti et al. 2022). With sequence parallelism it keeps this rank's positions of
the input only, and gathers the others again while it computes the gradient of the input.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_doremi.parallel.collectives import (
    Started,
    batch_first,
    finished,
    rank_major,
    start_gather,
    start_scatter_sum,
    start_sum,
)
from megatron_doremi.parallel.groups import TensorGroup


def start_input_sum(grad: Tensor, tp_group: TensorGroup, sequence_parallel: bool) -> Started:
    """Begins to sum the ranks' parts of the gradient of the residual stream; `grad` is lost."""
    return start_scatter_sum(grad, tp_group) if sequence_parallel else start_sum(grad, tp_group)


class _ColumnLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, tp_group: TensorGroup, sequence_parallel: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.tp_group, ctx.sequence_parallel = tp_group, sequence_parallel
        return F.linear(finished(start_gather(x, tp_group)) if sequence_parallel else x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        # The same on all ranks, which hold parts of one layer.
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        gathering = start_gather(x, ctx.tp_group) if ctx.sequence_parallel and wants_weight else None
        summing = start_input_sum(grad.matmul(weight), ctx.tp_group, ctx.sequence_parallel) if wants_x else None
        full = x if gathering is None else finished(gathering)
        rows = grad.flatten(0, 1)
        weight_grad = rows.t().mm(full.flatten(0, 1)) if wants_weight else None
        bias_grad = rows.sum(0) if wants_bias else None
        return None if summing is None else finished(summing), weight_grad, bias_grad, None, None


def column_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, tp_group: TensorGroup, sequence_parallel: bool
) -> Tensor:
    """The residual stream times the rows of a weight that this rank holds.

    Args:
        x: the residual stream; see collectives.py.

    Returns:
        [batch, seq, rows], or with sequence parallelism [t batch, seq / t, rows] in the order of ranks.
    """
    if tp_group.size == 1:
        return F.linear(x, weight, bias)
    product: Tensor = _ColumnLinear.apply(x, weight, bias, tp_group, sequence_parallel)
    return product


class _RankMajorLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, shards: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.shards = shards
        return F.linear(rank_major(x, shards), weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, _ = ctx.needs_input_grad
        weight_grad = grad.flatten(0, 1).t().mm(rank_major(x, ctx.shards).flatten(0, 1)) if wants_weight else None
        return batch_first(grad.matmul(weight), ctx.shards) if wants_x else None, weight_grad, None


def rank_major_linear(x: Tensor, weight: Tensor, shards: int) -> Tensor:
    """[batch, seq, in] times [out, in] -> [shards batch, seq / shards, out], in the order of ranks.

    The input is held as it is, which attention holds as well, and not its copy in the other order.
    """
    if shards == 1 or len(x) == 1 or torch.compiler.is_compiling():
        return F.linear(x if shards == 1 else rank_major(x, shards), weight)
    product: Tensor = _RankMajorLinear.apply(x, weight, shards)
    return product
