"""What a step holds: peak bytes of the allocator, measured, against the formula.

Run alone: python -m pytest tests/planning/test_memory.py -s
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from engines import build_engine, layout, make_config, small_gpt
from planning.measured import micro_batches, peak_of, peak_of_a_run, waits_for_gloo
from ranks import on_ranks

from megatron_doremi.config import ParallelConfig, TrainingConfig
from megatron_doremi.parallel.topology import Topology
from megatron_doremi.plan import make_plan
from megatron_doremi.planning.compute import matrices_of_a_block, muon_bytes
from megatron_doremi.planning.memory import (
    held_micro_batches,
    host_bytes_per_parameter,
    loss_bytes,
    micro_batch_bytes,
    parameters_by_stage,
    stage_memories,
)

pytestmark = pytest.mark.slow

# LayerNorm, because RMSNorm keeps more on a CPU than its kernel on a GPU (see docs/memory.md).
GPT = small_gpt(
    num_layers=3,
    hidden_size=128,
    ffn_hidden_size=320,
    kv_channels=32,
    normalization="LayerNorm",
    vocab_size=512,
    max_positions=128,
)
WINDOWS, SEQ, K = 2, 128, 3


def peak_bytes(launch, pipe, tensor, parallel, gpt, bf16, training):
    """This rank's peak of allocated bytes in a step, over what was there before: {update: [by micro-batches]}."""
    context = layout(launch, pipe, tensor, parallel.get("sequence_parallel", False))
    return {
        update: [peak_of_a_step(context, parallel, gpt, bf16, update, count, training) for count in MICRO_BATCHES]
        for update in ("alternating", "simultaneous")
    }


def peak_of_a_step(context, parallel, gpt, bf16, update, count, training):
    import torch
    from torch.profiler import ProfilerActivity, profile

    topology = context.topology
    batch = count * WINDOWS * topology.data_size
    data = {"phase": "proxy", "seq_length": SEQ, "micro_batch_size": WINDOWS, "global_batch_size": batch}
    config = make_config(topology, data, parallel, {"doremi_update": update}, training, bf16=bf16)
    engine = build_engine(config, gpt, np.full(K, 1 / K), context)
    batches = micro_batches(WINDOWS, SEQ, count, config.training.drops)
    targets = torch.tensor([batch * SEQ, 0, 0], dtype=torch.float64)
    # The first step makes the optimizer's state.
    engine.train_step(batches, targets)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded, waits_for_gloo():
        engine.train_step(batches, targets)
    return peak_of(recorded.profiler.kineto_results.events())


CASES = {
    # ranks, stages, tensor ranks, flags
    "float32": (1, 1, 1, {}),
    "selective": (1, 1, 1, {"recompute_granularity": "selective"}),
    "full": (1, 1, 1, {"recompute_granularity": "full"}),
    "all logits": (1, 1, 1, {"loss_chunk_tokens": 0}),
    "bfloat16": (1, 1, 1, {"zero_stage": 1}),
    "normalized queries, bfloat16": (1, 1, 1, {"zero_stage": 1}),
    "dropout": (1, 1, 1, {}),
    "dropout, selective": (1, 1, 1, {"recompute_granularity": "selective"}),
    "dropout, bfloat16": (1, 1, 1, {"zero_stage": 1}),
    "TP2 sequence parallel": (2, 1, 2, {"sequence_parallel": True}),
    "PP3": (3, 3, 1, {}),
    "DP2 ZeRO2": (2, 1, 1, {"zero_stage": 2}),
    "DP2 ZeRO3": (2, 1, 1, {"zero_stage": 3}),
}
MICRO_BATCHES = (4, 16)
DROPOUT = {"attention_dropout": 0.1, "hidden_dropout": 0.1}
SLACK = 100_000
# Of several processes: a buffer that gloo has not let go of in time; the model has 2.4 MiB of gradients.
LATE = 5 * 2**20


