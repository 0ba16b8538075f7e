"""What a rank sends in a step over each of its groups, and the time that takes on stated links.

Counted as tests/planning/test_communication.py records it: what layers, stages and replicas exchange. Not counted: a
step's flags and norms and the statistics by domain, some numbers each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron_doremi.engine.reduction import BUCKET_ELEMENTS
from megatron_doremi.parallel.topology import stage_bounds
from megatron_doremi.plan import RunPlan
from megatron_doremi.planning.compute import matrices_of_a_block
from megatron_doremi.planning.memory import BUCKET, GATHERED, PREFETCHED, parameters_by_stage, unsharded_by_zero
from megatron_doremi.settings import TRAINING
from megatron_doremi.shapes import GPTConfig, Shape

TENSOR, PIPELINE, DATA = "tensor", "pipeline", "data"
# Seconds from the call of a collective to its first byte: an assumption, of the order of NCCL's on one machine.
LATENCY = 20e-6
ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, SEND = "all-reduce", "all-gather", "reduce-scatter", "send"


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind in a step.

    Attributes:
        group: TENSOR, PIPELINE or DATA.
        operation: ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER or SEND.
        size: ranks that take part.
        payload: bytes of a step: of the tensors reduced, sent, filled by gathering or read by scattering.
        calls: collectives in a step.
    """

    group: str
    operation: str
    size: int
    payload: float
    calls: float

    @property
    def sent(self) -> float:
        """Bytes that a rank sends, around a ring (Thakur et al. 2005)."""
        if self.operation == SEND:
            return self.payload
        rounds = 2 if self.operation == ALL_REDUCE else 1
        return self.payload * rounds * (self.size - 1) / self.size

    def seconds(self, bandwidth: float) -> float:
        """Time over a link of so many bytes a second."""
        return self.sent / bandwidth + self.calls * LATENCY


def stage_traffic(plan: RunPlan, alternating: bool, reference: Shape | None, stage: int) -> list[Traffic]:
    """What a rank of a pipeline stage takes part in, in one step; of scoring, for one micro-batch.

    Args:
        alternating: all forward passes of a step come before its first backward pass.
        reference: of a proxy that runs it online.
    """
    if not isinstance(plan.shape, GPTConfig):
        return []
    trains, micro_batches = plan.config.data.phase in TRAINING, plan.micro_batches
    # ZeRO 3 scores a batch first, and passes it forward again to train.
    scored_first = trains and alternating and plan.config.parallel.zero_stage == 3
    chunk = plan.execution(alternating).loss_chunk_tokens
    found = list(_passes(plan, plan.shape, stage, micro_batches, not trains, chunk))
    if scored_first:
        found += _passes(plan, plan.shape, stage, micro_batches, True, chunk)
    if isinstance(reference, GPTConfig):
        chunk = plan.frozen_execution.loss_chunk_tokens
        found += _passes(plan, reference, stage, micro_batches, True, chunk)
    if trains:
        found += _gradients_and_weights(plan, stage, scored_first)
    total: dict[tuple[str, str, int], tuple[float, float]] = {}
    for each in found:
        key = (each.group, each.operation, each.size)
        payload, calls = total.get(key, (0.0, 0.0))
        total[key] = payload + each.payload, calls + each.calls
    return [Traffic(*key, payload, calls) for key, (payload, calls) in total.items() if payload]


def _passes(plan: RunPlan, gpt: GPTConfig, stage: int, count: int, forward_only: bool, chunk: int) -> Iterator[Traffic]:
    """What layers and stages exchange in `count` forward passes, with their backward passes or without.

    Args:
        chunk: tokens whose logits are computed at a time; 0: all.
    """
    topology, parallel, element = plan.topology, plan.config.parallel, plan.dtype.itemsize
    tensor, stages = topology.tensor_size, topology.pipe_size
    first, last, tokens = stage == 0, stage == stages - 1, math.prod(plan.batch_shape)
    hidden = count * tokens * gpt.hidden_size * element
    if tensor > 1:
        yield from _layers(plan, gpt, stage, count, hidden, forward_only)
        if last:
            # The maximum logit, the target's and the sum of exponentials.
            chunks = math.ceil(tokens / (chunk or tokens))
            yield Traffic(TENSOR, ALL_REDUCE, tensor, 12.0 * tokens * count, 2 * chunks * count)
    boundary = hidden / (tensor if parallel.sequence_parallel else 1)
    sends = (not last) + (not first and not forward_only)
    yield Traffic(PIPELINE, SEND, 2, boundary * sends, count * sends)


