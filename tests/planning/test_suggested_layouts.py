"""--suggest-layout: what fits a device, by hand, and in which order.

Run alone: python -m pytest tests/planning/test_suggested_layouts.py
"""

from __future__ import annotations

import contextlib
import math
import shlex
from dataclasses import replace

import numpy as np
import pytest
from phases.small import MODEL, read_by

from megatron_doremi.arguments import parse_config
from megatron_doremi.config import gpt_config
from megatron_doremi.errors import ConfigError
from megatron_doremi.layout_rules import highest_zero_stage, zero_faults
from megatron_doremi.parallel.topology import Topology
from megatron_doremi.phases.inputs import open_inputs, plan_text
from megatron_doremi.plan import make_plan
from megatron_doremi.planning.layouts import suggest_layouts, suggestion_text

GIB = 2**30
BASE = "--domains d.json --train-iters 10 --dry-run --bf16 --global-batch-size 512 --phase"
# 280m of the paper: 12 blocks of width 768, feed-forward 3072, 256,000 tied rows, biases, RMSNorm.
SMALL_BLOCK = (768 + 1) * 3 * 768 + (768 + 1) * 768 + (768 + 1) * 3072 + (3072 + 1) * 768 + 2 * 768
SMALL = 256_000 * 768 + 12 * SMALL_BLOCK + 768
# Bytes a token in bfloat16: norms' inputs and outputs; queries, keys, values, output; feed-forward; the last norm.
SMALL_TOKEN = 2 * (12 * (4 * 768 + 4 * 768 + 2 * 3072) + 2 * 768)
# The logits of 1,024 tokens in float32, twice in bfloat16, and the float32 gradient of the output layer.
SMALL_LOSS = (4 + 2 * 2) * 256_000 * 1024 + 4 * 256_000 * 768
LARGE_BLOCK = (4096 + 1) * 3 * 4096 + (4096 + 1) * 4096 + (4096 + 1) * 24576 + (24576 + 1) * 4096 + 2 * 4096
LARGE = 256_000 * 4096 + 32 * LARGE_BLOCK + 4096
LARGE_TOKEN = 2 * (32 * (4 * 4096 + 4 * 4096 + 2 * 24576) + 2 * 4096)
# The gradient of the output layer in float32, and its copy in bfloat16; as much as a chunk's logits beside the former.
LARGE_LOSS = (4 + 2) * 256_000 * 4096
assert LARGE_LOSS == (4 + 2 * 2) * 256_000 * 1024 + 4 * 256_000 * 4096


def plan_of(flags: str, world_size: int):
    """A plan on data parallel ranks, of one domain and 256,000 tokens."""
    config = parse_config(shlex.split(f"{BASE} {flags} --suggest-layout"), world_size)
    gpt = gpt_config(config.model, config.data.seq_length, 256_000)
    return make_plan(config, Topology(data_size=world_size), gpt, ("text",), (10**6,), np.ones(1))


def suggest(flags: str, world_size: int, gib: float = 80.0, alternating: bool = False):
    plan = plan_of(flags, world_size)
    return suggest_layouts(plan, alternating, plan.gpt if alternating else None, gib * GIB)


def settings_of(candidate) -> tuple[int, int, int, int, str, int]:
    split, config = candidate.split, candidate.plan.config
    parallel = config.parallel
    sizes = (split.tensor, split.pipe, split.data, parallel.zero_stage)
    return (*sizes, parallel.recompute_granularity, config.data.micro_batch_size)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_a_small_model_is_data_parallel(ranks):
    found = suggest("main --model-size 280m", ranks)
    best = found.fitting[0]
    # 16 windows of 1,024 tokens are the most that a micro-batch is given.
    assert settings_of(best) == (1, 1, ranks, 1, "none", 16)
    assert best.memory.total == SMALL * (6 + 12 / ranks) + 16 * 1024 * SMALL_TOKEN + SMALL_LOSS
    assert found.reasons[0] == "fits as it is"
    # Tensor ranks exchange more, stages wait for the output layer.
    assert all(each.seconds > 1.15 * best.seconds for each in found.fitting[1:])
    assert parse_config(shlex.split(f"{BASE} main --model-size 280m {' '.join(found.flags)}"), ranks)


