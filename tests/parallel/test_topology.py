"""Rank arithmetic and the split into stages, for hundreds of ranks without any process.

Run alone: python -m pytest tests/parallel/test_topology.py
"""

from __future__ import annotations

import pytest

from megatron_doremi.parallel.topology import Topology, stage_bounds


def test_coordinates_of_512_ranks():
    coordinates = set()
    for rank in range(512):
        t = Topology(pipe_size=4, data_size=16, tensor_size=8, rank=rank)
        assert t.rank_at(t.pipe_rank, t.data_rank, t.tensor_rank) == rank
        coordinates.add((t.pipe_rank, t.data_rank, t.tensor_rank))
    assert len(coordinates) == 512


def test_neighbors_and_the_rank_that_reports_losses():
    t = Topology(pipe_size=2, data_size=2, tensor_size=2, rank=3)
    assert (t.pipe_rank, t.data_rank, t.tensor_rank) == (0, 1, 1)
    assert t.neighbor(1) == 7
    assert t.loss_rank() == 6


def test_coordinates_agree_with_deepspeed():
    from deepspeed.runtime.pipe.topology import ProcessTopology

    deepspeed_topology = ProcessTopology(axes=["pipe", "data", "model"], dims=[3, 4, 2])
    for rank in range(24):
        topology = Topology(3, 4, 2, rank)
        expected = deepspeed_topology.get_coord(rank)
        coordinates = (topology.pipe_rank, topology.data_rank, topology.tensor_rank)
        assert coordinates == (expected.pipe, expected.data, expected.model)


@pytest.mark.parametrize(
    ("blocks", "stages", "bounds"),
    [
        (4, 1, [0, 7]),
        (4, 2, [0, 3, 7]),
        (4, 4, [0, 2, 3, 4, 7]),
        (5, 2, [0, 4, 8]),
        (5, 3, [0, 3, 5, 8]),
        (6, 4, [0, 2, 4, 6, 9]),
    ],
)
def test_stage_bounds(blocks, stages, bounds):
    assert stage_bounds(blocks, stages, before=1, after=2) == bounds
