"""Keeps all activations while they fit the device, and else has the backward pass compute blocks again."""

from __future__ import annotations

from dataclasses import replace

from megatron_doremi.plan import RunPlan
from megatron_doremi.planning.layouts import MARGIN
from megatron_doremi.planning.memory import rank_memory
from megatron_doremi.settings import TRAINING
from megatron_doremi.shapes import Shape


def with_recomputation(
    plan: RunPlan, alternating: bool, reference: Shape | None, device_bytes: float
) -> tuple[RunPlan, str]:
    """The plan with full recomputation if only so its rank that holds most fits, and what to say about it.

    A plan that states --recompute-granularity, or does not train, or would not fit either way, stays as it is, and
    nothing is said.

    Args:
        alternating: all forward passes of a step come before its first backward pass.
        reference: of a proxy that runs it online.
        device_bytes: memory of the device of a rank, of which a margin is left free.
    """
    if plan.config.data.phase not in TRAINING or "recompute_granularity" in plan.config.given:
        return plan, ""
    limit, kept = (1 - MARGIN) * device_bytes, rank_memory(plan, alternating, reference)
    if kept.total <= limit:
        return plan, ""
    parallel = replace(plan.config.parallel, recompute_granularity="full")
    recomputing = replace(plan, config=replace(plan.config, parallel=parallel))
    total = rank_memory(recomputing, alternating, reference).total
    if total > limit:
        return plan, ""
    count = f"{kept.held:,} micro-batch{'' if kept.held == 1 else 'es'}"
    return recomputing, (
        f"activations: full recomputation ({total / 2**30:.1f} GiB a rank), because with all of {count} kept a rank "
        f"would hold {kept.total / 2**30:.1f} of at most {limit / 2**30:.1f} GiB; --recompute-granularity decides "
        "otherwise"
    )
