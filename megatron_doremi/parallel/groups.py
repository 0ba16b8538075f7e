"""The process groups of a layout, made once and passed as an argument wherever ranks communicate."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from megatron_doremi.parallel.topology import Topology


@dataclass(frozen=True)
class TensorGroup:
    """The ranks over which a layer is sharded. If `group` is None, layers are unsharded and no collective runs."""

    group: dist.ProcessGroup | None = None
    size: int = 1
    rank: int = 0


class ProcessGroups:
    """The groups that this rank belongs to: one for a set of ranks, whatever it is used for, and that of all ranks is
    the one that exists. No collective runs where a group would have one rank, and none is made.

    Attributes:
        tp_group: ranks over which the layers of this rank are sharded.
    """

    def __init__(self, topology: Topology):
        """Makes the groups of this rank, each among its own members only; a collective call of all ranks.

        If all ranks took part in the creation of all groups, 512 ranks would create a thousand groups one after the
        other. Ranks that share two groups make them in the same order.
        """
        t = topology
        self._rank, self._world_size = t.rank, t.world_size
        self._made: dict[tuple[int, ...], dist.ProcessGroup] = {}
        tensor = self._of_several(t.rank_at(t.pipe_rank, t.data_rank, k) for k in range(t.tensor_size))
        self.tp_group = TensorGroup(tensor, t.tensor_size, t.tensor_rank) if tensor is not None else TensorGroup()
        self._data = self._of_several(t.rank_at(t.pipe_rank, d, t.tensor_rank) for d in range(t.data_size))
        self._model = self._of_several(
            t.rank_at(p, t.data_rank, k) for p in range(t.pipe_size) for k in range(t.tensor_size)
        )

    @property
    def data(self) -> dist.ProcessGroup:
        """Ranks that hold the same shard of the model in all replicas, which are several."""
        assert self._data is not None, "a single replica has no data group"
        return self._data

    @property
    def model(self) -> dist.ProcessGroup:
        """All ranks of this rank's replica (pipe x tensor), which are several."""
        assert self._model is not None, "a replica of one rank has no model group"
        return self._model

    def alone(self) -> dist.ProcessGroup:
        """A group of this rank, for DeepSpeed, which asks for the data group of a single replica as well."""
        return self._of((self._rank,))

    def instead_of_new_group(self, ranks: Iterable[int]) -> Any:
        """In place of torch's `new_group`, which all ranks call: the group of these ranks, in ascending order.

        Returns:
            torch's mark of a group to which this rank does not belong, also if the rank would be its only one:
            collectives do nothing then.
        """
        members = tuple(ranks)
        shared = self._rank in members and (len(members) > 1 or self._world_size == 1)
        return self._of(members) if shared else dist.GroupMember.NON_GROUP_MEMBER

    def _of_several(self, ranks: Iterable[int]) -> dist.ProcessGroup | None:
        members = tuple(ranks)
        return self._of(members) if len(members) > 1 else None

    def _of(self, ranks: tuple[int, ...]) -> dist.ProcessGroup:
        if len(ranks) == self._world_size:
            return _world()
        if ranks not in self._made:
            self._made[ranks] = dist.new_group(ranks=list(ranks), use_local_synchronization=True)
        return self._made[ranks]


def _world() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None
    return world
