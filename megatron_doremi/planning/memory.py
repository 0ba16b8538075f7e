"""Parameters and bytes that the ranks of each pipeline stage will hold, computed before a run starts.

Activations follow the formula of docs/memory.md; tests/planning/test_memory.py measures all of it: what is held for the
backward pass, what is at work while the loss is computed, and DeepSpeed's buffers. Not counted: a few numbers per token
(statistics of norms and softmax, rotary angles), temporary buffers of other operations, and what docs/memory.md lists.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

from megatron_doremi.config import Config, GPTConfig, ParallelConfig, TrainingConfig
from megatron_doremi.engine.reduction import BUCKET_ELEMENTS
from megatron_doremi.model.pipeline import layer_names
from megatron_doremi.model.sizes import parameter_specs, parameters_by_layer
from megatron_doremi.parallel.topology import stage_bounds
from megatron_doremi.plan import RunPlan
from megatron_doremi.planning.block_memory import (
    PLAIN,
    block_backward_bytes_per_token,
    block_bytes_per_token,
    dropout_bytes_per_token,
)
from megatron_doremi.planning.compute import muon_bytes
from megatron_doremi.planning.document_memory import document_bytes_per_token
from megatron_doremi.settings import TRAINING
from megatron_doremi.shapes import Shape, TransformersShape

# DeepSpeed's limits (0.19.8), in elements: of a bucket of gradients, of the parameters that ZeRO 3 keeps gathered, and
# of those that it gathers in advance.
BUCKET = 500_000_000
GATHERED = 1_000_000_000
PREFETCHED = 50_000_000


@dataclass(frozen=True)
class StageMemory:
    """Bytes on the device of a rank of one pipeline stage, at the moment when it holds most.

    Attributes:
        stage: its number, from 0.
        blocks: its transformer blocks.
        parameters: numbers in the weights that it holds; under ZeRO 3 in its shard.
        weights, gradients, optimizer: its state; gradients and optimizer state only in training.
        activations: held for backward passes; 0 without training.
        held: micro-batches whose activations are held.
        reference: weights of a proxy's online reference.
        loss: at work while the loss is computed, on the last stage.
        working: a block's backward pass and DeepSpeed's buffers, beyond what the loss takes at another moment.
    """

    stage: int
    blocks: int
    parameters: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    held: int
    reference: float
    loss: float
    working: float

    @property
    def state(self) -> float:
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        return self.state + self.activations + self.reference + self.loss + self.working


def micro_batch_bytes(
    gpt: GPTConfig,
    parallel: ParallelConfig,
    tokens: int,
    element: int,
    blocks: int,
    stage: int,
    training: TrainingConfig = PLAIN,
) -> float:
    """Bytes that a pipeline stage holds of a micro-batch between its forward and its backward pass.

    Args:
        tokens: of the micro-batch.
        blocks: transformer blocks of the stage.
        stage: its number, from 0.
        training: its dropout.
    """
    tensor, hidden = parallel.tensor_model_parallel_size, gpt.hidden_size
    residual = hidden / tensor if parallel.sequence_parallel else hidden
    last = stage == parallel.pipeline_model_parallel_size - 1
    # Received and sent activations stay in the pipe's buffers.
    per_token = element * residual * ((stage > 0) + (not last))
    per_token += blocks * block_bytes_per_token(gpt, parallel, element, training)
    if training.hidden_dropout and stage == 0:
        # The mask of the embeddings.
        per_token += residual
    per_token += document_bytes_per_token(gpt, element, training)
    if last:
        # The final norm, the output layer's input, and its logits unless they are recomputed.
        per_token += element * 2 * residual
        if not parallel.loss_chunk_tokens:
            per_token += element * gpt.padded_vocab_size(tensor) / tensor
    return tokens * per_token


def held_micro_batches(alternating: bool, micro_batches: int, stages: int, stage: int, zero_stage: int) -> int:
    """Maximum number of micro-batches whose activations a stage holds.

    The alternating schedule holds all of a step; 1F1B those between a stage and the end of the pipe. ZeRO 3 scores a
    batch first and holds one micro-batch.
    """
    if alternating and zero_stage < 3:
        return micro_batches
    return min(micro_batches, stages - stage)


def state_bytes(config: Config, data_size: int) -> tuple[float, float, float]:
    """Bytes of weights, gradients and optimizer state on the device per parameter of a rank's part of the model."""
    stage, bf16 = config.parallel.zero_stage, config.optimizer.bf16
    # Two moments, and master weights unless the weights themselves are float32 and unsharded.
    state = 12.0 if bf16 or stage else 8.0
    on_device = 0.0 if config.parallel.cpu_offload else 1.0
    sizes = ((2.0 if bf16 else 4.0, 3), (4.0 * on_device, 2), (state * on_device, 1))
    weights, gradients, optimizer = (size / data_size if stage >= least else size for size, least in sizes)
    return weights, gradients, optimizer


