"""The arithmetic of a run: floating point operations, the pipeline's bubble, and the time at a stated utilization."""

from __future__ import annotations

from itertools import pairwise

from megatron_doremi.devices import PEAK_TFLOPS
from megatron_doremi.parallel.topology import stage_bounds
from megatron_doremi.plan import RunPlan
from megatron_doremi.settings import SCORE, TRAINING
from megatron_doremi.shapes import GPTConfig, Shape


def forward_flops(gpt: GPTConfig, seq_length: int) -> tuple[float, float]:
    """Floating point operations per token of a forward pass through a block, and through the output layer.

    Counts matrix products only, and half of the attention scores, since they are causal (as Chowdhery et al. 2022,
    appendix B).
    """
    heads = gpt.num_attention_heads * gpt.kv_channels
    qkv = gpt.hidden_size * (gpt.num_attention_heads + 2 * gpt.num_query_groups) * gpt.kv_channels
    mlp = (3 if gpt.swiglu else 2) * gpt.hidden_size * gpt.ffn_hidden_size
    scores = 2 * heads * seq_length / 2
    return 2.0 * (qkv + heads * gpt.hidden_size + mlp + scores), 2.0 * gpt.vocab_size * gpt.hidden_size


def flops_per_token(gpt: GPTConfig, seq_length: int) -> float:
    """Floating point operations per token of a training step: the forward pass, and twice as many in the backward pass;
    see `forward_flops`."""
    block, output = forward_flops(gpt, seq_length)
    return 3.0 * (gpt.num_layers * block + output)


def slowest_stage(plan: RunPlan, alternating: bool) -> tuple[int, float]:
    """The pipeline stage with most arithmetic, and how many times that of an even share without recomputation it has.

    Full recomputation repeats the forward pass of blocks, and an alternating update under ZeRO 3 that of all layers.
    That logits are computed again chunk by chunk does not count.

    Args:
        alternating: all forward passes of a step come before its first backward pass.
    """
    stages, parallel = plan.topology.pipe_size, plan.config.parallel
    if not isinstance(plan.shape, GPTConfig):
        return 0, 1.0
    block, output = forward_flops(plan.shape, plan.config.data.seq_length)
    passes = repeated = again = 0
    if plan.config.data.phase in TRAINING:
        passes, again = 2, alternating and parallel.zero_stage == 3
        repeated = parallel.recompute_granularity == "full"
    passes += 1
    bounds = stage_bounds(plan.shape.num_layers, stages, 0, 0)
    work = [(b - a) * block * (passes + again + repeated) for a, b in pairwise(bounds)]
    work[-1] += output * (passes + again)
    slowest = max(range(stages), key=lambda stage: work[stage])
    return slowest, work[slowest] * stages / passes / (plan.shape.num_layers * block + output)


def planned_tokens(plan: RunPlan) -> int:
    """Tokens that a training run reads, or that scoring records at most."""
    if plan.config.data.phase == SCORE:
        return sum(plan.windows_needed) * plan.config.data.seq_length
    return plan.tokens


def run_flops_per_token(plan: RunPlan, reference: Shape | None) -> float:
    """Floating point operations per token of a training run, with the forward pass of an online reference; of scoring,
    those of its forward pass. Recomputation does not count. A model that Transformers runs counts by its parameters.

    Args:
        reference: of a proxy that runs it online.
    """
    seq_length = plan.config.data.seq_length

    def forward(shape: Shape) -> float:
        if isinstance(shape, GPTConfig):
            return flops_per_token(shape, seq_length) / 3
        return 2.0 * shape.parameters

    passes = 3 if plan.config.data.phase in TRAINING else 1
    return passes * forward(plan.shape) + (forward(reference) if reference else 0.0)


def flops_per_second(plan: RunPlan) -> float:
    """Floating point operations a second of all ranks at the stated utilization of the stated device."""
    planning = plan.config.planning
    return plan.topology.world_size * PEAK_TFLOPS[planning.dry_run_device] * 1e12 * planning.dry_run_mfu


def bubble(plan: RunPlan) -> float:
    """The share of a step in which a stage of the pipeline waits: (P - 1) / (M + P - 1) with P stages and M
    micro-batches (Narayanan et al. 2021, section 2.2), in 1F1B as in the alternating schedule, which fills and drains
    the pipeline once forward and once backward."""
    idle = plan.topology.pipe_size - 1
    return idle / (plan.micro_batches + idle)


def checkpoint_bytes(plan: RunPlan, parameters: int) -> float:
    """Bytes of a checkpoint on disk: weights, two moments, and float32 master weights of bfloat16 ones.

    Args:
        parameters: of the model.
    """
    return parameters * (2.0 + 12.0 if plan.config.optimizer.bf16 else 4.0 + 8.0)