def test_the_8b_model_on_eight_gpus():
    """ZeRO 1 leaves no room on one rank; two tensor ranks exchange less than ZeRO 2, which reduces every micro-batch,
    and do not wait for a last stage with the output layer."""
    found = suggest("main --model-size 8b", 8)
    assert settings_of(found.fitting[0]) == (2, 1, 4, 1, "none", 8)
    half = 32 * (4097 * 3 * 2048 + 4096 * 2048 + 4097 * 12288 + 12288 * 4096 + 4 * 4096) + 128_000 * 4096 + 4096
    token = 2 * (32 * (4 * 2048 + 4 * 2048 + 2 * 12288) + 2 * 2048)
    # With the hidden states of all positions.
    loss = LARGE_LOSS / 2 + 2 * 8 * 1024 * 4096
    assert found.fitting[0].memory.total == half * (6 + 12 / 4) + 8 * 1024 * token + loss
    # One window is one chunk, whose logits are held; beside their gradient that of the output layer.
    one_chunk = 2 * 2 * 256_000 * 1024 + 2 * 256_000 * 4096
    stages = next(each for each in found.fitting if settings_of(each)[:3] == (1, 2, 4))
    # The last of two stages has the output layer beside half of the blocks.
    block, output = 2 * (4 * 4096**2 + 2 * 4096 * 24576 + 4096 * 1024), 2 * 256_000 * 4096
    micro_batches = 512 / 4 / settings_of(stages)[5]
    share = (16 * block + output) * 2 / (32 * block + output)
    assert stages.arithmetic == pytest.approx(share * (1 + 1 / micro_batches))
    index = next(i for i, each in enumerate(found.fitting) if each.split.data == 8)
    least = LARGE * (6 + 12 / 8) + 1024 * LARGE_TOKEN + one_chunk
    assert least > 68 * GIB
    assert found.reasons[index] == f"ZeRO 1: {least / GIB:.1f} GiB"
    sharded = found.fitting[index]
    assert settings_of(sharded)[3:] == (2, "none", 4)
    # Gradients in float32 of 16 micro-batches and weights in bfloat16, each once around a ring of eight.
    flops = 6 * (32 * (4 * 4096**2 + 2 * 4096 * 24576) + 256_000 * 4096 + 32 * 4096 * 1024)
    computing = 512 * 1024 * flops / (8 * 989e12 * 0.4)
    seconds = computing + (16 * 4 + 2) * LARGE * 7 / 8 / 450e9
    # Each call takes 20 microseconds: buckets of 10 million are reduced for each micro-batch, and gathered.
    buckets = math.ceil(LARGE / (10 * 2**20))
    assert sharded.seconds == pytest.approx(seconds + (16 + 1) * buckets * 20e-6)


def test_tensor_parallel_only_where_the_model_needs_it():
    """One block cannot be pipelined, and ZeRO 1 leaves 2 + 4 bytes of each parameter on every replica."""
    shape = "--num-layers 1 --hidden-size 16384 --num-attention-heads 128 --kv-channels 128 --swiglu"
    found = suggest(f"main {shape} --zero-stage 1", 4)
    assert settings_of(found.fitting[0])[:4] == (2, 1, 2, 1)
    assert "--sequence-parallel" in found.flags
    assert any(line.startswith("tensor 1 x pipeline 1 x data 4: at least ") for line in found.rejected)
    with pytest.raises(ConfigError, match="nothing fits; the smallest, tensor 1 x pipeline 1 x data 4"):
        suggest(f"main {shape} --zero-stage 1 --tensor-model-parallel-size 1", 4)
    # At 640 GiB it fits without.
    assert settings_of(suggest(f"main {shape} --zero-stage 1", 4, gib=640).fitting[0])[:4] == (1, 1, 4, 1)


def test_an_alternating_proxy_recomputes_before_it_shards():
    """One rank would hold all 512 windows of a step (docs/memory.md)."""
    best = suggest("proxy --reference-load r --model-size 280m", 1, alternating=True).fitting[0]
    assert settings_of(best) == (1, 1, 1, 1, "full", 16)
    state = SMALL * 18 + SMALL * 2
    assert best.memory.total == state + 512 * 1024 * (12 * 2 * 768 + 4 * 768) + SMALL_LOSS
    # All but the output layer is passed forward twice.
    blocks, output = 12 * 2 * (4 * 768**2 + 2 * 768 * 3072 + 768 * 1024), 2 * 256_000 * 768
    assert best.arithmetic == pytest.approx((4 * blocks + 3 * output) / (3 * (blocks + output)))


