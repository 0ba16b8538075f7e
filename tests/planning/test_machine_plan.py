"""What a dry run prints of memory, arithmetic, time and communication: by hand.

Run alone: python -m pytest tests/planning/test_machine_plan.py
"""

from __future__ import annotations

import shlex
from dataclasses import replace

import numpy as np
import pytest
import torch
from planning.test_suggested_layouts import BASE, LARGE, LARGE_BLOCK, LARGE_LOSS, LARGE_TOKEN, SMALL
from torch.utils.flop_counter import FlopCounterMode

from megatron_doremi.arguments import parse_config
from megatron_doremi.config import ParallelConfig, TrainingConfig, gpt_config
from megatron_doremi.devices import FLOAT32_TFLOPS, PEAK_TFLOPS
from megatron_doremi.engine.muon import update_of
from megatron_doremi.model.sizes import parameter_specs
from megatron_doremi.parallel.topology import Topology
from megatron_doremi.plan import make_plan
from megatron_doremi.planning import document_memory
from megatron_doremi.planning.communication import DATA, PIPELINE, TENSOR, fewest_on_a_machine, link_of
from megatron_doremi.planning.compute import bubble, muon_bytes, muon_flops, run_flops_per_token
from megatron_doremi.planning.machine_plan import machine_lines, memory_faults
from megatron_doremi.planning.memory import (
    BUCKET,
    block_backward_bytes_per_token,
    block_bytes_per_token,
    buffer_bytes,
    stage_memories,
)
from megatron_doremi.planning.shape_checks import shape_warnings

GIB = 2**30


def plan_of(flags, pipe=1, data=1, tensor=1):
    """A plan of one domain and 256,000 tokens."""
    sizes = f"--tensor-model-parallel-size {tensor} --pipeline-model-parallel-size {pipe}"
    topology = Topology(pipe, data, tensor)
    config = parse_config(shlex.split(f"{BASE} {flags} {sizes}"), topology.world_size)
    gpt = gpt_config(config.model, config.data.seq_length, 256_000)
    return make_plan(config, topology, gpt, ("text",), (10**6,), np.ones(1))


def test_the_stages_of_a_pipeline():
    """ZeRO 1 over 4 replicas; the first stage holds 2 micro-batches, the last one the loss and a tied copy."""
    plan = plan_of("main --model-size 8b --zero-stage 1 --micro-batch-size 2", pipe=2, data=4)
    first, last = stage_memories(plan, False, None)
    parameters = 256_000 * 4096 + 16 * LARGE_BLOCK
    assert (first.parameters, last.parameters) == (parameters, parameters + 4096)
    assert first.weights == 2 * parameters
    assert first.gradients == 4 * parameters
    assert first.optimizer == 3 * parameters
    # The last norm is on the last stage; what is sent is held for its gradient.
    blocks = (LARGE_TOKEN - 4 * 4096) // 2
    assert first.activations == 2 * 2048 * (blocks + 2 * 4096)
    assert last.activations == 2048 * (blocks + 2 * 4096 + 4 * 4096)
    assert (first.loss, last.loss) == (0, LARGE_LOSS)
    # Without a loss, the gradients of a block's backward pass come on top.
    assert (first.working, last.working) == (2048 * 2 * (2 * 4096 + 2 * 24576), 0)


