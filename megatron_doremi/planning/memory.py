"""What a run costs before it starts: parameters and bytes a rank, tokens a step. For --dry-run."""

from __future__ import annotations

import json
from itertools import pairwise

import torch

from megatron_doremi.config import (
    Config,
    GPTConfig,
    alternates,
    global_batch_size,
    micro_batches_per_step,
)
from megatron_doremi.model.gpt import Block
from megatron_doremi.model.pipeline import layer_names
from megatron_doremi.parallel.groups import TensorGroup
from megatron_doremi.parallel.layers import LearnedPositions, Norm, TensorParallel, VocabParallelEmbedding
from megatron_doremi.parallel.topology import Topology, stage_bounds
from megatron_doremi.planning.activations import held_micro_batches, micro_batch_bytes
from megatron_doremi.settings import PROXY, TRAINING


def parameters_by_layer(gpt: GPTConfig, tensor_size: int) -> list[int]:
    """Parameters of each pipeline layer on one tensor rank; a tied output layer counts as none."""
    tp = TensorParallel(TensorGroup(None, tensor_size, 0))
    with torch.device("meta"):
        vocabulary = VocabParallelEmbedding(
            gpt.vocab_size, gpt.padded_vocab_size(tensor_size), gpt.hidden_size, 0.0, tp
        )
        layers = {
            "embedding": vocabulary,
            "positions": LearnedPositions(gpt.max_positions, gpt.hidden_size, 0.0, tp),
            "layers": Block(gpt, tp),
            "final_norm": Norm(gpt.hidden_size, gpt.normalization, gpt.norm_epsilon, tp),
            "output": vocabulary,
        }
    sizes = {name: sum(p.numel() for p in layer.parameters()) for name, layer in layers.items()}
    counts = [sizes[name.split(".")[0]] for name in layer_names(gpt)]
    if gpt.tied_embeddings:
        counts[-1] = 0
    return counts


def state_bytes_per_parameter(config: Config, data_size: int) -> float:
    """Bytes of weights, gradients and optimizer state on the device for each parameter of a rank."""
    stage, bf16 = config.parallel.zero_stage, config.optimizer.bf16
    weights, gradients = (2.0, 4.0) if bf16 else (4.0, 4.0)
    # Two moments, and master weights where the weights themselves are not float32 or are kept by shards.
    state = 0.0 if config.parallel.cpu_offload else 12.0 if bf16 or stage else 8.0
    sharded = [
        size / data_size if stage >= least else size for size, least in ((weights, 3), (gradients, 2), (state, 1))
    ]
    return sum(sharded)


def _activations(config: Config, gpt: GPTConfig, topology: Topology) -> str:
    """What the stage that holds most keeps for its backward passes."""
    count = micro_batches_per_step(config, topology.world_size)
    alternating = config.data.phase == PROXY and alternates(config.doremi)
    tokens, element = config.data.micro_batch_size * config.data.seq_length, 2 if config.optimizer.bf16 else 4
    blocks = [b - a for a, b in pairwise(stage_bounds(gpt.num_layers, topology.pipe_size, 0, 0))]
    most, held = max(
        (held * micro_batch_bytes(gpt, config.parallel, tokens, element, blocks[stage], stage), held)
        for stage in range(topology.pipe_size)
        for held in [held_micro_batches(alternating, count, topology.pipe_size, stage, config.parallel.zero_stage)]
    )
    return f"{most / 2**30:.2f} GiB of activations of {held} micro-batches"


def describe_run(config: Config, gpt: GPTConfig, topology: Topology) -> str:
    """The resolved configuration and the sizes of the largest stage, as text."""
    counts = parameters_by_layer(gpt, topology.tensor_size)
    names = layer_names(gpt)
    first = names.index("layers.0")
    bounds = stage_bounds(gpt.num_layers, topology.pipe_size, first, len(names) - first - gpt.num_layers)
    stages = [sum(counts[a:b]) for a, b in pairwise(bounds)]
    if gpt.tied_embeddings and topology.pipe_size > 1:
        stages[-1] += counts[0]
    largest = max(stages)
    trains = config.data.phase in TRAINING
    state = state_bytes_per_parameter(config, topology.data_size) if trains else 2 if config.optimizer.bf16 else 4
    gib = largest * state / 2**30
    holds = (
        f"weights, gradients and optimizer state, and {_activations(config, gpt, topology)}" if trains else "weights"
    )
    total = sum(parameters_by_layer(gpt, 1))
    batch = global_batch_size(config, topology.world_size)
    lines = [
        json.dumps(config.to_dict(), indent=2),
        f"layout: tensor {topology.tensor_size} x pipeline {topology.pipe_size} x data {topology.data_size} "
        f"= {topology.world_size} ranks, ZeRO {config.parallel.zero_stage}",
        f"parameters: {total:,} (vocabulary {gpt.vocab_size:,} tokens), at most {largest:,} a rank",
        f"memory a rank: {gib:.2f} GiB of {holds} (docs/memory.md)",
        f"a step: {batch:,} windows = {batch * config.data.seq_length:,} tokens in "
        f"{micro_batches_per_step(config, topology.world_size)} micro-batches a rank",
        f"the run: {config.data.train_iters:,} steps = "
        f"{config.data.train_iters * batch * config.data.seq_length:,} tokens",
    ]
    return "\n".join(lines)