def _layers(
    plan: RunPlan, gpt: GPTConfig, stage: int, count: int, hidden: float, forward_only: bool
) -> Iterator[Traffic]:
    """What the layers of a stage exchange over the tensor group; `hidden` bytes are those of the residual stream."""
    topology, parallel, element = plan.topology, plan.config.parallel, plan.dtype.itemsize
    tensor, stages = topology.tensor_size, topology.pipe_size
    blocks = _blocks(gpt, stages, stage)
    first, last = stage == 0, stage == stages - 1
    backward = not forward_only
    # Full recomputation ends where the last layer of a block has its input, before its sum.
    again = blocks * (backward and parallel.recompute_granularity == "full")
    if parallel.sequence_parallel:
        # A layer that is sharded by columns gathers its input once more in the backward pass, and so does the output;
        # a compiled block keeps what it has gathered.
        repeated = 2 * backward * (not parallel.compile)
        gathered = blocks * (2 * (1 + backward) + repeated) + 2 * again + first * backward + last * (1 + backward)
        scattered = blocks * 2 * (1 + backward) + again + first + last * backward
        yield Traffic(TENSOR, ALL_GATHER, tensor, hidden * gathered, count * gathered)
        yield Traffic(TENSOR, REDUCE_SCATTER, tensor, hidden * scattered, count * scattered)
    else:
        summed = blocks * 2 * (1 + backward) + again + first + last * backward
        yield Traffic(TENSOR, ALL_REDUCE, tensor, hidden * summed, count * summed)
    if backward:
        for length, number in _replicated(gpt, parallel.sequence_parallel, blocks, first, last):
            yield Traffic(TENSOR, ALL_REDUCE, tensor, float(count * number * length * element), count * number)


def _replicated(
    gpt: GPTConfig, sequence_parallel: bool, blocks: int, first: bool, last: bool
) -> Iterator[tuple[int, int]]:
    """Parameters that every rank of a tensor group applies to its own positions or heads: their gradients are summed
    for each micro-batch, one by one. Yields lengths and numbers of such parameters."""
    vectors = 2 if gpt.normalization == "LayerNorm" else 1
    if gpt.qk_layernorm:
        yield gpt.kv_channels, blocks * 2 * vectors
    if sequence_parallel:
        # Two norms a block, the biases of the two layers that are sharded by rows, the last norm, learned positions.
        yield gpt.hidden_size, blocks * (2 * vectors + 2 * gpt.bias_linear) + last * vectors
        if gpt.position_embedding_type == "learned_absolute":
            yield gpt.max_positions * gpt.hidden_size, int(first)


def _gradients_and_weights(plan: RunPlan, stage: int, scored_first: bool) -> Iterator[Traffic]:
    """What the replicas exchange, and the two copies of a tied embedding. Gradients are reduced in float32."""
    topology, gpt, zero = plan.topology, plan.gpt, plan.config.parallel.zero_stage
    element, count, replicas = plan.dtype.itemsize, plan.micro_batches, topology.data_size
    counts = parameters_by_stage(gpt, topology.tensor_size, topology.pipe_size)
    if gpt.tied_embeddings and topology.pipe_size > 1 and stage in (0, topology.pipe_size - 1):
        rows = gpt.padded_vocab_size(topology.tensor_size) // topology.tensor_size
        yield Traffic(PIPELINE, ALL_REDUCE, 2, 4.0 * rows * gpt.hidden_size, 1)
    if plan.config.optimizer.optimizer == "muon":
        yield from _matrices_of_muon(plan, _blocks(gpt, topology.pipe_size, stage))
    if replicas == 1:
        return
    buckets = math.ceil(counts[stage] / BUCKET)
    if zero == 3:
        whole = unsharded_by_zero(gpt, topology.tensor_size)
        # Gathered weights stay from the forward to the backward pass as far as DeepSpeed's limit allows; after a pass
        # without a backward pass DeepSpeed does not know what comes, and they do not.
        passes = count * (3 if scored_first else 2 if counts[stage] > GATHERED else 1)
        gathered = element * ((counts[stage] - whole) * passes + whole)
        yield Traffic(DATA, REDUCE_SCATTER, replicas, 4.0 * counts[stage] * count, count * buckets)
        yield Traffic(DATA, ALL_GATHER, replicas, float(gathered), passes * math.ceil(counts[stage] / PREFETCHED))
        return
    # ZeRO 2 reduces the gradient of each micro-batch: our own to the shards, DeepSpeed's, which offloads, in full.
    own = not plan.config.parallel.cpu_offload
    buckets = math.ceil(counts[stage] / BUCKET_ELEMENTS) if own else buckets
    reductions = count if zero == 2 else 1
    operation = REDUCE_SCATTER if zero == 2 and own else ALL_REDUCE
    yield Traffic(DATA, operation, replicas, 4.0 * counts[stage] * reductions, buckets * reductions)
    if zero:
        # Of matrices and of vectors; of buckets.
        gathers = buckets if zero == 2 and own else 2
        yield Traffic(DATA, ALL_GATHER, replicas, float(element * counts[stage]), gathers)


