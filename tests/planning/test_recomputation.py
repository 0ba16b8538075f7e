"""All activations, and the logits, are kept while they fit, else computed again: at the paper's 280m, by hand.

Run alone: python -m pytest tests/planning/test_recomputation.py
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from planning.test_suggested_layouts import GIB, SMALL, SMALL_LOSS, SMALL_TOKEN, plan_of

from megatron_doremi.phases.inputs import device_memory
from megatron_doremi.planning.layouts import MARGIN
from megatron_doremi.planning.memory import rank_memory
from megatron_doremi.planning.recomputation import with_held_logits, with_recomputation

# Micro-batches of 8 x 1024 tokens; state in bfloat16 with ZeRO 1, and the reference's weights.
TOKENS, STATE = 8 * 1024, SMALL * (18 + 2)
FULL_TOKEN = 2 * (12 * 768 + 2 * 768)


def proxy(micro_batches: int, flags: str = ""):
    return plan_of(
        f"proxy --reference-load r --model-size 280m --zero-stage 1 --micro-batch-size 8 "
        f"--global-batch-size {8 * micro_batches} {flags}",
        1,
    )


@pytest.mark.parametrize("micro_batches", [8, 64])
def test_a_proxy_recomputes_where_it_would_not_fit(micro_batches):
    plan = proxy(micro_batches)
    kept = STATE + micro_batches * TOKENS * SMALL_TOKEN + SMALL_LOSS
    limit = (1 - MARGIN) * 80 * GIB
    chosen, line = with_recomputation(plan, True, plan.shape, 80 * GIB)
    if kept <= limit:
        assert (chosen, line) == (plan, "")
    else:
        assert chosen.config.parallel.recompute_granularity == "full"
        assert rank_memory(chosen, True, plan.shape).total <= limit
        assert f"{kept / GIB:.1f} of at most {limit / GIB:.1f} GiB" in line
        assert f"all of {micro_batches} micro-batches" in line
    assert (line == "") == (micro_batches == 8)


def test_a_plan_for_another_gpu_does_not_take_the_memory_of_the_one_here(monkeypatch):
    """On a laptop with a GPU of 8 GiB."""
    properties = SimpleNamespace(total_memory=8 * GIB)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: properties)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: "NVIDIA RTX A1000 Laptop GPU")
    base = "main --model-size 280m --zero-stage 1"
    flags = ("", "--dry-run-device H100", "--dry-run-device A100", "--dry-run-device H100 --device-memory-gib 80")
    assert [device_memory(plan_of(f"{base} {each}", 1).config) for each in flags] == [8 * GIB, None, None, 80 * GIB]
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: "NVIDIA H100 80GB HBM3")
    assert device_memory(plan_of(f"{base} --dry-run-device H100", 1).config) == 8 * GIB


def test_a_run_counts_what_its_gpu_has_free(monkeypatch):
    """Another process holds 60 of 80 GiB; this one has 2 already."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (18 * GIB, 80 * GIB))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda: 2 * GIB)
    config = plan_of("main --model-size 280m --zero-stage 1", 1).config
    run = replace(config.run, dry_run=False)
    assert device_memory(replace(config, run=run)) == 20 * GIB
    assert device_memory(replace(config, run=replace(run, device_memory_gib=40.0))) == 40 * GIB


def test_no_logits_are_held_that_32_bits_cannot_count():
    """16 windows of 1,024 tokens have 4.2 billion."""
    windows = "main --model-size 280m --zero-stage 1 --global-batch-size 64 --micro-batch-size"
    chosen = [
        with_held_logits(plan_of(f"{windows} {each}", 1), False, None, 1000 * GIB)[0].config.parallel.loss_chunk_tokens
        for each in (16, 8, 4)
    ]
    assert 8 * 1024 * 256_000 < 2**31 < 16 * 1024 * 256_000
    assert chosen == [4096, 0, 0]


def test_a_frozen_model_holds_no_logits():
    plan = plan_of("proxy --reference-load r --model-size 280m --zero-stage 1 --micro-batch-size 2", 1)
    chosen, _ = with_held_logits(plan, True, plan.shape, 1000 * GIB)
    assert chosen.execution(True).loss_chunk_tokens == 0
    assert chosen.frozen_execution.loss_chunk_tokens == 1024
    stated = plan_of("proxy --reference-load r --model-size 280m --zero-stage 1 --loss-chunk-tokens 256", 1)
    assert stated.frozen_execution.loss_chunk_tokens == 256


def test_what_is_stated_stays():
    plan = proxy(64, "--recompute-granularity none")
    assert with_recomputation(plan, True, plan.shape, 80 * GIB) == (plan, "")


def test_a_device_that_is_too_small_either_way():
    plan = proxy(64)
    assert with_recomputation(plan, True, plan.shape, 10 * GIB) == (plan, "")


def test_a_device_that_holds_it_all_recomputes_nothing():
    plan = proxy(64)
    assert with_recomputation(plan, True, plan.shape, 1000 * GIB) == (plan, "")


def bytes_with_logits(chunk: int) -> int:
    """Of a step of a micro-batch whose logits are computed by chunks, or held (0); eager, bfloat16."""
    held, columns = SMALL * 18 + TOKENS * SMALL_TOKEN, 256_000
    if not chunk:
        # The product is held; logits and log-softmax in float32.
        return held + (2 + 2 * 4) * TOKENS * columns
    # Logits and log-softmax and the product; or logits, product, its gradient and the sum of the weights' gradient.
    gradient = 4 * columns * 768
    return held + max((2 * 4 + 2) * chunk * columns, (4 + 2 * 2) * chunk * columns + gradient)


@pytest.mark.parametrize(("tokens", "room"), [(0, 1.0), (4096, 0.99), (1024, 0.99)])
def test_logits_are_held_or_computed_for_more_tokens_where_a_device_has_room(tokens, room):
    """Each with memory that just suffices, and with a hundredth less than the next larger one needs."""
    plan = plan_of("main --model-size 280m --zero-stage 1 --micro-batch-size 8 --global-batch-size 64", 1)
    needed = bytes_with_logits({0: 0, 4096: 0, 1024: 4096}[tokens])
    chosen, line = with_held_logits(plan, False, None, room * needed / (1 - MARGIN) + 1)
    assert chosen.config.parallel.loss_chunk_tokens == tokens
    assert rank_memory(chosen, False, None).total == bytes_with_logits(tokens)
    if tokens == 1024:
        assert (chosen, line) == (plan, "")
    else:
        assert f"({bytes_with_logits(tokens) / GIB:.1f} GiB a rank); --loss-chunk-tokens decides" in line
        assert ("all held" in line) == (tokens == 0)


@pytest.mark.parametrize(
    "flags",
    [
        "main --model-size 280m --loss-chunk-tokens 1024 --micro-batch-size 8",
        # Their only chunk is held in any case.
        "main --model-size 280m --micro-batch-size 1",
    ],
)
def test_logits_that_are_stated_or_held_stay(flags):
    plan = plan_of(f"{flags} --zero-stage 1", 1)
    assert with_held_logits(plan, False, None, 1000 * GIB) == (plan, "")
