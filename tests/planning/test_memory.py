"""What the alternating schedule holds: peak bytes of the allocator, measured, against the formula.

Run alone: python -m pytest tests/planning/test_memory.py -s
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from engines import build_engine, layout, make_config, small_gpt
from ranks import on_ranks

from megatron_doremi.config import ParallelConfig
from megatron_doremi.planning.memory import held_micro_batches, loss_bytes, micro_batch_bytes

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


def peak_bytes(launch, pipe, tensor, parallel, gpt, bf16):
    """This rank's peak of allocated bytes in a step, over what was there before: {update: [by micro-batches]}."""
    context = layout(launch, pipe, tensor, parallel.get("sequence_parallel", False))
    return {
        update: [peak_of_a_step(context, parallel, gpt, bf16, update, count) for count in MICRO_BATCHES]
        for update in ("alternating", "simultaneous")
    }


def peak_of_a_step(context, parallel, gpt, bf16, update, count):
    import torch
    from torch.profiler import ProfilerActivity, profile

    from megatron_doremi.data.loader import MicroBatch

    topology = context.topology
    batch = count * WINDOWS * topology.data_size
    data = {"phase": "proxy", "seq_length": SEQ, "micro_batch_size": WINDOWS, "global_batch_size": batch}
    config = make_config(topology, data, parallel, {"doremi_update": update}, bf16=bf16)
    engine = build_engine(config, gpt, np.full(K, 1 / K), context)
    ids = torch.zeros(WINDOWS, SEQ, dtype=torch.int64)
    batches = [MicroBatch(ids, ids, ids[:, 0], ids[:, 0], torch.zeros(WINDOWS, SEQ)) for _ in range(count)]
    targets = torch.tensor([batch * SEQ, 0, 0], dtype=torch.float64)
    # The first step makes the optimizer's state.
    engine.train_step(batches, targets)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        engine.train_step(batches, targets)
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return int(np.cumsum([e.nbytes() for e in events]).max())


CASES = {
    # ranks, stages, tensor ranks, flags
    "float32": (1, 1, 1, {}),
    "selective": (1, 1, 1, {"recompute_granularity": "selective"}),
    "full": (1, 1, 1, {"recompute_granularity": "full"}),
    "all logits": (1, 1, 1, {"loss_chunk_tokens": 0}),
    "bfloat16": (1, 1, 1, {"zero_stage": 1}),
    "normalized queries, bfloat16": (1, 1, 1, {"zero_stage": 1}),
    "TP2 sequence parallel": (2, 1, 2, {"sequence_parallel": True}),
    "PP3": (3, 3, 1, {}),
    "DP2 ZeRO2": (2, 1, 1, {"zero_stage": 2}),
    "DP2 ZeRO3": (2, 1, 1, {"zero_stage": 3}),
}
MICRO_BATCHES = (4, 16)
# gloo's threads let go of a collective's buffers when they come to it; some of the model's 2.4 MiB of gradients.
LATE = 16 * 2**20


@pytest.mark.parametrize("case", CASES)
def test_what_twelve_more_micro_batches_take(case):
    """The peak grows from 4 to 16 micro-batches by what the formula says, and by nothing where one is held."""
    world, pipe, tensor, flags = CASES[case]
    flags = {"loss_chunk_tokens": 64, **flags}
    parallel, bf16 = ParallelConfig(tensor, pipe, **flags), "bfloat16" in case
    gpt = replace(GPT, qk_layernorm=case.startswith("normalized"))
    late = LATE if world > 1 else 100_000
    for rank, peaks in enumerate(on_ranks(world, peak_bytes, pipe, tensor, flags, gpt, bf16)):
        stage = rank // (world // pipe)
        one = micro_batch_bytes(gpt, parallel, WINDOWS * SEQ, 2 if bf16 else 4, gpt.num_layers // pipe, stage)
        for update, (few, many) in peaks.items():
            alternating = update == "alternating"
            before, after = (
                held_micro_batches(alternating, count, pipe, stage, parallel.zero_stage) for count in MICRO_BATCHES
            )
            grown, expected = many - few, (after - before) * one
            print(f"{case}, rank {rank}, {update}: {grown / 2**20:.1f} MiB, formula {expected / 2**20:.1f}")
            assert 0.98 * expected - late < grown < 1.08 * expected + late
            assert (after > before) == (alternating and parallel.zero_stage < 3)


@pytest.mark.parametrize(("hidden", "chunk"), [(128, 64), (1024, 64), (128, 256), (1024, 256)])
def test_what_the_loss_takes(hidden, chunk):
    """The allocator's peak while a micro-batch of 256 tokens has its loss computed and differentiated."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from megatron_doremi.parallel.cross_entropy import token_losses
    from megatron_doremi.parallel.groups import TensorGroup

    gpt = small_gpt(hidden_size=hidden, vocab_size=8192)
    states, weight = (torch.randn(*shape, requires_grad=True) for shape in ((1, 256, hidden), (8192, hidden)))
    targets = torch.zeros(1, 256, dtype=torch.int64)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        token_losses(states, weight, targets, 8192, TensorGroup(None, 1, 0), chunk).sum().backward()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    peak = int(np.cumsum([e.nbytes() for e in events]).max())
    expected = loss_bytes(gpt, ParallelConfig(loss_chunk_tokens=chunk), 256, element=4, trains=True)
    print(f"hidden {hidden}, chunk {chunk}: {peak / 2**20:.1f} MiB, formula {expected / 2**20:.1f}")
    # The gradients of the hidden states come on top.
    assert expected <= peak < 1.02 * expected + 2 * 256 * hidden * 4