@pytest.mark.parametrize("case", CASES)
def test_what_twelve_more_micro_batches_take(case):
    """The peak grows from 4 to 16 micro-batches by what the formula says, and by nothing where one is held."""
    world, pipe, tensor, flags = CASES[case]
    flags = {"loss_chunk_tokens": 64, **flags}
    parallel, bf16 = ParallelConfig(tensor, pipe, **flags), "bfloat16" in case
    gpt = replace(GPT, qk_layernorm=case.startswith("normalized"))
    slack = LATE if world > 1 else SLACK
    dropout = DROPOUT if case.startswith("dropout") else {}
    for rank, peaks in enumerate(on_ranks(world, peak_bytes, pipe, tensor, flags, gpt, bf16, dropout)):
        stage = rank // (world // pipe)
        sizes = (WINDOWS * SEQ, 2 if bf16 else 4, gpt.num_layers // pipe, stage)
        one = micro_batch_bytes(gpt, parallel, *sizes, TrainingConfig(**dropout))
        for update, (few, many) in peaks.items():
            alternating = update == "alternating"
            before, after = (
                held_micro_batches(alternating, count, pipe, stage, parallel.zero_stage) for count in MICRO_BATCHES
            )
            grown, expected = many - few, (after - before) * one
            print(f"{case}, rank {rank}, {update}: {grown / 2**20:.1f} MiB, formula {expected / 2**20:.1f}")
            assert 0.98 * expected - slack < grown < 1.08 * expected + slack
            assert (after > before) == (alternating and parallel.zero_stage < 3)


LOSSES = {
    # hidden size, tokens of a chunk (0: all, held), flags
    "chunks, narrow": (128, 64, ""),
    "chunks, wide": (1024, 64, ""),
    "one chunk, narrow": (128, 256, ""),
    "one chunk, wide": (1024, 256, ""),
    "held": (128, 0, ""),
    "padded chunks": (1024, 64, "padded"),
    "padded, one chunk": (1024, 256, "padded"),
    "padded, held": (1024, 0, "padded"),
    "chunks, compiled": (128, 64, "compiled"),
    "one chunk, compiled": (128, 256, "compiled"),
    "held, compiled": (64, 0, "compiled"),
    # Not of chunks, nor of one that is compiled: a CPU multiplies them in float32 for the gradient of the weights.
    "one chunk, bfloat16": (128, 256, "bfloat16"),
    "held, narrow, bfloat16": (128, 0, "bfloat16"),
    "held, wide, bfloat16": (2048, 0, "bfloat16"),
    "padded, one chunk, bfloat16": (128, 256, "bfloat16 padded"),
    "padded, held, bfloat16": (2048, 0, "bfloat16 padded"),
    "held, compiled, bfloat16": (512, 0, "bfloat16 compiled"),
}


@pytest.mark.parametrize("case", LOSSES)
def test_what_the_loss_takes(case):
    """The allocator's peak while a micro-batch of 256 tokens has its loss computed and differentiated."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from megatron_doremi.execution import Execution
    from megatron_doremi.parallel.cross_entropy import token_losses
    from megatron_doremi.parallel.groups import TensorGroup

    hidden, chunk, flags = LOSSES[case]
    compiled, dtype = "compiled" in flags, torch.bfloat16 if "bfloat16" in flags else torch.float32
    vocab = 8100 if "padded" in flags else 8192
    gpt = small_gpt(hidden_size=hidden, vocab_size=vocab, make_vocab_size_divisible_by=128)
    assert gpt.padded_vocab_size(1) == 8192
    states = torch.randn(1, 256, hidden, dtype=dtype, requires_grad=True)
    weight = torch.randn(8192, hidden, dtype=dtype, requires_grad=True)
    targets = torch.zeros(1, 256, dtype=torch.int64)
    execution = Execution(loss_chunk_tokens=chunk, compiled=compiled)
    inputs = states, weight, targets, vocab, TensorGroup(None, 1, 0)
    if compiled:
        token_losses(*inputs, execution).sum().backward()
        states.grad = weight.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        token_losses(*inputs, execution).sum().backward()
    peak = peak_of(recorded.profiler.kineto_results.events())
    parallel = ParallelConfig(loss_chunk_tokens=chunk, compile=compiled)
    expected = loss_bytes(gpt, parallel, 256, element=dtype.itemsize, trains=True)
    # All logits are held beside it.
    expected += 0 if chunk else dtype.itemsize * 8192 * 256
    print(f"{case}: {peak / 2**20:.1f} MiB, formula {expected / 2**20:.1f}")
    # The gradients of the hidden states come on top.
    assert 0.99 * expected <= peak < 1.02 * expected + 2 * 256 * hidden * 4


# Of one run each: what decides the peak is activations, the loss and the state, in this order.
SHAPES = {
    "activations": GPT,
    "loss": small_gpt(
        num_layers=4,
        hidden_size=256,
        ffn_hidden_size=1024,
        num_query_groups=4,
        kv_channels=64,
        normalization="LayerNorm",
        swiglu=False,
        bias_linear=True,
        vocab_size=8192,
        max_positions=128,
    ),
    "state": small_gpt(
        num_layers=6,
        hidden_size=256,
        ffn_hidden_size=1024,
        num_query_groups=4,
        kv_channels=64,
        normalization="LayerNorm",
        tied_embeddings=False,
        vocab_size=2048,
        max_positions=128,
    ),
}
LAYOUTS = {
    # stages, replicas, tensor ranks, flags, bfloat16, phase
    "one process": (1, 1, 1, {}, False, "main"),
    "proxy": (1, 1, 1, {"recompute_granularity": "selective"}, False, "proxy"),
    "recomputed": (1, 1, 1, {"recompute_granularity": "full"}, False, "main"),
    "ZeRO 3 alone": (1, 1, 1, {"zero_stage": 3}, True, "main"),
    "TP 2, sequence parallel": (1, 1, 2, {"sequence_parallel": True}, False, "main"),
    "PP 2": (2, 1, 1, {}, False, "main"),
    "PP 2 x DP 2": (2, 2, 1, {}, False, "main"),
    "PP 2 x DP 2, ZeRO 1": (2, 2, 1, {"zero_stage": 1}, True, "main"),
    "ZeRO 1": (1, 2, 1, {"zero_stage": 1}, True, "main"),
    "ZeRO 1, float32": (1, 2, 1, {"zero_stage": 1}, False, "main"),
    "ZeRO 2": (1, 2, 1, {"zero_stage": 2}, True, "main"),
    "ZeRO 2, float32": (1, 2, 1, {"zero_stage": 2}, False, "main"),
    "ZeRO 2, offloaded": (1, 1, 1, {"zero_stage": 2, "cpu_offload": True}, True, "main"),
    "ZeRO 3, offloaded": (1, 2, 1, {"zero_stage": 3, "cpu_offload": True}, True, "main"),
    "ZeRO 3": (1, 2, 1, {"zero_stage": 3}, True, "main"),
    "Muon": (1, 1, 1, {}, False, "main"),
    "Muon, ZeRO 1": (1, 2, 1, {"zero_stage": 1}, True, "main"),
    "dropout": (1, 1, 1, {}, False, "main"),
    "dropout, bfloat16, proxy": (1, 1, 1, {"zero_stage": 1}, True, "proxy"),
    "dropout, selective": (1, 1, 1, {"recompute_granularity": "selective"}, False, "main"),
    "dropout, recomputed, proxy": (1, 1, 1, {"recompute_granularity": "full"}, False, "proxy"),
    "dropout, TP 2, sequence parallel": (1, 1, 2, {"sequence_parallel": True}, False, "main"),
}


# Layouts that are measured with every shape; the others with the first.
OF_EVERY_SHAPE = ("Muon, ZeRO 1", "one process", "TP 2, sequence parallel", "ZeRO 1", "ZeRO 2", "ZeRO 3")


@pytest.mark.parametrize(
    ("case", "shape"),
    [(case, shape) for case in LAYOUTS for shape in SHAPES if shape == "activations" or case in OF_EVERY_SHAPE],
)
def test_all_that_a_rank_holds(case, shape):
    """The whole peak, from before the model is built, is within 10 % of what a dry run prints for the rank's stage."""
    (pipe, replicas, tensor, flags, bf16, phase), gpt = LAYOUTS[case], SHAPES[shape]
    parallel, topology = {"loss_chunk_tokens": 128, **flags}, Topology(pipe, replicas, tensor)
    data = {"phase": phase, "seq_length": SEQ, "micro_batch_size": 4, "global_batch_size": 4 * 4 * replicas}
    dropout = DROPOUT if case.startswith("dropout") else {}
    optimizer = "muon" if case.startswith("Muon") else "adam"
    config = make_config(topology, data, parallel, training=dropout, bf16=bf16, optimizer=optimizer)
    planned = stage_memories(make_plan(config, topology, gpt, ("text",), (1,), np.ones(1)), phase == "proxy", None)
    arguments = (pipe, tensor, gpt, data, parallel, {}, bf16, dropout, optimizer)
    peaks = on_ranks(pipe * replicas * tensor, peak_of_a_run, *arguments)
    for rank, peak in enumerate(peaks):
        stage = rank // (replicas * tensor)
        # On a CPU the device is the host.
        on_host = host_bytes_per_parameter(config, replicas) * parameters_by_stage(gpt, tensor, pipe)[stage]
        total = planned[stage].total + on_host
        if flags.get("zero_stage") == 2 and not on_host:
            # gloo copies what a reduce-scatter reads, here all gradients at the end of a backward pass.
            numbers = planned[stage].parameters
            total = max(total, planned[stage].state + (8.0 + 4.0 / replicas) * numbers)
        if case == "Muon, ZeRO 1":
            # gloo gathers into a copy.
            copy = 4 * gpt.num_layers * sum(rows * columns for rows, columns in matrices_of_a_block(gpt))
            joined = muon_bytes(gpt, config.parallel, gpt.num_layers, replicas)
            total = max(total, planned[stage].state + joined + copy)
        print(f"{case}, {shape}, rank {rank}: {peak / 2**20:.1f} MiB, planned {total / 2**20:.1f}")
        assert 0.9 * peak < total < 1.1 * peak
