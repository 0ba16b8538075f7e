"""The arithmetic of a run: floating point operations, the pipeline's bubble, and the time at a stated utilization; what
Muon's part of it holds; the size of a checkpoint."""

from __future__ import annotations

from itertools import pairwise

from megatron_doremi.config import ParallelConfig
from megatron_doremi.devices import FLOAT32_TFLOPS, PEAK_TFLOPS
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


def device_tflops(plan: RunPlan) -> float:
    """Dense peak of the stated device in TFLOP/s, in the precision of the run's weights."""
    peaks = PEAK_TFLOPS if plan.config.optimizer.bf16 else FLOAT32_TFLOPS
    return peaks[plan.config.planning.dry_run_device]


def flops_per_second(plan: RunPlan) -> float:
    """Floating point operations a second of all ranks at the stated utilization of the stated device."""
    return plan.topology.world_size * device_tflops(plan) * 1e12 * plan.config.planning.dry_run_mfu


def matrices_of_a_block(gpt: GPTConfig) -> list[tuple[int, int]]:
    """Sizes (rows, columns) of the matrices of a block that Muon moves: those of engine/muon.py."""
    hidden, inner = gpt.hidden_size, gpt.ffn_hidden_size
    queries, keys = gpt.num_attention_heads * gpt.kv_channels, gpt.num_query_groups * gpt.kv_channels
    return [
        (queries, hidden),
        *[(keys, hidden)] * 2,
        (hidden, queries),
        *[(inner, hidden)] * (2 if gpt.swiglu else 1),
        (hidden, inner),
    ]


def muon_flops(plan: RunPlan) -> float:
    """Floating point operations, in float32, of the Newton-Schulz iterations of a step on the rank that has most: that
    of the stage with most blocks. Every rank of a stage computes all of its matrices. 0 without Muon.

    Five iterations of an m x n matrix, m <= n, take three products each: m x n x m, m x m x m and m x m x n.
    """
    config = plan.config
    if config.data.phase not in TRAINING or config.optimizer.optimizer != "muon":
        return 0.0
    pairs = [sorted(shape) for shape in matrices_of_a_block(plan.gpt)]
    blocks = max(b - a for a, b in pairwise(stage_bounds(plan.gpt.num_layers, plan.topology.pipe_size, 0, 0)))
    return blocks * sum(5.0 * (4 * m * m * n + 2 * m**3) for m, n in pairs)


def muon_seconds(plan: RunPlan) -> float:
    """Seconds that `muon_flops` take at least: at the device's float32 peak."""
    return muon_flops(plan) / FLOAT32_TFLOPS[plan.config.planning.dry_run_device] / 1e12


def muon_bytes(gpt: GPTConfig, parallel: ParallelConfig, blocks: int, data_size: int) -> float:
    """Bytes at work in Muon's step of a stage, in float32: under ZeRO 1 the momentum of this replica's range and of all
    matrices; the largest matrix with its step and four terms of an iteration."""
    sizes = [rows * columns for rows, columns in matrices_of_a_block(gpt)]
    iterations = 4.0 * 6 * max(sizes)
    if not parallel.zero_stage:
        return iterations
    numbers = blocks * sum(sizes) / parallel.tensor_model_parallel_size
    return 4.0 * numbers * ((1.0 if data_size > 1 else 0.0) + 1.0 / data_size) + iterations


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
