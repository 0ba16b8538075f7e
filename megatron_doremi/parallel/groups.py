"""The process groups of a layout, made once and passed as an argument wherever ranks communicate."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from megatron_doremi.parallel.topology import Topology


@dataclass(frozen=True)
class TensorGroup:
    """The ranks over which a layer is sharded. If `group` is None, layers are unsharded and no collective runs."""

    group: dist.ProcessGroup | None = None
    size: int = 1
    rank: int = 0


@dataclass(frozen=True)
class ProcessGroups:
    """The groups that this rank belongs to.

    Attributes:
        tp_group: ranks over which the layers of this rank are sharded.
        data: ranks that hold the same shard of the model in all replicas.
        model: all ranks of this rank's replica (pipe x tensor).
    """

    tp_group: TensorGroup
    data: dist.ProcessGroup
    model: dist.ProcessGroup


def make_groups(topology: Topology) -> ProcessGroups:
    """Creates the groups of this rank, each among its own members only; a collective call of all ranks.

    A rank takes part in the creation of at most three groups, whatever the number of ranks. If all ranks took part in
    the creation of all groups, 512 ranks would create a thousand groups one after the other.
    """
    t = topology
    tp_group = TensorGroup()
    if t.tensor_size > 1:
        ranks = [t.rank_at(t.pipe_rank, t.data_rank, k) for k in range(t.tensor_size)]
        tp_group = TensorGroup(_group(ranks), t.tensor_size, t.tensor_rank)
    data = _group([t.rank_at(t.pipe_rank, d, t.tensor_rank) for d in range(t.data_size)])
    model = _group([t.rank_at(p, t.data_rank, k) for p in range(t.pipe_size) for k in range(t.tensor_size)])
    return ProcessGroups(tp_group, data, model)


def _group(ranks: list[int]) -> dist.ProcessGroup:
    return dist.new_group(ranks=ranks, use_local_synchronization=True)