def host_bytes_per_parameter(config: Config, data_size: int) -> float:
    """Host memory of a rank per parameter with --cpu-offload: master weights, two moments, the sum of the gradients
    over micro-batches, and its copy for the optimizer."""
    return 20.0 / data_size if config.parallel.cpu_offload else 0.0


@lru_cache(maxsize=1024)
def parameters_by_stage(gpt: GPTConfig, tensor_size: int, pipe_size: int) -> tuple[int, ...]:
    """Parameters that a rank of each pipeline stage holds, without ZeRO."""
    counts, names = parameters_by_layer(gpt, tensor_size), layer_names(gpt)
    first = names.index("layers.0")
    bounds = stage_bounds(gpt.num_layers, pipe_size, first, len(names) - first - gpt.num_layers)
    stages = [sum(counts[a:b]) for a, b in pairwise(bounds)]
    if gpt.tied_embeddings and pipe_size > 1:
        stages[-1] += counts[0]
    return tuple(stages)


@lru_cache(maxsize=1024)
def unsharded_by_zero(gpt: GPTConfig, tensor_size: int) -> int:
    """Parameters that ZeRO 3 keeps on every rank: vectors, up to `stage3_param_persistence_threshold`."""
    total = 0
    for spec in parameter_specs(gpt).values():
        shape = list(spec.shape)
        if spec.dim is not None:
            # The vocabulary is not padded here.
            shape[spec.dim] = -(-shape[spec.dim] // tensor_size)
        total += math.prod(shape) if math.prod(shape) <= 10 * gpt.hidden_size else 0
    return total


def stage_parameters(shape: Shape, tensor_size: int, pipe_size: int) -> tuple[int, ...]:
    """Parameters that a rank of each pipeline stage holds of any model, without ZeRO."""
    if isinstance(shape, TransformersShape):
        # Every rank holds all of it.
        return (shape.parameters,) * pipe_size
    return parameters_by_stage(shape, tensor_size, pipe_size)


def parameter_counts(shape: Shape, tensor_size: int, pipe_size: int) -> tuple[int, int]:
    """Parameters of a model, and of the rank that holds most of them, without ZeRO."""
    largest = max(stage_parameters(shape, tensor_size, pipe_size))
    if isinstance(shape, TransformersShape):
        return shape.parameters, largest
    return sum(parameters_by_layer(shape, 1)), largest


def loss_bytes(shape: Shape, parallel: ParallelConfig, tokens: int, element: int, trains: bool) -> float:
    """Bytes at work while the loss of a micro-batch is computed, beside logits that are held for the backward pass.

    The forward pass holds logits and log-softmax in float32; the backward pass overwrites logits by their gradient. In
    bfloat16 the product that gives the logits, and their rounded gradient, come on top. A compiled pass holds the
    product and the gradient only; with tensor parallelism the forward pass is not compiled. With chunks the sum of the
    output layer's gradient is float32: it is held beside a chunk's logits; beside their gradient and, in float32, a
    summand; and at the end beside its copy in bfloat16, or in float32 one with the rows of the vocabulary's padding.

    Args:
        tokens: of a micro-batch.
        element: bytes of a weight, 2 in bfloat16, else 4.
        trains: whether there is a backward pass.
    """
    tensor, chunk = parallel.tensor_model_parallel_size, parallel.loss_chunk_tokens
    padded, float32 = shape.padded_vocab_size(tensor), element == 4
    rows, one_chunk = padded / tensor, not chunk or tokens <= chunk
    logits = 4 * rows * min(chunk or tokens, tokens)
    product = logits * element / 4
    # Of 16 bits the product, and later its gradient, is another tensor than the logits in float32.
    separate = 0.0 if float32 else product
    # With sequence parallelism all positions are gathered for this time.
    gathered = 0.0
    if isinstance(shape, GPTConfig) and parallel.sequence_parallel and tensor > 1:
        gathered = float(element * tokens * shape.hidden_size)
    compiled = parallel.compile and isinstance(shape, GPTConfig)
    in_float32 = logits if float32 or not compiled else 0.0
    forward = separate + (in_float32 if compiled and tensor == 1 else 2 * logits)
    if not trains:
        return forward + gathered
    assert isinstance(shape, GPTConfig), shape
    backward = in_float32 + 2 * separate
    weight_gradient = element * rows * shape.hidden_size
    running_sum = 0.0 if one_chunk else 4 * rows * shape.hidden_size
    if float32:
        final_copy = weight_gradient if padded > shape.vocab_size else 0.0
    else:
        final_copy = 0.0 if one_chunk else weight_gradient
    end = (running_sum or weight_gradient) + final_copy
    if not chunk:
        # The held product is counted already. In 16 bits it stays beside its gradient until all are computed.
        return max(forward - product, backward - product, separate + weight_gradient, end) + gathered
    # A summand in float32 lies beside the sum; one chunk has no other.
    summand = weight_gradient if float32 or one_chunk else 0.0
    return max(forward, backward + running_sum, product + running_sum + summand, end) + gathered


def buffer_bytes(config: Config, parameters: int, data_size: int, largest: int) -> tuple[float, float, float, float]:
    """Bytes of buffers on a rank, DeepSpeed's (0.19.8) and ours, by the moment at which they are held.

    Args:
        parameters: of the rank's part of the model, without ZeRO.
        largest: numbers in the largest of them.

    Returns:
        Those that last; those beside activations and loss; those beside activations once the loss is differentiated;
        and those at the end of a step, when there are no activations.
    """
    stage, element = config.parallel.zero_stage, 2 if config.optimizer.bf16 else 4
    bucket = min(BUCKET, parameters)
    if stage == 3:
        # Gradients are copied to the bucket, and from there in the order of their shards.
        copied = 4.0 * bucket if data_size > 1 else 0.0
        gathered = element * min(GATHERED, parameters) if data_size > 1 else 0.0
        flushed = copied if parameters > BUCKET else element * min(PREFETCHED, parameters) * (data_size > 1)
        return 4.0 * bucket, gathered, gathered + flushed, gathered + copied
    if stage == 2 and not config.parallel.cpu_offload:
        # Gradients fill a bucket and are copied to float32, of which a shard is received. Beside the bucket that is
        # filled two are under way, one of which may be that of the largest parameter. Of a model that fits one bucket
        # this comes when no activations are held any more.
        received = 4.0 + 4.0 / data_size if data_size > 1 else 4.0
        bucket = min(parameters, max(BUCKET_ELEMENTS, largest))
        at_the_end = max((element + 4.0) * bucket, received * bucket)
        if parameters <= BUCKET_ELEMENTS:
            return 0.0, 0.0, 0.0, at_the_end
        return 0.0, 0.0, element * BUCKET_ELEMENTS + received * (bucket + BUCKET_ELEMENTS), at_the_end
    if stage == 2:
        # The bucket, its tensors flattened, and these in float32.
        full = (2.0 * element + 4.0) * bucket
        return 0.0, 0.0, full if parameters > BUCKET else float(element * bucket), full
    # Under ZeRO 1 gradients are reduced in place; without ZeRO they are copied.
    return 0.0, 0.0, 0.0, 4.0 * parameters if data_size > 1 and stage == 0 else 0.0


def stage_memories(plan: RunPlan, alternating: bool, reference: Shape | None) -> list[StageMemory]:
    """What a rank of each pipeline stage will hold.

    Args:
        alternating: all forward passes of a step come before its first backward pass.
        reference: of a proxy that runs it online. Replicas do not share it.
    """
    config, topology, element = plan.config, plan.topology, plan.dtype.itemsize
    stages, trains = topology.pipe_size, config.data.phase in TRAINING
    if not isinstance(plan.shape, GPTConfig):
        loss = loss_bytes(plan.shape, config.parallel, math.prod(plan.batch_shape), element, trains)
        weights = float(plan.shape.parameters * element)
        return [StageMemory(0, 0, plan.shape.parameters, weights, 0.0, 0.0, 0.0, 0, 0.0, loss, 0.0)]
    counts = parameters_by_stage(plan.shape, topology.tensor_size, stages)
    references = stage_parameters(reference, topology.tensor_size, stages) if reference else (0,) * stages
    blocks = [b - a for a, b in pairwise(stage_bounds(plan.shape.num_layers, stages, 0, 0))]
    return [
        _stage_memory(plan, alternating, stage, blocks[stage], counts[stage], references[stage])
        for stage in range(stages)
    ]


def _stage_memory(
    plan: RunPlan, alternating: bool, stage: int, blocks: int, parameters: int, reference: int
) -> StageMemory:
    """See `stage_memories`; `parameters` and `reference` count those of a rank of the stage, without ZeRO."""
    config, data_size = plan.config, plan.topology.data_size
    parallel = replace(config.parallel, loss_chunk_tokens=plan.execution(alternating).loss_chunk_tokens)
    tokens, element, stages = math.prod(plan.batch_shape), plan.dtype.itemsize, plan.topology.pipe_size
    trains = config.data.phase in TRAINING
    loss = loss_bytes(plan.shape, parallel, tokens, element, trains) if stage == stages - 1 else 0.0
    reference_bytes = float(reference * element)
    if not trains:
        weights = float(parameters * element)
        return StageMemory(stage, blocks, parameters, weights, 0.0, 0.0, 0.0, 0, reference_bytes, loss, 0.0)
    weights, gradients, optimizer = (parameters * each for each in state_bytes(config, data_size))
    held_parameters = parameters
    if parallel.zero_stage == 3:
        whole = unsharded_by_zero(plan.gpt, plan.topology.tensor_size)
        held_parameters = -(-(parameters - whole) // data_size) + whole
        weights = float(held_parameters * element)
    held = held_micro_batches(alternating, plan.micro_batches, stages, stage, parallel.zero_stage)
    # A model with learned positions may have more of them than a window has.
    gpt, training = replace(plan.gpt, max_positions=plan.batch_shape[1]), config.training
    activations = held * micro_batch_bytes(gpt, parallel, tokens, element, blocks, stage, training)
    largest = gpt.padded_vocab_size(plan.topology.tensor_size) // plan.topology.tensor_size * gpt.hidden_size
    lasting, beside_loss, beside_backward, at_the_end = buffer_bytes(config, parameters, data_size, largest)
    if config.optimizer.optimizer == "muon":
        at_the_end = max(at_the_end, muon_bytes(gpt, parallel, blocks, data_size))
    beside_backward += tokens * max(
        block_backward_bytes_per_token(gpt, parallel, element, training),
        dropout_bytes_per_token(gpt, parallel, element, training),
    )
    most = max(activations + max(loss + beside_loss, beside_backward), at_the_end)
    working = lasting + most - activations - loss
    return StageMemory(
        stage,
        blocks,
        held_parameters,
        weights,
        gradients,
        optimizer,
        activations,
        held,
        reference_bytes,
        loss,
        working,
    )


def rank_memory(plan: RunPlan, alternating: bool, reference: Shape | None) -> StageMemory:
    """What the rank that holds most will hold; the arguments are those of `stage_memories`."""
    return max(stage_memories(plan, alternating, reference), key=lambda each: each.total)