def test_what_cannot_be_divided_is_said():
    found = suggest("main --model-size 280m --global-batch-size 12", 8)
    assert found.rejected == (
        "tensor 1 x pipeline 1 x data 8: --global-batch-size 12 is not a multiple of 8",
        "tensor 8: num_attention_heads 12 must be a multiple of --tensor-model-parallel-size 8",
    )
    # Two stages would idle for one of four turns.
    assert settings_of(found.fitting[0])[:3] == (2, 1, 4)
    with pytest.raises(
        ConfigError, match=r"no layout of 13 ranks.*\n.*12 is not a multiple of 13\n.*13, or start 1, 2,"
    ):
        suggest("main --model-size 280m --global-batch-size 12", 13)


def test_given_flags_are_kept():
    found = suggest("main --model-size 280m --tensor-model-parallel-size 2 --micro-batch-size 4 --zero-stage 2", 8)
    assert {each.split.tensor for each in found.fitting} == {2}
    assert settings_of(found.fitting[0]) == (2, 1, 4, 2, "none", 4)
    # So are values that are the defaults.
    given = "--pipeline-model-parallel-size 1 --recompute-granularity none --micro-batch-size 1"
    found = suggest(f"main --model-size 280m {given}", 4)
    assert {settings_of(each)[4:] for each in found.fitting} == {("none", 1)}
    assert {each.split.pipe for each in found.fitting} == {1}
    with pytest.raises(ConfigError, match="DeepSpeed would accumulate gradients in bfloat16"):
        suggest("main --model-size 280m --zero-stage 0", 4)
    with pytest.raises(ConfigError, match="start 2 or 4 processes, or give two sizes whose product is 1 or 3"):
        suggest("main --model-size 280m --tensor-model-parallel-size 2", 3)


def test_nothing_fits():
    with pytest.raises(ConfigError) as caught:
        suggest("main --model-size 8b", 2, gib=24)
    (fault,) = caught.value.faults
    assert "tensor 2 x pipeline 1 x data 1 (ZeRO 1, full recomputation, micro-batch 1), takes " in fault.value
    assert fault.rule == "at most 20.4 of 24.0 GiB on each of 2 ranks"
    assert "more ranks" in fault.remedy
    with pytest.raises(ConfigError, match="a smaller --global-batch-size or --doremi-update simultaneous"):
        suggest("proxy --reference-load r --model-size 280m --global-batch-size 8192", 1, alternating=True)


def test_the_text_ends_with_the_flags():
    found = suggest("main --model-size 8b", 8)
    lines = suggestion_text(found, 80 * GIB).splitlines()
    # A shell reads both lines as one.
    assert lines[-2].endswith(" \\")
    assert shlex.split("\n".join(lines[-2:]).replace("\\\n", "")) == " ".join(found.flags).split()
    assert max(map(len, lines)) <= 120
    assert len(lines) <= 20
    # Layout and micro-batch of the best one.
    assert next(line for line in lines if "tensor 2 x pipeline 1 x data 4 " in line).split()[8] == "8"


def test_the_dry_run_prints_it(data, monkeypatch):
    argv = ["--phase", "main", "--domains", str(data), "--train-iters", "7", *read_by("main", MODEL), "--dry-run"]
    argv += ["--suggest-layout"]
    text = plan_text(open_inputs(parse_config([*argv, "--device-memory-gib", "1"], 2), Topology(data_size=2)))
    # float32 needs no ZeRO; the given micro-batch is kept.
    assert "--micro-batch-size 2 --zero-stage 0 " in text.splitlines()[-2]
    assert text.splitlines()[-1] == "    --recompute-granularity none"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="give it, such as --device-memory-gib 80"):
        plan_text(open_inputs(parse_config(argv, 2), Topology(data_size=2)))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--suggest-layout", "a dry run suggests a layout"),
        ("--device-memory-gib 80", "--dry-run reads it"),
        ("--dry-run-mfu 0.5", "--dry-run reads it"),
    ],
)
def test_flags_of_a_suggestion(flags, words):
    base = BASE.replace("--dry-run", "--save s --zero-stage 1")
    with pytest.raises(ConfigError, match=words):
        parse_config(shlex.split(f"{base} main --model-size 280m {flags}"), 1)


@pytest.mark.parametrize(("flags", "highest"), [("", 3), ("--compile", 2), ("--optimizer muon", 1)])
def test_no_zero_stage_that_the_run_would_refuse(flags, highest):
    """The 8b model on eight ranks without tensor or pipeline parallelism, by the memory of a device."""
    fixed = "--tensor-model-parallel-size 1 --pipeline-model-parallel-size 1"
    found = set()
    for gib in (40, 64, 80, 100, 200):
        with contextlib.suppress(ConfigError):
            found.add(settings_of(suggest(f"main --model-size 8b {fixed} {flags}", 8, gib).fitting[0])[3])
    assert max(found) == highest


