"""Parameters and bytes that a rank will hold, computed before a run starts.

Activations follow the formula of docs/memory.md, measured by tests/planning/test_memory.py: all that is held for the
backward pass. Not counted: a few numbers per token (statistics of norms and softmax, rotary angles), and temporary
buffers of an operation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from megatron_doremi.config import Config, GPTConfig, ParallelConfig
from megatron_doremi.model.pipeline import layer_names
from megatron_doremi.model.sizes import parameters_by_layer
from megatron_doremi.parallel.topology import stage_bounds
from megatron_doremi.plan import RunPlan
from megatron_doremi.settings import TRAINING


@dataclass(frozen=True)
class RankMemory:
    """Bytes on the rank that holds most.

    Attributes:
        state: weights; in training also gradients and optimizer state.
        activations: held for backward passes; 0 without training.
        held: micro-batches whose activations are held.
        reference: weights of a proxy's online reference.
        logits: of the tokens whose loss is being computed.
    """

    state: float
    activations: float
    held: int
    reference: float
    logits: float

    @property
    def total(self) -> float:
        return self.state + self.activations + self.reference + self.logits


def block_bytes_per_token(gpt: GPTConfig, parallel: ParallelConfig, element: int) -> float:
    """Bytes that one transformer block holds per token of a micro-batch on one rank.

    Args:
        element: bytes of an activation, 2 in bfloat16, else 4. Norms always hold their input in float32.
    """
    tensor, hidden = parallel.tensor_model_parallel_size, gpt.hidden_size
    # The residual stream is sharded by position over the tensor parallel group, or replicated on each of its ranks.
    residual = hidden / tensor if parallel.sequence_parallel else hidden
    if parallel.recompute_granularity == "full":
        return element * residual
    queries = gpt.num_attention_heads * gpt.kv_channels / tensor
    keys = gpt.num_query_groups * gpt.kv_channels / tensor
    norms = 2 * (4 * residual + element * hidden)
    # The fused projection and the heads' outputs; also rotated queries and keys, unless they are recomputed.
    attention = queries + 2 * keys + queries
    if gpt.position_embedding_type == "rope" and parallel.recompute_granularity == "none":
        attention += queries + keys
    mlp = (4 if gpt.swiglu else 2) * gpt.ffn_hidden_size / tensor
    return norms + element * (attention + mlp)


def micro_batch_bytes(
    gpt: GPTConfig, parallel: ParallelConfig, tokens: int, element: int, blocks: int, stage: int
) -> float:
    """Bytes that a pipeline stage holds of a micro-batch between its forward and its backward pass.

    Args:
        tokens: of the micro-batch.
        blocks: transformer blocks of the stage.
        stage: its number, from 0.
    """
    tensor, hidden = parallel.tensor_model_parallel_size, gpt.hidden_size
    residual = hidden / tensor if parallel.sequence_parallel else hidden
    last = stage == parallel.pipeline_model_parallel_size - 1
    # Received and sent activations stay in the pipe's buffers.
    per_token = element * residual * ((stage > 0) + (not last))
    per_token += blocks * block_bytes_per_token(gpt, parallel, element)
    if last:
        # The final norm, the output layer's input, and its logits unless they are recomputed.
        per_token += 4 * residual + element * hidden
        if not parallel.loss_chunk_tokens:
            per_token += 4 * gpt.padded_vocab_size(tensor) / tensor
    return tokens * per_token


def held_micro_batches(alternating: bool, micro_batches: int, stages: int, stage: int, zero_stage: int) -> int:
    """Maximum number of micro-batches whose activations a stage holds.

    The alternating schedule holds all of a step; 1F1B those between a stage and the end of the pipe. ZeRO 3 scores a
    batch first and holds one micro-batch.
    """
    if alternating and zero_stage < 3:
        return micro_batches
    return min(micro_batches, stages - stage)


def state_bytes_per_parameter(config: Config, data_size: int) -> float:
    """Bytes of weights, gradients and optimizer state on the device per parameter of a rank."""
    stage, bf16 = config.parallel.zero_stage, config.optimizer.bf16
    weights, gradients = (2.0, 4.0) if bf16 else (4.0, 4.0)
    # Two moments, and master weights unless the weights themselves are float32 and unsharded.
    state = 0.0 if config.parallel.cpu_offload else 12.0 if bf16 or stage else 8.0
    sharded = [
        size / data_size if stage >= least else size for size, least in ((weights, 3), (gradients, 2), (state, 1))
    ]
    return sum(sharded)


def parameters_by_stage(gpt: GPTConfig, tensor_size: int, pipe_size: int) -> list[int]:
    """Parameters that a rank of each pipeline stage holds, without ZeRO."""
    counts, names = parameters_by_layer(gpt, tensor_size), layer_names(gpt)
    first = names.index("layers.0")
    bounds = stage_bounds(gpt.num_layers, pipe_size, first, len(names) - first - gpt.num_layers)
    stages = [sum(counts[a:b]) for a, b in pairwise(bounds)]
    if gpt.tied_embeddings and pipe_size > 1:
        stages[-1] += counts[0]
    return stages


def held_activations(plan: RunPlan, alternating: bool) -> tuple[float, int]:
    """(bytes of activations, number of micro-batches) that the fullest stage holds for its backward passes.

    Args:
        alternating: all forward passes of a step come before its first backward pass.
    """
    config, gpt, stages = plan.config, plan.gpt, plan.topology.pipe_size
    tokens, element = math.prod(plan.batch_shape), plan.dtype.itemsize
    blocks = [b - a for a, b in pairwise(stage_bounds(gpt.num_layers, stages, 0, 0))]
    return max(
        (held * micro_batch_bytes(gpt, config.parallel, tokens, element, blocks[stage], stage), held)
        for stage in range(stages)
        for held in [
            held_micro_batches(alternating, plan.micro_batches, stages, stage, config.parallel.zero_stage),
        ]
    )


def logits_bytes(gpt: GPTConfig, parallel: ParallelConfig, tokens: int) -> float:
    """Bytes of the logits at work: three copies of a chunk (docs/memory.md); two beside logits that are held.

    Args:
        tokens: of a micro-batch.
    """
    tensor, chunk = parallel.tensor_model_parallel_size, parallel.loss_chunk_tokens
    row = 4 * gpt.padded_vocab_size(tensor) / tensor
    return 3 * row * min(chunk, tokens) if chunk else 2 * row * tokens


def rank_memory(plan: RunPlan, alternating: bool, parameters: int, reference_parameters: int) -> RankMemory:
    """What the rank that holds most will hold.

    Args:
        alternating: all forward passes of a step come before its first backward pass.
        parameters: of the largest stage on a rank, without ZeRO.
        reference_parameters: the same of an online reference; 0: none. Replicas do not share it.
    """
    config, element = plan.config, plan.dtype.itemsize
    state, activations, held = float(element), 0.0, 0
    if config.data.phase in TRAINING:
        state = state_bytes_per_parameter(config, plan.topology.data_size)
        activations, held = held_activations(plan, alternating)
    return RankMemory(
        state=parameters * state,
        activations=activations,
        held=held,
        reference=float(reference_parameters * element),
        logits=logits_bytes(plan.gpt, config.parallel, math.prod(plan.batch_shape)),
    )
