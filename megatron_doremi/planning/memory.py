"""Parameters and bytes that a rank will hold, computed before a run starts.

Activations follow the formula of docs/memory.md, measured by tests/planning/test_memory.py: all that is held for the
backward pass, and what is at work while the loss is computed. Not counted: a few numbers per token (statistics of norms
and softmax, rotary angles), temporary buffers of other operations, and what docs/memory.md lists.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

from megatron_doremi.config import Config, GPTConfig, ParallelConfig
from megatron_doremi.model.pipeline import layer_names
from megatron_doremi.model.sizes import parameters_by_layer
from megatron_doremi.parallel.topology import stage_bounds
from megatron_doremi.plan import RunPlan
from megatron_doremi.settings import TRAINING
from megatron_doremi.shapes import Shape, TransformersShape


@dataclass(frozen=True)
class RankMemory:
    """Bytes on the rank that holds most.

    Attributes:
        state: weights; in training also gradients and optimizer state.
        activations: held for backward passes; 0 without training.
        held: micro-batches whose activations are held.
        reference: weights of a proxy's online reference.
        loss: at work while the loss is computed.
    """

    state: float
    activations: float
    held: int
    reference: float
    loss: float

    @property
    def total(self) -> float:
        return self.state + self.activations + self.reference + self.loss


def block_bytes_per_token(gpt: GPTConfig, parallel: ParallelConfig, element: int) -> float:
    """Bytes that one transformer block holds per token of a micro-batch on one rank.

    Args:
        element: bytes of an activation, 2 in bfloat16, else 4.
    """
    tensor, hidden = parallel.tensor_model_parallel_size, gpt.hidden_size
    # The residual stream is sharded by position over the tensor parallel group, or replicated on each of its ranks.
    residual = hidden / tensor if parallel.sequence_parallel else hidden
    if parallel.recompute_granularity == "full":
        return element * residual
    queries = gpt.num_attention_heads * gpt.kv_channels / tensor
    keys = gpt.num_query_groups * gpt.kv_channels / tensor
    # Both norms' inputs and outputs.
    norms = 2 * (residual + hidden)
    # Queries, keys and values as the attention reads them, and its output.
    attention = queries + 2 * keys + queries
    if gpt.qk_layernorm and parallel.recompute_granularity == "none":
        # Their norms hold their inputs.
        attention += queries + keys
    mlp = (3 if gpt.swiglu else 2) * gpt.ffn_hidden_size / tensor
    return element * (norms + attention + mlp)


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
        per_token += element * (residual + hidden)
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


def parameter_counts(shape: Shape, tensor_size: int, pipe_size: int) -> tuple[int, int]:
    """Parameters of a model, and of the rank that holds most of them, without ZeRO."""
    if isinstance(shape, TransformersShape):
        # Every rank holds all of it.
        return shape.parameters, shape.parameters
    return sum(parameters_by_layer(shape, 1)), max(parameters_by_stage(shape, tensor_size, pipe_size))


def held_activations(plan: RunPlan, alternating: bool) -> tuple[float, int]:
    """(bytes of activations, number of micro-batches) that the fullest stage holds for its backward passes.

    Args:
        alternating: all forward passes of a step come before its first backward pass.
    """
    config, gpt, stages = plan.config, plan.gpt, plan.topology.pipe_size
    parallel = replace(config.parallel, loss_chunk_tokens=plan.loss_chunk_tokens(alternating))
    tokens, element = math.prod(plan.batch_shape), plan.dtype.itemsize
    blocks = [b - a for a, b in pairwise(stage_bounds(gpt.num_layers, stages, 0, 0))]
    return max(
        (held * micro_batch_bytes(gpt, parallel, tokens, element, blocks[stage], stage), held)
        for stage in range(stages)
        for held in [
            held_micro_batches(alternating, plan.micro_batches, stages, stage, config.parallel.zero_stage),
        ]
    )


def loss_bytes(shape: Shape, parallel: ParallelConfig, tokens: int, element: int, trains: bool) -> float:
    """Bytes at work while the loss of a micro-batch is computed, beside logits that are held for the backward pass.

    With chunks, the backward pass holds four copies of a chunk's logits in float32 (logits, log-softmax, and their
    gradients) beside the float32 sum of the output layer's gradient; or that sum, a chunk's summand and the gradient
    of the logits; or at the end that sum and its copies in the precision of the weights.

    Args:
        tokens: of a micro-batch.
        element: bytes of a weight, 2 in bfloat16, else 4.
        trains: whether there is a backward pass.
    """
    tensor, chunk = parallel.tensor_model_parallel_size, parallel.loss_chunk_tokens
    rows = shape.padded_vocab_size(tensor) / tensor
    logits = 4 * rows * min(chunk or tokens, tokens)
    rounded = logits * element / 4
    if not trains:
        return 2 * logits + rounded
    assert isinstance(shape, GPTConfig), shape
    gradient = 4 * rows * shape.hidden_size
    if not chunk:
        return 2 * logits + rounded + gradient * element / 4
    summed = gradient if tokens > chunk else 0.0
    return max(4 * logits + summed, rounded + gradient + summed, 2 * gradient)


def rank_memory(plan: RunPlan, alternating: bool, parameters: int, reference_parameters: int) -> RankMemory:
    """What the rank that holds most will hold.

    Args:
        alternating: all forward passes of a step come before its first backward pass.
        parameters: of the largest stage on a rank, without ZeRO.
        reference_parameters: the same of an online reference; 0: none. Replicas do not share it.
    """
    config, element = plan.config, plan.dtype.itemsize
    state, activations, held = float(element), 0.0, 0
    parallel = replace(config.parallel, loss_chunk_tokens=plan.loss_chunk_tokens(alternating))
    trains = config.data.phase in TRAINING
    if trains:
        state = state_bytes_per_parameter(config, plan.topology.data_size)
        activations, held = held_activations(plan, alternating)
    return RankMemory(
        state=parameters * state,
        activations=activations,
        held=held,
        reference=float(reference_parameters * element),
        loss=loss_bytes(plan.shape, parallel, math.prod(plan.batch_shape), element, trains),
    )
