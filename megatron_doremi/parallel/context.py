"""A rank's place among the others, as one value: made once, when the ranks have joined."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_doremi.parallel.groups import ProcessGroups, make_groups
from megatron_doremi.parallel.layers import TensorParallel
from megatron_doremi.parallel.topology import Topology


@dataclass(frozen=True)
class ParallelContext:
    """What a rank needs to know of the layout, and the groups in which it communicates.

    Attributes:
        topology: the layout and this rank's place in it.
        groups: the process groups of this rank.
        device: where this rank computes.
        tensor_parallel: how the layers of a model are split over the tensor group.
    """

    topology: Topology
    groups: ProcessGroups
    device: torch.device
    tensor_parallel: TensorParallel


def make_context(topology: Topology, device: torch.device, sequence_parallel: bool = False) -> ParallelContext:
    """Makes this rank's process groups; a collective call of all ranks, which have joined one process group."""
    groups = make_groups(topology)
    return ParallelContext(topology, groups, device, TensorParallel(groups.tp_group, sequence_parallel))