def _matrices_of_muon(plan: RunPlan, blocks: int) -> Iterator[Traffic]:
    """What joins the momentum of a stage's matrices in float32: under ZeRO 1 over the replicas, all in a row; then each
    parameter over the tensor group."""
    tensor, replicas = plan.topology.tensor_size, plan.topology.data_size
    numbers = blocks * sum(rows * columns for rows, columns in matrices_of_a_block(plan.gpt))
    if plan.config.parallel.zero_stage and replicas > 1:
        yield Traffic(DATA, ALL_GATHER, replicas, 4.0 * numbers / tensor, 1)
    if tensor > 1:
        # The projections before and after attention, and those of the feed-forward layer.
        yield Traffic(TENSOR, ALL_GATHER, tensor, 4.0 * numbers, 4 * blocks)


def _blocks(gpt: GPTConfig, stages: int, stage: int) -> int:
    bounds = stage_bounds(gpt.num_layers, stages, 0, 0)
    return bounds[stage + 1] - bounds[stage]


@dataclass(frozen=True)
class Link:
    """What a group communicates over.

    Attributes:
        name: "node" or "network".
        bandwidth: bytes a second that each rank sends while it receives as many.
    """

    name: str
    bandwidth: float


def link_of(plan: RunPlan, group: str) -> Link:
    """The slowest link of a group's ring, by the order of ranks: tensor ranks are neighbors, then replicas, then
    stages. Between machines the ranks of a group on one machine share out its ring over their network links."""
    topology, planning = plan.topology, plan.config.planning
    stride, size = {
        TENSOR: (1, topology.tensor_size),
        DATA: (topology.tensor_size, topology.data_size),
        PIPELINE: (topology.tensor_size * topology.data_size, topology.pipe_size),
    }[group]
    inside, outside = planning.dry_run_node_bandwidth * 1e9, planning.dry_run_network_bandwidth * 1e9
    fewest = fewest_on_a_machine(stride, size, topology.world_size, planning.dry_run_gpus_per_node)
    if not fewest:
        return Link("node", inside)
    return Link("network", min(inside, outside * (1 if group == PIPELINE else fewest)))


@lru_cache(maxsize=4096)
def fewest_on_a_machine(stride: int, size: int, world_size: int, per_node: int) -> int:
    """The fewest ranks that a group which leaves a machine has on one of its machines; 0 if no group leaves one.

    Args:
        stride: from a rank of a group to the next.
        size: ranks of a group.
        per_node: ranks of a machine; the last one may have fewer.
    """
    ranks = np.arange(world_size)
    groups = ranks // (stride * size) * stride + ranks % stride
    places, counts = np.unique(groups * world_size + ranks // per_node, return_counts=True)
    groups = places // world_size
    leaves = np.bincount(groups) > 1
    return int(counts[leaves[groups]].min()) if leaves.any() else 0


def seconds_to_communicate(plan: RunPlan, alternating: bool, reference: Shape | None) -> float:
    """Seconds in which the busiest rank exchanges what `stage_traffic` counts, if nothing overlaps."""
    last = plan.topology.pipe_size - 1
    # The stages in the middle exchange about the same.
    traffic = [stage_traffic(plan, alternating, reference, stage) for stage in sorted({0, last // 2, last})]
    return max(sum(each.seconds(link_of(plan, each.group).bandwidth) for each in stage) for stage in traffic)
