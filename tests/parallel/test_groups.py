"""Process groups: every rank belongs to the right ones and takes part in creating few, whatever the number of ranks.

Run alone: python -m pytest tests/parallel/test_groups.py
"""

from __future__ import annotations

import itertools

import pytest
from ranks import on_ranks

from megatron_doremi.parallel import groups as groups_module
from megatron_doremi.parallel.topology import Topology

LAYOUTS_OF_512 = [(1, 512, 1), (1, 64, 8), (8, 64, 1), (2, 64, 4), (4, 16, 8), (1, 1, 512)]


@pytest.mark.parametrize(("pipe", "data", "tensor"), LAYOUTS_OF_512)
def test_each_of_512_ranks_creates_at_most_three_groups(pipe, data, tensor, monkeypatch):
    created = []

    def new_group(ranks, use_local_synchronization):
        assert use_local_synchronization
        created.append(tuple(ranks))
        return tuple(ranks)

    monkeypatch.setattr(groups_module.dist, "new_group", new_group)
    members = {"tensor": {}, "data": {}, "model": {}}
    for rank in range(512):
        created.clear()
        groups = groups_module.make_groups(Topology(pipe, data, tensor, rank))
        assert len(created) <= 3
        members["data"][rank], members["model"][rank] = groups.data, groups.model
        members["tensor"][rank] = groups.tp_group.group or (rank,)
    for kind, size in (("tensor", tensor), ("data", data), ("model", pipe * tensor)):
        for rank, ranks in members[kind].items():
            assert rank in ranks
            assert len(ranks) == size
            # Every member creates the same group, in the same order.
            assert all(members[kind][other] == ranks for other in ranks)


def sums(launch, pipe, tensor):
    import torch
    import torch.distributed as dist

    from megatron_doremi.cluster.process_group import join
    from megatron_doremi.parallel.groups import make_groups

    join(launch)
    topology = Topology(pipe, launch.world_size // pipe // tensor, tensor, launch.rank)
    groups = make_groups(topology)
    result = []
    for group in (groups.tp_group.group, groups.data, groups.model):
        value = torch.tensor([10.0**launch.rank])
        if group is not None:
            dist.all_reduce(value, group=group)
        result.append(int(value))
    return result


@pytest.mark.slow
def test_groups_reduce_over_their_members():
    """Each rank contributes a power of ten, so that the digits of a sum show which ranks took part."""
    assert on_ranks(4, sums, 1, 1) == [[10**rank, 1111, 10**rank] for rank in range(4)]
    assert on_ranks(4, sums, 1, 2) == [[11, 101, 11], [11, 1010, 11], [1100, 101, 1100], [1100, 1010, 1100]]
    pipe = on_ranks(4, sums, 2, 1)
    assert [tensor for tensor, _, _ in pipe] == [10**rank for rank in range(4)]
    assert sorted({data for _, data, _ in pipe}) == [11, 1100]
    assert sorted({model for _, _, model in pipe}) == [101, 1010]
    assert list(itertools.chain(*on_ranks(4, sums, 2, 2)))[2::3] == [1111] * 4
