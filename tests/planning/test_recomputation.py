"""All activations are kept while they fit, else blocks are computed again: at gpu.md's proxy of 280m, by hand.

Run alone: python -m pytest tests/planning/test_recomputation.py
"""

from __future__ import annotations

import pytest
from planning.test_suggested_layouts import GIB, SMALL, SMALL_LOSS, SMALL_TOKEN, plan_of

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


def test_what_is_stated_stays():
    plan = proxy(64, "--recompute-granularity none")
    assert with_recomputation(plan, True, plan.shape, 80 * GIB) == (plan, "")


def test_a_device_that_is_too_small_either_way():
    plan = proxy(64)
    assert with_recomputation(plan, True, plan.shape, 10 * GIB) == (plan, "")


def test_a_device_that_holds_it_all_recomputes_nothing():
    plan = proxy(64)
    assert with_recomputation(plan, True, plan.shape, 1000 * GIB) == (plan, "")
