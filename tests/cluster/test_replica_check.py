"""Ranks that drift apart are found and named.

Run alone: python -m pytest tests/cluster/test_replica_check.py
"""

from __future__ import annotations

import pytest
import torch
from engines import small_gpt
from ranks import on_ranks

from megatron_doremi.cluster.replica_check import ReplicaDigest, bits_hash, find_mismatches

GPT = small_gpt(max_positions=12)


def drift(launch, what, on_rank):
    """Plants a difference on one rank of a 2 x 2 layout (tensor x data) and returns what the check says."""
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

    if what == "whole, ZeRO 3":
        module = GPTModel(GPT, context, seed=1, partition=partition)
    else:
        module = GPTPipeline(GPT, context, seed=1)
    state = {"doremi": {"weights": {"a": 0.5}}}
    check_replicas(module, state, topology, 1)
    if launch.rank == on_rank:
        parameters = dict(module.model_parameters())
        if what == "state":
            state["doremi"]["weights"]["a"] = 0.5 + 2**-53
        elif what == "cut":
            parameters["layers.1.mlp.fc1.weight"].data[3, 2] *= 1 + 2**-23
        elif what == "whole":
            parameters["final_norm.weight"].data[0] += 2**-20
        elif what == "whole, ZeRO 3":
            parameters["final_norm.weight"].ds_tensor[0] += 2**-20
    try:
        check_replicas(module, state, topology, 7)
    except ReplicaMismatch as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("what", "on_rank", "words"),
    [
        ("nothing", 0, []),
        ("state", 3, ["after iteration 7", "domain weights or blend: rank 3 against ranks 0, 1, 2"]),
        ("cut", 2, ["parameters of replicas: rank 2 against rank 0"]),
        ("whole, ZeRO 3", 1, ["parameters that tensor ranks share: rank 1 against rank 0"]),
        ("whole", 1, ["parameters of replicas: ", "parameters that tensor ranks share: rank 1 against ranks 0, 2, 3"]),
    ],
)
def test_a_planted_difference_is_named(what, on_rank, words):
    for said in on_ranks(4, drift, what, on_rank):
        assert bool(said) == bool(words)
        for word in words:
            assert word in said


def test_the_hash_sees_a_bit_and_a_place():
    a = torch.arange(10.0)
    flipped = a.clone()
    flipped.view(torch.int32)[4] ^= 1
    turned = a.clone()
    turned[[2, 5]] = turned[[5, 2]]
    assert len({bits_hash([x]) for x in (a, flipped, turned, a.bfloat16())}) == 4
    assert bits_hash([a]) == bits_hash([a.clone()])
    assert bits_hash([a[:5], a[5:]]) != bits_hash([a[5:], a[:5]])


def test_stages_need_not_agree_with_each_other():
    digests = [
        ReplicaDigest(rank, pipe=rank, tensor=0, part=0, state="s", parameters=f"p{rank}", replicated="r")
        for rank in (0, 1)
    ]
    assert find_mismatches(digests) == []
