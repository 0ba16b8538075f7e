"""Layers sharded over the tensor-parallel group: linear by column and by row, embedding by vocabulary.

The residual stream between these layers is [batch, seq, hidden] on every rank, or, with sequence parallelism, split by
position, [batch, seq / t, hidden]. What is gathered of the latter, in a feed-forward layer and around attention, is in
the order of ranks, [t batch, seq / t, ...] (collectives.py).

A replicated parameter that is applied to split activations gets the gradient of one rank's positions only;
`TensorParallel.replicated` sums it over the group.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_doremi.parallel.collectives import (
    copy_to_tp_group,
    rank_major,
    reduce_from_tp_group,
    reduce_scatter_sequence,
)
from megatron_doremi.parallel.groups import TensorGroup
from megatron_doremi.parallel.linear import column_linear, rank_major_linear
from megatron_doremi.parallel.parameters import ParameterSpec, make_parameter


@dataclass(frozen=True)
class TensorParallel:
    """How layers are sharded: the group, and whether the residual stream is split by position."""

    group: TensorGroup = field(default_factory=TensorGroup)
    sequence_parallel: bool = False

    @property
    def size(self) -> int:
        return self.group.size

    def leave(self, x: Tensor) -> Tensor:
        """Partial sums of all positions, with sequence parallel in the order of ranks -> the residual stream."""
        return reduce_scatter_sequence(x, self.group) if self.sequence_parallel else reduce_from_tp_group(x, self.group)

    @property
    def sequence_shards(self) -> int:
        """Ranks over which the residual stream is split by position."""
        return self.size if self.sequence_parallel else 1

    def sequence_shard(self, x: Tensor) -> Tensor:
        """This rank's positions of the residual stream: [..., seq] -> [..., seq / t] with sequence parallel."""
        return x.chunk(self.size, dim=-1)[self.group.rank] if self.sequence_parallel else x

    def replicated(self, parameter: Tensor) -> Tensor:
        """A parameter that every rank holds in full, to be applied to the residual stream."""
        return copy_to_tp_group(parameter, self.group) if self.sequence_parallel else parameter


class ColumnParallelLinear(nn.Module):
    """Linear layer sharded by output features: the residual stream -> [batch, seq, out / t], or with sequence parallel
    [t batch, seq / t, out / t] in the order of ranks."""

    def __init__(self, inputs: int, outputs: int, bias: bool, std: float, tp: TensorParallel, blocks: int = 1):
        super().__init__()
        self.tp = tp
        self.weight = make_parameter(ParameterSpec((outputs, inputs), dim=0, blocks=blocks, std=std), tp.group)
        self.bias = make_parameter(ParameterSpec((outputs,), dim=0, blocks=blocks), tp.group) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return column_linear(x, self.weight, self.bias, self.tp.group, self.tp.sequence_parallel)


class RowParallelLinear(nn.Module):
    """Linear layer sharded by input features -> the residual stream."""

    def __init__(
        self, inputs: int, outputs: int, bias: bool, std: float, tp: TensorParallel, batch_first: bool = False
    ):
        """Args:
        batch_first: the input is [batch, seq, in / t]; else that of a column-parallel layer.
        """
        super().__init__()
        self.tp, self.shards = tp, tp.sequence_shards if batch_first else 1
        self.weight = make_parameter(ParameterSpec((outputs, inputs), dim=1, std=std), tp.group)
        self.bias = make_parameter(ParameterSpec((outputs,)), tp.group) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.tp.leave(rank_major_linear(x, self.weight, self.shards))
        return x if self.bias is None else x + self.tp.replicated(self.bias)


class VocabParallelEmbedding(nn.Module):
    """Token embedding sharded by vocabulary: ids [batch, seq] -> the residual stream.

    The table is padded to `padded` rows; the ids of the padding never occur.
    """

    def __init__(self, vocab_size: int, padded: int, hidden: int, std: float, tp: TensorParallel):
        super().__init__()
        self.tp = tp
        spec = ParameterSpec((vocab_size, hidden), dim=0, padded=padded, std=std)
        self.weight = make_parameter(spec, tp.group)

    def forward(self, ids: Tensor) -> Tensor:
        if self.tp.size == 1:
            return F.embedding(ids, self.weight)
        if self.tp.sequence_parallel:
            ids = rank_major(ids, self.tp.size)
        local = ids - self.tp.group.rank * self.weight.shape[0]
        outside = (local < 0) | (local >= self.weight.shape[0])
        rows = F.embedding(local.masked_fill(outside, 0), self.weight)
        return self.tp.leave(rows.masked_fill(outside.unsqueeze(-1), 0.0))


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dimension; torch computes both in float32, whatever the input is."""

    def __init__(self, hidden: int, kind: str, epsilon: float, tp: TensorParallel, over_heads: bool = False):
        """Args:
        over_heads: the input holds this rank's heads; else it is the residual stream.
        """
        super().__init__()
        self.kind, self.epsilon, self.tp, self.over_heads = kind, epsilon, tp, over_heads
        self.weight = make_parameter(ParameterSpec((hidden,), constant=1.0), tp.group)
        self.bias = make_parameter(ParameterSpec((hidden,)), tp.group) if kind == "LayerNorm" else None

    def forward(self, x: Tensor) -> Tensor:
        weight = self._replicated(self.weight)
        if self.bias is None:
            return F.rms_norm(x, weight.shape, weight, self.epsilon)
        return F.layer_norm(x, weight.shape, weight, self._replicated(self.bias), self.epsilon)

    def _replicated(self, parameter: Tensor) -> Tensor:
        """Each rank's heads, like each rank's positions, contribute a part of the gradient."""
        return copy_to_tp_group(parameter, self.tp.group) if self.over_heads else self.tp.replicated(parameter)


class LearnedPositions(nn.Module):
    """Adds a learned vector for each position to the residual stream."""

    def __init__(self, positions: int, hidden: int, std: float, tp: TensorParallel):
        super().__init__()
        self.tp = tp
        self.weight = make_parameter(ParameterSpec((positions, hidden), std=std), tp.group)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Args:
        positions: [seq] or [batch, seq], of the full sequence, also where `x` is split by position.
        """
        return x + F.embedding(self.tp.sequence_shard(positions), self.tp.replicated(self.weight))
