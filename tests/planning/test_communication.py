"""The bytes that a plan counts over each group, against the collectives of a real step.

Run alone: python -m pytest tests/planning/test_communication.py
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from engines import make_config, small_gpt
from planning.measured import collectives_of_a_reference, collectives_of_a_step, gathered_by_a_compiled_step
from ranks import on_ranks

from megatron_doremi.parallel.topology import Topology
from megatron_doremi.plan import make_plan
from megatron_doremi.planning.communication import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, SEND, stage_traffic

GPT = {"num_layers": 3, "hidden_size": 64, "ffn_hidden_size": 96, "num_query_groups": 4, "kv_channels": 16}
BIASED = {"swiglu": False, "bias_linear": True, "qk_layernorm": True, "tied_embeddings": False}
LEARNED = {"position_embedding_type": "learned_absolute", "normalization": "LayerNorm", "bias_linear": True}
CASES = {
    # stages, replicas, tensor ranks, flags, bfloat16, phase, shape
    "TP 2": (1, 1, 2, {}, False, "main", {}),
    "TP 2, all logits": (1, 1, 2, {"loss_chunk_tokens": 0}, True, "main", BIASED),
    "TP 2, sequence parallel": (1, 1, 2, {"sequence_parallel": True}, False, "main", LEARNED),
    "TP 2, sequence parallel, bias": (1, 1, 2, {"sequence_parallel": True}, True, "proxy", BIASED),
    "TP 2, recomputed": (1, 1, 2, {"recompute_granularity": "full"}, False, "main", {}),
    "TP 2, sequence parallel, recomputed": (
        1,
        1,
        2,
        {"sequence_parallel": True, "recompute_granularity": "full"},
        False,
        "main",
        LEARNED,
    ),
    "PP 2": (2, 1, 1, {}, False, "main", {}),
    "PP 2, alternating": (2, 1, 1, {}, True, "proxy", {}),
    "PP 2, untied": (2, 1, 1, {}, False, "main", BIASED),
    "PP 3": (3, 1, 1, {}, False, "main", {}),
    "PP 2 x DP 2": (2, 2, 1, {}, False, "main", {}),
    "PP 2 x DP 2, ZeRO 1": (2, 2, 1, {"zero_stage": 1}, True, "proxy", {}),
    "DP 2": (1, 2, 1, {}, False, "main", {}),
    "DP 2, ZeRO 1": (1, 2, 1, {"zero_stage": 1}, True, "main", {}),
    "DP 2, ZeRO 1, float32": (1, 2, 1, {"zero_stage": 1}, False, "main", {}),
    "DP 2, ZeRO 2": (1, 2, 1, {"zero_stage": 2}, True, "main", {}),
    "DP 2, ZeRO 2, alternating": (1, 2, 1, {"zero_stage": 2}, False, "proxy", {}),
    "DP 2, ZeRO 2, offloaded": (1, 2, 1, {"zero_stage": 2, "cpu_offload": True}, True, "main", {}),
    "DP 2, ZeRO 3": (1, 2, 1, {"zero_stage": 3}, True, "main", {}),
    "DP 2, ZeRO 3, alternating": (1, 2, 1, {"zero_stage": 3}, False, "proxy", {}),
    "DP 2, ZeRO 1, Muon": (1, 2, 1, {"zero_stage": 1}, True, "main", {}),
    "TP 2, Muon": (1, 1, 2, {}, False, "main", BIASED),
    "PP 3, Muon": (3, 1, 1, {}, False, "main", {}),
    "DP 2 x TP 2, ZeRO 1, Muon": (1, 2, 2, {"zero_stage": 1}, False, "main", {}),
    "DP 2, ZeRO 3, recomputed": (1, 2, 1, {"zero_stage": 3, "recompute_granularity": "full"}, True, "main", {}),
}
OPERATIONS = {
    "allreduce_": ALL_REDUCE,
    "_allgather_base_": ALL_GATHER,
    "allgather_": ALL_GATHER,
    "_reduce_scatter_base_": REDUCE_SCATTER,
    "send": SEND,
}
# The flags of a step, norms and statistics by domain have fewer numbers.
SMALLEST = 12
MICRO_BATCHES, WINDOWS, SEQ = 3, 2, 32


@pytest.mark.parametrize("case", CASES)
def test_bytes_of_a_step(case):
    """Payloads are equal to the byte, on every stage."""
    pipe, replicas, tensor, flags, bf16, phase, shape = CASES[case]
    parallel = {"loss_chunk_tokens": 48, **({"zero_stage": 1} if bf16 else {}), **flags}
    gpt = small_gpt(**{**GPT, "vocab_size": 192, "max_positions": SEQ, **shape})
    data = {"phase": phase, "seq_length": SEQ, "micro_batch_size": WINDOWS}
    data["global_batch_size"] = MICRO_BATCHES * WINDOWS * replicas
    world_size, topology = pipe * replicas * tensor, Topology(pipe, replicas, tensor)
    optimizer = "muon" if case.endswith("Muon") else "adam"
    config = make_config(topology, data, parallel, bf16=bf16, optimizer=optimizer)
    plan = make_plan(config, topology, gpt, ("text",), (1,), np.ones(1))
    every = on_ranks(world_size, collectives_of_a_step, pipe, tensor, gpt, data, parallel, {}, bf16, optimizer)
    for rank, calls in enumerate(every):
        print(f"{case}, rank {rank}: {measured(calls)}")
        traffic = stage_traffic(plan, phase == "proxy", None, rank // (replicas * tensor))
        assert planned(traffic) == measured(calls)
        # Of replicas, DeepSpeed decides how many parameters a collective has.
        if replicas == 1:
            counted = sum(number > SMALLEST and name != "recv_" for name, number, _ in calls)
            assert sum(each.calls for each in traffic) == counted


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_gathers_of_a_compiled_step(recompute):
    """A graph keeps the gathered input of a layer for the backward pass instead of gathering it again."""
    gpt, topology = small_gpt(**{**GPT, "vocab_size": 192, "max_positions": SEQ}), Topology(1, 1, 2)
    data = {"phase": "main", "seq_length": SEQ, "micro_batch_size": WINDOWS, "global_batch_size": 2 * WINDOWS}
    parallel = {"loss_chunk_tokens": 48, "sequence_parallel": True, "recompute_granularity": recompute}
    config = make_config(topology, data, {**parallel, "compile": True})
    plan = make_plan(config, topology, gpt, ("text",), (1,), np.ones(1))
    gathers = [each for each in stage_traffic(plan, False, None, 0) if each.operation == ALL_GATHER]
    for found in on_ranks(2, gathered_by_a_compiled_step, 2, gpt, data, parallel):
        large = [4 * numbers for numbers in found if numbers > SMALLEST]
        assert (len(large), sum(large)) == (sum(e.calls for e in gathers), sum(e.payload for e in gathers))


def collectives_with_small_limits(launch, *arguments):
    """See `collectives_of_a_step`; ZeRO 3 releases weights as it would those of a model of many billions."""
    from megatron_doremi.engine import build

    entries = build.deepspeed_config

    def with_limits(*plan):
        result = entries(*plan)
        limits = {"max_reuse_distance": 100, "max_live_parameters": 50_000, "prefetch_bucket_size": 30_000}
        result["zero_optimization"] |= {f"stage3_{name}": value for name, value in limits.items()}
        return result

    build.deepspeed_config = with_limits
    return collectives_of_a_step(launch, *arguments)


def test_zero_3_gathers_a_large_model_twice(monkeypatch):
    """For the forward and for the backward pass; the last layers stay, since both are close: the plan counts them."""
    monkeypatch.setattr("megatron_doremi.planning.communication.GATHERED", 50_000)
    gpt = small_gpt(**{**GPT, "num_layers": 6, "vocab_size": 192, "max_positions": SEQ})
    data = {"phase": "main", "seq_length": SEQ, "micro_batch_size": WINDOWS}
    data["global_batch_size"] = MICRO_BATCHES * WINDOWS * 2
    parallel, topology = {"zero_stage": 3, "loss_chunk_tokens": 48}, Topology(1, 2, 1)
    plan = make_plan(make_config(topology, data, parallel, bf16=True), topology, gpt, ("text",), (1,), np.ones(1))
    expected = planned(stage_traffic(plan, False, None, 0))
    for calls in on_ranks(2, collectives_with_small_limits, 1, 1, gpt, data, parallel, {}, True):
        found = measured(calls)
        print(f"ZeRO 3, small limits: {found}, planned {expected}")
        assert found[REDUCE_SCATTER] == expected[REDUCE_SCATTER]
        assert 0.9 * expected[ALL_GATHER] < found[ALL_GATHER] <= expected[ALL_GATHER]


@pytest.mark.parametrize(("pipe", "tensor", "sequence_parallel"), [(2, 1, False), (1, 2, False), (1, 2, True)])
def test_bytes_of_an_online_reference(pipe, tensor, sequence_parallel):
    """What a proxy with one exchanges beyond a proxy without, against the forward passes of a frozen model."""
    gpt, topology = small_gpt(**{**GPT, "vocab_size": 192, "max_positions": SEQ}), Topology(pipe, 1, tensor)
    data = {"phase": "proxy", "seq_length": SEQ, "micro_batch_size": WINDOWS}
    data["global_batch_size"] = MICRO_BATCHES * WINDOWS
    config = make_config(topology, data, {"loss_chunk_tokens": 48, "sequence_parallel": sequence_parallel})
    plan = make_plan(config, topology, gpt, ("text",), (1,), np.ones(1))
    arguments = (pipe, tensor, gpt, (WINDOWS, SEQ), MICRO_BATCHES, sequence_parallel, 48)
    for rank, calls in enumerate(on_ranks(2, collectives_of_a_reference, *arguments)):
        alone, with_reference = (
            planned(stage_traffic(plan, True, reference, rank // tensor)) for reference in (None, gpt)
        )
        assert with_reference - alone == measured(calls)


def measured(calls) -> Counter[str]:
    """Bytes by operation."""
    found: Counter[str] = Counter()
    for name, numbers, size in calls:
        if numbers > SMALLEST and name != "recv_":
            found[OPERATIONS[name]] += numbers * size
    return found


def planned(traffic) -> Counter[str]:
    """Bytes by operation."""
    found: Counter[str] = Counter()
    for each in traffic:
        found[each.operation] += each.payload
    return found