def test_sequence_parallelism_that_is_given_is_kept():
    """Without it one rank to a model is best."""
    assert settings_of(suggest("main --model-size 280m", 8).fitting[0])[0] == 1
    found = suggest("main --model-size 280m --sequence-parallel", 8)
    assert {each.split.tensor for each in found.fitting} == {2, 4}
    parsed = parse_config(shlex.split(f"{BASE} main --model-size 280m --sequence-parallel {' '.join(found.flags)}"), 8)
    assert parsed.parallel.sequence_parallel


SEQUENCE = "main --model-size 280m --sequence-parallel"
TWO_RANKS = "tensor 1: --sequence-parallel needs a tensor parallel group of two ranks or more"


@pytest.mark.parametrize(
    ("flags", "ranks", "reason"),
    [
        (SEQUENCE, 1, TWO_RANKS),
        (f"{SEQUENCE} --tensor-model-parallel-size 1", 8, TWO_RANKS),
        (f"{SEQUENCE} --seq-length 1023", 4, "--seq-length 1023 with --sequence-parallel a multiple of"),
    ],
)
def test_sequence_parallelism_without_a_layout_is_named(flags, ranks, reason):
    with pytest.raises(ConfigError) as caught:
        suggest(flags, ranks)
    (fault,) = caught.value.faults
    assert fault.value == ("no layout of 1 rank" if ranks == 1 else f"no layout of {ranks} ranks")
    assert reason in fault.rule
    assert fault.remedy.startswith("leave --sequence-parallel out")
    # Flags that were not given.
    assert "--zero-stage" not in str(fault)
    assert "--cpu-offload" not in str(fault)
    assert suggest(flags.replace("--sequence-parallel", ""), ranks).fitting


def test_splits_without_sequence_parallelism_are_rejected_with_their_reason():
    assert TWO_RANKS in suggest(SEQUENCE, 8).rejected
    # Two stages cannot share three ranks; the size of the tensor parallel group was not given.
    with pytest.raises(ConfigError) as caught:
        suggest(f"{SEQUENCE} --pipeline-model-parallel-size 2", 3)
    assert [fault.subject for fault in caught.value.faults] == ["world size"]


def test_neither_sequence_parallelism_nor_the_batch_alone_is_the_cause():
    with pytest.raises(ConfigError) as caught:
        suggest(f"{SEQUENCE} --global-batch-size 12", 13)
    (fault,) = caught.value.faults
    assert fault.remedy == "change one of these sizes, or start another number of processes"


def test_pipelines_and_a_zero_stage_that_they_do_not_take():
    """One stage would take eight replicas, which do not divide twelve windows."""
    flags = "main --model-size 280m --tensor-model-parallel-size 1 --global-batch-size 12"
    for given, named in (("--zero-stage 2", "--zero-stage"), ("--cpu-offload", "--cpu-offload")):
        with pytest.raises(ConfigError) as caught:
            suggest(f"{flags} {given}", 8)
        (fault,) = caught.value.faults
        assert fault.value == f"no layout of 8 ranks with {named}"
        assert "one pipeline stage with ZeRO 2 and 3; tensor 1 x pipeline 1 x data 8: --global-batch-size" in fault.rule
        assert fault.remedy == f"leave {named} out, or give another --global-batch-size"


@pytest.mark.parametrize("suggests", ["", "--suggest-layout"])
@pytest.mark.parametrize("flags", ["--optimizer muon", "--pipeline-model-parallel-size 2"])
def test_offload_where_zero_1_is_the_highest(flags, suggests):
    words = f"{BASE} main --model-size 280m --cpu-offload {flags} {suggests}"
    with pytest.raises(ConfigError) as caught:
        parse_config(shlex.split(words if suggests else f"{words} --zero-stage 1"), 4)
    (fault,) = caught.value.faults
    assert (fault.subject, fault.value) == ("--cpu-offload", f"with {flags}")
    assert "--zero-stage" not in str(fault)


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("flags", ["", "--compile", "--optimizer muon", "--optimizer muon --compile"])
def test_the_highest_zero_stage_is_the_highest_without_a_fault(flags, stages):
    words = shlex.split(f"{BASE} main --model-size 280m {flags} --pipeline-model-parallel-size {stages}")
    config = parse_config([*words, "--zero-stage", "1"], 4)
    taken = [
        stage
        for stage in (1, 2, 3)
        if not zero_faults(replace(config, parallel=replace(config.parallel, zero_stage=stage)))
    ]
    assert taken == [*range(1, highest_zero_stage(config, stages) + 1)]
