"""Process groups: every rank belongs to the right ones and takes part in creating few, whatever the number of ranks.

Run alone: python -m pytest tests/parallel/test_groups.py
"""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from ranks import on_ranks

from megatron_doremi.parallel import groups as groups_module
from megatron_doremi.parallel.deepspeed_internals import new_groups_replaced
from megatron_doremi.parallel.groups import ProcessGroups
from megatron_doremi.parallel.topology import Topology

# Stages, replicas, tensor ranks: groups that a rank makes, and with DeepSpeed's grid of a pipeline those of a rank of
# the first or last stage.
LAYOUTS_OF_512 = {
    # All ranks are replicas: their group exists.
    (1, 512, 1): (0, None),
    # A replica is a tensor group.
    (1, 64, 8): (2, None),
    (1, 1, 512): (0, None),
    # A replica is a pipeline.
    (8, 64, 1): (2, 3),
    # And the ranks of a pipeline; of two stages they share the tied embedding.
    (2, 64, 4): (3, 4),
    (4, 16, 8): (3, 5),
    # One replica: all ranks are the model group; DeepSpeed has a data group of one rank.
    (64, 1, 8): (1, 4),
}


@pytest.fixture
def created(monkeypatch):
    """The groups that are made in place of torch's: tuples of ranks. That of all ranks exists."""
    made = []

    def new_group(ranks, use_local_synchronization):
        assert use_local_synchronization
        made.append(tuple(ranks))
        return tuple(ranks)

    monkeypatch.setattr(groups_module.dist, "new_group", new_group)
    monkeypatch.setattr(groups_module, "_world", lambda: tuple(range(512)))
    return made


@pytest.mark.parametrize(("pipe", "data", "tensor"), LAYOUTS_OF_512)
def test_each_of_512_ranks_creates_few_groups(pipe, data, tensor, created):
    """None of them has one rank, none is made twice, and every member makes it."""
    makers = Counter()
    members = {"tensor": {}, "data": {}, "model": {}}
    sizes = {"tensor": tensor, "data": data, "model": pipe * tensor}
    for rank in range(512):
        created.clear()
        groups = ProcessGroups(Topology(pipe, data, tensor, rank))
        assert len(created) == len(set(created)) == LAYOUTS_OF_512[pipe, data, tensor][0]
        makers.update(created)
        for kind, size in sizes.items():
            if kind == "tensor":
                assert (groups.tp_group.group is None) == (size == 1)
            elif size == 1:
                with pytest.raises(AssertionError, match=r"has no (data|model) group"):
                    getattr(groups, kind)
            if size > 1:
                members[kind][rank] = groups.tp_group.group if kind == "tensor" else getattr(groups, kind)
    assert all(len(ranks) == number > 1 for ranks, number in makers.items())
    for kind, size in sizes.items():
        for rank, ranks in members[kind].items():
            assert rank in ranks
            assert len(ranks) == size
            assert all(members[kind][other] == ranks for other in ranks)


@pytest.mark.parametrize(("pipe", "data", "tensor"), [sizes for sizes, counts in LAYOUTS_OF_512.items() if counts[1]])
@pytest.mark.parametrize("rank", [0, 100, 511])
def test_the_grid_of_a_pipeline_reuses_groups(pipe, data, tensor, rank, created, monkeypatch):
    """DeepSpeed's grid asks for all groups of all ranks; the tied embedding's are those of its first and last stage."""
    from deepspeed import comm
    from deepspeed.runtime.pipe.topology import PipelineParallelGrid, ProcessTopology

    topology = Topology(pipe, data, tensor, rank)
    groups = ProcessGroups(topology)
    monkeypatch.setattr(comm, "get_rank", lambda: rank)
    monkeypatch.setattr(comm, "get_world_size", lambda: 512)
    monkeypatch.setattr("builtins.print", lambda *_: None)
    with new_groups_replaced(groups.instead_of_new_group):
        grid = PipelineParallelGrid(ProcessTopology(["pipe", "data", "model"], [pipe, data, tensor]))
        for replica, k in itertools.product(range(data), range(tensor)):
            comm.new_group(ranks=[topology.rank_at(stage, replica, k) for stage in (0, pipe - 1)])
    assert grid.ds_model_proc_group == groups.model
    nothing = groups_module.dist.GroupMember.NON_GROUP_MEMBER
    assert grid.dp_proc_group == (groups.data if data > 1 else nothing)
    assert grid.slice_proc_group == (groups.tp_group.group if tensor > 1 else nothing)
    assert grid.pp_proc_group == tuple(
        topology.rank_at(stage, topology.data_rank, topology.tensor_rank) for stage in range(pipe)
    )
    if data == 1:
        assert groups.alone() == (rank,)
    inside = not (topology.is_first_stage or topology.is_last_stage)
    assert len(created) == len(set(created)) == LAYOUTS_OF_512[pipe, data, tensor][1] - inside


def sums(launch, pipe, tensor):
    import torch
    import torch.distributed as dist

    from megatron_doremi.cluster.process_group import join

    join(launch)
    topology = Topology(pipe, launch.world_size // pipe // tensor, tensor, launch.rank)
    groups = ProcessGroups(topology)
    result = []
    for size, group_of in (
        (tensor, lambda: groups.tp_group.group),
        (topology.data_size, lambda: groups.data),
        (pipe * tensor, lambda: groups.model),
    ):
        value = torch.tensor([10.0**launch.rank])
        if size > 1:
            dist.all_reduce(value, group=group_of())
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


def groups_of_an_engine(launch, pipe, tensor, flags, bf16):
    """The groups that this rank makes for a training engine that takes a step, and its frozen reference."""
    import numpy as np
    import torch
    from engines import build_engine, layout, make_config, small_gpt
    from planning.measured import micro_batches

    from megatron_doremi.model.unpipelined import make_gpt

    made, new_group = [], torch.distributed.new_group

    def recorded(ranks=None, **arguments):
        made.append(None if ranks is None else tuple(ranks))
        return new_group(ranks, **arguments)

    torch.distributed.new_group = recorded
    context, gpt = layout(launch, pipe, tensor), small_gpt(num_query_groups=4)
    data = {"phase": "main", "seq_length": 32, "micro_batch_size": 1, "global_batch_size": 4}
    config = make_config(context.topology, data, flags, bf16=bf16)
    engine = build_engine(config, gpt, np.ones(1), context)
    make_gpt(gpt, context, 0)
    count = 4 // context.topology.data_size
    engine.train_step(micro_batches(1, 32, count), torch.tensor([128.0], dtype=torch.float64))
    return made


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pipe", "tensor", "flags", "bf16", "expected"),
    [
        (1, 1, {}, False, []),
        (1, 1, {"zero_stage": 1}, True, []),
        (1, 1, {"zero_stage": 2}, False, []),
        (1, 1, {"zero_stage": 3}, False, []),
        (1, 2, {"zero_stage": 1}, True, [(2, 3), (1, 3)]),
        (1, 2, {"zero_stage": 3}, False, [(2, 3), (1, 3)]),
        (2, 1, {}, False, [(2, 3), (1, 3)]),
        # DeepSpeed's data group of one rank.
        (2, 2, {}, False, [(2, 3), (1, 3), (3,)]),
        (1, 4, {"zero_stage": 1}, True, [(3,)]),
    ],
)
def test_groups_of_an_engine_and_its_reference(pipe, tensor, flags, bf16, expected):
    """On the last of four ranks."""
    assert on_ranks(4, groups_of_an_engine, pipe, tensor, flags, bf16)[3] == expected
