"""What the backward pass computes again: no block while all activations fit the device, and no logits while they do."""

from __future__ import annotations

import math
from dataclasses import replace

from megatron_doremi.plan import RunPlan
from megatron_doremi.planning.machine_plan import MARGIN
from megatron_doremi.planning.memory import rank_memory
from megatron_doremi.settings import TRAINING
from megatron_doremi.shapes import Shape

# Tokens of a chunk of logits where a device has room for them, but not for all.
MORE_TOKENS = 4096
# Logits of a micro-batch on a rank from which on none are held: kernels count in 32 bits up to there.
LARGEST = 2**31


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


def with_held_logits(
    plan: RunPlan, alternating: bool, reference: Shape | None, device_bytes: float
) -> tuple[RunPlan, str]:
    """The plan that holds the logits for the backward pass, or else computes those of more tokens at a time, if its
    rank that holds most fits so; and what to say about it.

    On an H100 a step of 1b takes 0.96 of the time with logits held, and 0.985 with 4,096 at a time (docs/gpu.md). A
    plan that states --loss-chunk-tokens, does not train, or holds the logits already stays as it is; the arguments are
    those of `with_recomputation`.
    """
    chunk, tokens = plan.execution(alternating).loss_chunk_tokens, math.prod(plan.batch_shape)
    if plan.config.data.phase not in TRAINING or "loss_chunk_tokens" in plan.config.given or not chunk:
        return plan, ""
    size = plan.topology.tensor_size
    choices = []
    if tokens * plan.gpt.padded_vocab_size(size) // size < LARGEST:
        choices.append((0, "all held"))
    if tokens > chunk:
        choices.append((MORE_TOKENS, f"of {min(MORE_TOKENS, tokens):,} tokens at a time"))
    for number, what in choices:
        parallel = replace(plan.config.parallel, loss_chunk_tokens=number)
        changed = replace(plan, config=replace(plan.config, parallel=parallel))
        total = rank_memory(changed, alternating, reference).total
        if total <= (1 - MARGIN) * device_bytes:
            return changed, f"logits: {what} ({total / 2**30:.1f} GiB a rank); --loss-chunk-tokens decides otherwise"
    return plan, ""
