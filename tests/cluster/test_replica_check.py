"""The replica check finds and names ranks whose state or parameters diverge.

Run alone: python -m pytest tests/cluster/test_replica_check.py
"""

from __future__ import annotations

import pytest
import torch
from engines import small_gpt
from ranks import on_ranks

from megatron_doremi.cluster.replica_check import ReplicaDigest, bits_hash, find_mismatches

GPT = small_gpt(max_positions=12)


def error_after_change(launch, changed, on_rank):
    """Plants a difference on one rank of a 2 x 2 layout (tensor x data); returns the error message of the check."""
    import deepspeed

    from megatron_doremi.cluster.process_group import join
    from megatron_doremi.cluster.replica_check import ReplicaMismatch, check_replicas
    from megatron_doremi.model.pipeline import GPTPipeline
    from megatron_doremi.model.unpipelined import GPTModel
    from megatron_doremi.parallel.context import make_context
    from megatron_doremi.parallel.topology import Topology

    device, _ = join(launch)
    topology = Topology(1, 2, 2, launch.rank)
    context = make_context(topology, device)

    def partition(layer):
        deepspeed.zero.Init(layer, context.groups.data, dtype=torch.float32)

    if changed == "replicated, ZeRO 3":
        module = GPTModel(GPT, context, seed=1, partition=partition)
    else:
        module = GPTPipeline(GPT, context, seed=1)
    state = {"doremi": {"weights": {"a": 0.5}}}
    check_replicas(module, state, topology, 1)
    if launch.rank == on_rank:
        parameters = dict(module.model_parameters())
        if changed == "state":
            state["doremi"]["weights"]["a"] = 0.5 + 2**-53
        elif changed == "sharded":
            parameters["layers.1.mlp.fc1.weight"].data[3, 2] *= 1 + 2**-23
        elif changed == "replicated":
            parameters["final_norm.weight"].data[0] += 2**-20
        elif changed == "replicated, ZeRO 3":
            parameters["final_norm.weight"].ds_tensor[0] += 2**-20
    try:
        check_replicas(module, state, topology, 7)
    except ReplicaMismatch as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("changed", "on_rank", "expected"),
    [
        ("nothing", 0, []),
        ("state", 3, ["after iteration 7", "domain weights or blend: rank 3 against ranks 0, 1, 2"]),
        ("sharded", 2, ["parameters of replicas: rank 2 against rank 0"]),
        ("replicated, ZeRO 3", 1, ["parameters that tensor ranks share: rank 1 against rank 0"]),
        (
            "replicated",
            1,
            ["parameters of replicas: ", "parameters that tensor ranks share: rank 1 against ranks 0, 2, 3"],
        ),
    ],
)
def test_a_planted_difference_is_named(changed, on_rank, expected):
    for message in on_ranks(4, error_after_change, changed, on_rank):
        assert bool(message) == bool(expected)
        for text in expected:
            assert text in message


def test_the_hash_depends_on_every_bit_and_position():
    a = torch.arange(10.0)
    flipped = a.clone()
    flipped.view(torch.int32)[4] ^= 1
    exchanged = a.clone()
    exchanged[[2, 5]] = exchanged[[5, 2]]
    assert len({bits_hash([x]) for x in (a, flipped, exchanged, a.bfloat16())}) == 4
    assert bits_hash([a]) == bits_hash([a.clone()])
    assert bits_hash([a[:5], a[5:]]) != bits_hash([a[5:], a[:5]])


def test_different_stages_are_not_compared():
    digests = [
        ReplicaDigest(rank, pipe=rank, tensor=0, part=0, state="s", parameters=f"p{rank}", replicated="r")
        for rank in (0, 1)
    ]
    assert find_mismatches(digests) == []
