"""A rank's view of the parallel layout as one value, created once after the ranks have joined."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_doremi.parallel.groups import ProcessGroups
from megatron_doremi.parallel.layers import TensorParallel
from megatron_doremi.parallel.topology import Topology


@dataclass(frozen=True)
class ParallelContext:
    """The layout, this rank's coordinates in it, and the process groups in which it communicates.

    Attributes:
        topology: the sizes of the layout and the coordinates of this rank.
        groups: the process groups of this rank.
        device: the device on which this rank computes.
        tensor_parallel: how layers are sharded over the tensor-parallel group.
    """

    topology: Topology
    groups: ProcessGroups
    device: torch.device
    tensor_parallel: TensorParallel


def make_context(topology: Topology, device: torch.device, sequence_parallel: bool = False) -> ParallelContext:
    """Creates the process groups of this rank; a collective call, after torch.distributed is initialized."""
    groups = ProcessGroups(topology)
    return ParallelContext(topology, groups, device, TensorParallel(groups.tp_group, sequence_parallel))


def unsharded(device: torch.device) -> ParallelContext:
    """The context of a process that holds a full model and communicates with no other."""
    return ParallelContext(Topology(), ProcessGroups(Topology()), device, TensorParallel())
