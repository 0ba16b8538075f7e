"""All activations are kept while they fit, else blocks are computed again: at gpu.md's proxy of 280m, by hand.

Run alone: python -m pytest tests/planning/test_recomputation.py
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from planning.test_suggested_layouts import GIB, SMALL, SMALL_LOSS, SMALL_TOKEN, plan_of

from megatron_doremi.phases.inputs import device_memory
from megatron_doremi.planning.layouts import MARGIN
from megatron_doremi.planning.memory import rank_memory
from megatron_doremi.planning.recomputation import with_recomputation

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


def test_what_is_stated_stays():
    plan = proxy(64, "--recompute-granularity none")
    assert with_recomputation(plan, True, plan.shape, 80 * GIB) == (plan, "")


def test_a_device_that_is_too_small_either_way():
    plan = proxy(64)
    assert with_recomputation(plan, True, plan.shape, 10 * GIB) == (plan, "")


def test_a_device_that_holds_it_all_recomputes_nothing():
    plan = proxy(64)
    assert with_recomputation(plan, True, plan.shape, 1000 * GIB) == (plan, "")