def test_zero_3_holds_a_bucket_and_a_shard():
    """A bucket of 500 million float32 numbers lasts; up to a billion parameters are gathered beside the loss."""
    plan = plan_of("main --model-size 8b --zero-stage 3 --micro-batch-size 2", data=64)
    (memory,) = stage_memories(plan, False, None)
    vectors = 32 * (3 * 4096 + 4096 + 24576 + 4096 + 2 * 4096) + 4096
    assert memory.parameters == -(-(LARGE - vectors) // 64) + vectors
    assert memory.weights == 2 * memory.parameters
    # Later the bucket is copied in the order of the shards, which takes less than the loss.
    assert memory.loss == LARGE_LOSS > 4 * BUCKET
    assert memory.working == 4 * BUCKET + 2e9
    assert buffer_bytes(plan.config, 10**6, 1, 10**5)[0] == 4e6
    small = plan_of("main --model-size 280m --zero-stage 3")
    assert stage_memories(small, False, None)[0].working == 4 * SMALL


MASKS = {
    # A kernel takes documents: at most 4 bytes of bounds for 32 tokens.
    "bfloat16": ({}, {}, 1 / 8),
    "as wide as the kernel takes": ({}, {"kv_channels": 256}, 1 / 8),
    "wider than the kernel takes": ({}, {"kv_channels": 264}, 2 * 1024),
    "attention dropout": ({"attention_dropout": 0.1}, {}, 2 * 1024),
}


@pytest.mark.parametrize("case", MASKS)
def test_a_mask_is_as_long_as_the_window(case):
    """Of a model of 4,096 learned positions that is trained on 1,024: 2 x 1,024 bytes a token in bfloat16."""
    training, changes, per_token = MASKS[case]
    plan = plan_of("main --model-size 280m --zero-stage 1 --micro-batch-size 2")
    plan = replace(plan, config=replace(plan.config, training=TrainingConfig(**training)))
    across = replace(plan.gpt, max_positions=4096, **changes)
    within = replace(across, reset_attention_mask=True)
    without, found = (stage_memories(replace(plan, shape=each), False, None)[0] for each in (across, within))
    assert found.activations - without.activations == 2048 * per_token
    # In float32 there is always a mask.
    single = replace(plan, config=replace(plan.config, optimizer=replace(plan.config.optimizer, bf16=False)))
    without, found = (stage_memories(replace(single, shape=each), False, None)[0] for each in (across, within))
    assert found.activations - without.activations == 2048 * 4 * 1024


def test_attention_by_document_adds_rows_to_its_sum():
    """Per token, with a document in 32 tokens: 5 rows of float32 for 32 heads of 64 channels, and the gradients of the
    output, queries, keys and values, where the feed-forward layer's backward pass has the gradients of its 2 x 2,048
    inner numbers; its inputs are not held any more."""
    parallel, inner = ParallelConfig(), 2 * 2048
    gpt = replace(plan_of("main --model-size 1b --zero-stage 1").gpt, ffn_hidden_size=2048, reset_attention_mask=True)
    plain = block_backward_bytes_per_token(replace(gpt, reset_attention_mask=False), parallel, 2)
    assert plain == 2 * (2 * 2048 + inner)
    by_document = 5 * 4 * 32 * 64 + 2 * (4 * 32 * 64 - inner)
    assert block_backward_bytes_per_token(gpt, parallel, 2) == 2 * 2 * 2048 + by_document
    # Half of the heads and of the inner numbers on each of two tensor ranks.
    assert block_backward_bytes_per_token(gpt, ParallelConfig(2), 2) == 2 * 2 * 2048 + by_document / 2
    # 8 groups of keys and values; 72 channels that are rounded up to 96.
    grouped = replace(gpt, num_query_groups=8, kv_channels=72)
    summed, gradients = 5 * 4 * 32 * 96, 2 * (2 * 32 + 2 * 8 + 2 * 32) * 72
    assert block_backward_bytes_per_token(grouped, parallel, 2) == 2 * 2 * 2048 + summed + gradients - 2 * inner
    # In float32 there is no such kernel, and wide feed-forward layers take more.
    assert block_backward_bytes_per_token(gpt, parallel, 4) == 4 * (2 * 2048 + inner)
    wide = replace(gpt, ffn_hidden_size=8192)
    assert block_backward_bytes_per_token(wide, parallel, 2) == 2 * (2 * 2048 + 2 * 8192)


@pytest.mark.parametrize(("knows_groups", "recompute"), [(False, "none"), (True, "none"), (False, "selective")])
def test_a_kernel_without_groups_holds_their_keys_for_each_query(knows_groups, recompute, monkeypatch):
    """torch 2.11's: keys and values of 24 more heads of 64 channels, in bfloat16."""
    monkeypatch.setattr(document_memory, "KERNEL_KNOWS_GROUPS", knows_groups)
    across = replace(plan_of("main --model-size 1b --zero-stage 1").gpt, num_query_groups=8)
    parallel, held = ParallelConfig(recompute_granularity=recompute), {}
    for masked in (False, True):
        gpt = replace(across, reset_attention_mask=masked)
        held[masked] = [block_bytes_per_token(gpt, parallel, element) for element in (2, 4)]
    more = 0 if knows_groups or recompute == "selective" else 2 * 2 * 24 * 64
    assert held[True] == [held[False][0] + more, held[False][1]]


def test_full_recomputation_holds_one_block_again():
    flags = "main --model-size 8b --zero-stage 1 --recompute-granularity full --micro-batch-size 2"
    alone, _ = stage_memories(plan_of(flags, pipe=2), False, None)
    block = 2 * (8 * 4096 + 2 * 24576)
    assert alone.activations == 2 * 2048 * (16 * 2 * 4096 + 2 * 4096)
    assert alone.working == 2048 * (block + 2 * (2 * 4096 + 2 * 24576))
    # Replicas reduce gradients in place.
    among_four, _ = stage_memories(plan_of(flags, pipe=2, data=4), False, None)
    assert (among_four.activations, among_four.working) == (alone.activations, alone.working)


def test_zero_2_reduces_buckets_beside_activations():
    """A bucket is filled in bfloat16, two are in float32 with the shards that are received; DeepSpeed's, which
    offloads, has a bucket of 500 million in bfloat16, its copy, and that in float32."""
    config = plan_of("main --model-size 280m --zero-stage 2", data=8).config
    largest, ours = 10**9, 10 * 2**20
    beside, at_the_end = 2 * ours + 4.5 * (largest + ours), 6 * largest
    assert buffer_bytes(config, 9 * 10**9, 8, largest) == (0, 0, beside, at_the_end)
    assert buffer_bytes(config, 9 * 10**9, 8, 100) == (0, 0, 11 * ours, 6 * ours)
    # A model that fits one bucket reduces it at the end of the pass.
    assert buffer_bytes(config, 10**6, 8, 10**5) == (0, 0, 0, 6e6)
    config = replace(config, parallel=replace(config.parallel, cpu_offload=True))
    assert buffer_bytes(config, 9 * 10**9, 8, largest) == (0, 0, 8 * BUCKET, 8 * BUCKET)
    assert buffer_bytes(config, 10**6, 8, 10**5) == (0, 0, 2e6, 8e6)


def test_arithmetic_by_hand():
    """Per token 6 x the weights in products and 6 x heads x width x length; a reference adds a third."""
    plan = plan_of("main --model-size 280m --zero-stage 1", data=8)
    matrices = 12 * (4 * 768 * 768 + 2 * 768 * 3072) + 256_000 * 768
    flops = 6 * (matrices + 12 * 768 * 1024)
    assert run_flops_per_token(plan, None) == flops
    assert run_flops_per_token(plan, plan.gpt) == flops * 4 / 3
    tokens = 10 * 512 * 1024
    lines = machine_lines(plan, False, None)
    seconds = tokens * flops / (989e12 * 0.4) / 8
    assert f"arithmetic: {tokens * flops / 10:.2e} FLOP a step, {tokens * flops:.2e} FLOP the run" in lines[-5]
    hours = f"{seconds * 8 / 3600:,.1f} GPU-hours"
    assert lines[-4] == (
        f"time at 40% of H100's 989 TFLOP/s: {seconds / 10:,.3g} s a step, {seconds:,.3f} seconds on 8 GPUs, {hours}"
    )
    single = replace(plan, config=replace(plan.config, optimizer=replace(plan.config.optimizer, bf16=False)))
    seconds *= 989 / 67
    assert any(
        line.startswith(f"time at 40% of H100's 67 TFLOP/s in float32: {seconds / 10:,.3g} s a step, ")
        for line in machine_lines(single, False, None)
    )
    assert PEAK_TFLOPS.keys() == FLOAT32_TFLOPS.keys()
    scored = plan_of("score --reference-load r --model-size 280m --num-shards 4", data=8)
    assert run_flops_per_token(scored, None) == pytest.approx(flops / 3)
    assert " on 32 GPUs, " in machine_lines(scored, False, None)[-1]


def test_muon_computes_on_every_rank():
    """Four 4,096 x 4,096 matrices and two of 24,576 in each block, five iterations of three products; and the products
    that the optimizer takes for a small block with grouped queries and SwiGLU."""
    flags = "main --model-size 8b --zero-stage 1 --optimizer muon"
    plan = plan_of(flags, data=8, tensor=2)
    of_block = 5 * (6 * 4 * 4096**3 + 2 * (4 * 6 + 2) * 4096**3)
    assert muon_flops(plan) == 32 * of_block
    flops, seconds = f"{32 * of_block:.2e} FLOP a step", f"{32 * of_block / 67e12:.3g} s"
    line = f"beside that, Muon: {flops} on each rank, in float32, {seconds} at all of H100's 67 TFLOP/s"
    assert line in machine_lines(plan, False, None)
    assert muon_flops(plan_of(flags, pipe=3)) == 11 * of_block
    # Half of all matrices, an eighth of that half, and six of 4,096 x 24,576.
    half = 4 * 32 * (4 * 4096 * 4096 + 2 * 4096 * 24576) // 2
    assert muon_bytes(plan.gpt, plan.config.parallel, 32, 8) == half + half / 8 + 4 * 6 * 4096 * 24576
    assert muon_flops(plan_of("main --model-size 8b --zero-stage 1")) == 0
    small = (
        "--num-layers 1 --hidden-size 64 --num-attention-heads 4 --num-query-groups 2 --swiglu --disable-bias-linear"
    )
    plan = plan_of(f"main {small} --zero-stage 1 --optimizer muon")
    with FlopCounterMode(display=False) as counted:
        for name, spec in parameter_specs(plan.gpt).items():
            if name.startswith("layers.") and len(spec.shape) == 2:
                update_of(name, torch.ones(spec.shape, device="meta"), plan.gpt)
    assert counted.get_total_flops() == muon_flops(plan)


def test_a_pipeline_idles():
    plan = plan_of("main --model-size 8b --zero-stage 1 --micro-batch-size 4", pipe=4, data=8)
    assert plan.micro_batches == 16
    assert bubble(plan) == 3 / 19
    assert any(
        line.startswith("pipeline bubble: 15.8% of a step, 3 of 19 turns") for line in machine_lines(plan, 0, None)
    )


@pytest.mark.parametrize(
    ("sizes", "tensor", "data", "pipeline"),
    [
        # In one machine.
        ((1, 8, 1), 450, 450, 450),
        ((2, 2, 2), 450, 450, 450),
        # Two of 8 tensor groups of 4 share a machine: two of a replica group's ranks, with a link each.
        ((2, 8, 4), 450, 100, 50),
        ((1, 64, 1), 450, 400, 400),
        ((8, 1, 8), 450, 450, 50),
        ((1, 4, 16), 400, 50, 50),
        # Replicas in a machine, stages between machines.
        ((8, 4, 2), 450, 450, 50),
    ],
)
def test_links(sizes, tensor, data, pipeline):
    plan = replace(plan_of("main --model-size 8b --zero-stage 1"), topology=Topology(*sizes))
    rates = {TENSOR: tensor, DATA: data}
    for group, rate in rates.items():
        assert link_of(plan, group).bandwidth == rate * 1e9, group
    if sizes[0] > 1:
        assert link_of(plan, PIPELINE).bandwidth == pipeline * 1e9


@pytest.mark.parametrize(
    ("stride", "size", "world_size", "fewest"),
    [
        (1, 8, 16, 0),
        # Of ranks 6 to 8 the last is alone on its machine; of 6 to 11 two are on one and four on the next.
        (1, 3, 24, 1),
        (1, 6, 24, 2),
        # Every third of 24 ranks: three, three and two.
        (3, 8, 24, 2),
        # The second machine is half full.
        (1, 12, 12, 4),
        (1, 4096, 4096, 8),
    ],
)
def test_a_group_is_as_fast_as_the_machine_with_fewest_of_its_ranks(stride, size, world_size, fewest):
    """On machines of eight."""
    assert fewest_on_a_machine(stride, size, world_size, 8) == fewest


def test_bytes_that_a_rank_sends():
    """8 replicas in a machine: 7/8 of the gradients twice in float32, and once of the bfloat16 weights, in one call and
    in two."""
    plan = plan_of("main --model-size 280m --zero-stage 1", data=8)
    row = machine_lines(plan, False, None)[-1].split()
    sent = 7 / 8 * (2 * 4 + 2) * SMALL
    assert row[:6] == ["data", "8", f"{sent / 1e9:.3f}", "node", "450", f"{sent / 450e9 + 3 * 20e-6:.3f}"]
    assert " ".join(row[6:]) == f"all-reduce {4 * SMALL / 1e9:.3f}, all-gather {2 * SMALL / 1e9:.3f}"


def test_a_device_that_is_too_small():
    flags = "main --model-size 8b --zero-stage 2 --micro-batch-size 2 --device-memory-gib"
    assert not memory_faults(plan_of(f"{flags} 80", data=8), False, None)
    (fault,) = memory_faults(plan_of(f"{flags} 60", data=8), False, None)
    assert fault.value == "51.8 GiB on a rank of stage 0"
    assert fault.rule.startswith("at most 51.0 GiB of --device-memory-gib 60")
    lines = machine_lines(plan_of(f"{flags} 80", data=8), False, None)
    assert "fullest: stage 0, 51.80 GiB, 65% of 80 GiB; activations of 1 micro-batch" in lines[3]


def test_files_and_tokens():
    plan = plan_of("main --model-size 280m --zero-stage 2 --cpu-offload", data=8)
    lines = machine_lines(plan, False, None)
    host = 20 * SMALL / 8
    checkpoint = f"a checkpoint: {14 * SMALL / 1e9:.2f} GB on disk; the host holds {host / GIB:.2f} GiB for each rank, "
    assert f"{checkpoint}{8 * host / GIB:.2f} GiB for 8 of a machine" in lines
    assert any(line.startswith(f"tokens a parameter: {10 * 512 * 1024 / SMALL:,.1f} (about 20") for line in lines)


def test_a_third_matrix_is_said():
    """8b is the paper's shape with two matrices of 4,096 x 24,576 in each block."""
    plan = plan_of("main --model-size 8b --zero-stage 1")
    assert shape_warnings(plan.config.model, plan.gpt) == []
    gated = plan_of("main --model-size 8b --swiglu --zero-stage 1")
    (line,) = shape_warnings(gated.config.model, gated.gpt)
    more = LARGE + 32 * 24576 * (4096 + 1)
    assert f"8b with --swiglu has {more / 1e9:.1f}B parameters, without it {LARGE / 1e9:.1f}B" in line
    assert "--ffn-hidden-size 16384" in line


def test_lines_are_short():
    """Also of a proxy with all columns, and of many stages that differ."""
    proxy = "proxy --reference-load r --model-size 8b --zero-stage 1 --micro-batch-size 4"
    plan, main = plan_of(proxy, pipe=4, data=16, tensor=8), plan_of("main --model-size 8b --zero-stage 1", 32, 4)
    lines = [*machine_lines(plan, True, plan.gpt), *machine_lines(main, False, None)]
    tables = [line for line in lines if line.startswith("  ") and not line.startswith("  fullest")]
    assert max(map(len, tables)) <= 120
    assert "  and 16 more" in lines
