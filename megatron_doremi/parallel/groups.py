"""The process groups of a layout, made once and handed in wherever ranks talk to each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from megatron_doremi.parallel.topology import Topology


@dataclass(frozen=True)
class TensorGroup:
    """The ranks that share a layer. Without a group a layer is whole and no collective runs."""

    group: dist.ProcessGroup | None = None
    size: int = 1
    rank: int = 0


@dataclass(frozen=True)
class ProcessGroups:
    """The groups that this rank belongs to.

    Attributes:
        tensor: ranks that share this rank's layers.
        data: ranks with the same part of the model in other replicas.
        model: all ranks of this rank's replica (pipe x tensor).
    """

    tensor: TensorGroup
    data: dist.ProcessGroup
    model: dist.ProcessGroup


def make_groups(topology: Topology) -> ProcessGroups:
    """Makes the groups; a collective call: every rank makes every group, in the same order."""
    t = topology
    tensor = _own(
        t,
        [[t.rank_at(p, d, k) for k in range(t.tensor_size)] for p in range(t.pipe_size) for d in range(t.data_size)],
    )
    data = _own(
        t,
        [[t.rank_at(p, d, k) for d in range(t.data_size)] for p in range(t.pipe_size) for k in range(t.tensor_size)],
    )
    model = _own(
        t,
        [[t.rank_at(p, d, k) for p in range(t.pipe_size) for k in range(t.tensor_size)] for d in range(t.data_size)],
    )
    whole = TensorGroup() if t.tensor_size == 1 else TensorGroup(tensor, t.tensor_size, t.tensor_rank)
    return ProcessGroups(whole, data, model)


def _own(topology: Topology, lists: Sequence[list[int]]) -> dist.ProcessGroup:
    own = None
    for ranks in lists:
        group = dist.new_group(ranks=ranks)
        if topology.rank in ranks:
            own = group
    assert own is not None
    return own
