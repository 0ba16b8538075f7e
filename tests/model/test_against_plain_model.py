"""Losses and the gradient of every parameter, at several layouts, against a plain model (plain_gpt.py).

Run alone: python -m pytest tests/model/test_against_plain_model.py
"""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from model.plain_gpt import token_losses as plain_token_losses
from ranks import on_ranks

from megatron_doremi.config import GPTConfig

pytestmark = pytest.mark.slow

GPT = GPTConfig(
    num_layers=2,
    hidden_size=24,
    ffn_hidden_size=40,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    normalization="RMSNorm",
    norm_epsilon=1e-5,
    swiglu=True,
    position_embedding_type="rope",
    rotary_base=10000.0,
    tied_embeddings=True,
    bias_linear=False,
    vocab_size=53,
    make_vocab_size_divisible_by=8,
    max_positions=12,
    init_method_std=0.2,
)
VARIANTS = {
    "rope, RMSNorm, SwiGLU, grouped queries, tied": GPT,
    "learned, LayerNorm, GELU, biases, untied": replace(
        GPT,
        num_query_groups=4,
        normalization="LayerNorm",
        swiglu=False,
        position_embedding_type="learned_absolute",
        tied_embeddings=False,
        bias_linear=True,
    ),
    "learned, LayerNorm, SwiGLU, biases, tied": replace(
        GPT, normalization="LayerNorm", position_embedding_type="learned_absolute", bias_linear=True
    ),
}


def example(gpt):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, gpt.vocab_size, (4, 13), generator=generator)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.tensor([0, 1, 1, 2])


def all_variants(launch, pipe, tensor, sequence_parallel, bf16):
    """The losses and gradients of each of VARIANTS, in the processes of one start."""
    from megatron_doremi.parallel.groups import make_groups
    from megatron_doremi.parallel.topology import Topology
    from megatron_doremi.training.distributed import join

    topology = Topology(pipe, launch.world_size // pipe // tensor, tensor, launch.rank)
    device, groups = join(launch), make_groups(topology)
    flags = {"sequence_parallel": sequence_parallel, "zero_stage": int(bf16)}
    return {name: losses_and_gradients(gpt, topology, groups, device, flags, bf16) for name, gpt in VARIANTS.items()}


def losses_and_gradients(gpt, topology, groups, device, flags, bf16):
    """Runs two micro-batches through the engine's schedule without its optimiser; gathers what came out."""
    import torch.distributed as dist

    from megatron_doremi.config import (
        Config,
        DataConfig,
        DoReMiConfig,
        ModelConfig,
        OptimizerConfig,
        ParallelConfig,
        RunConfig,
    )
    from megatron_doremi.data.loader import MicroBatch
    from megatron_doremi.doremi.losses import LOSS
    from megatron_doremi.parallel.parameters import spec_of, unshard
    from megatron_doremi.training.setup import make_engine

    config = Config(
        DataConfig(phase="main", seq_length=12, micro_batch_size=1, global_batch_size=4, seed=3),
        ModelConfig(),
        ParallelConfig(topology.tensor_size, topology.pipe_size, **flags),
        DoReMiConfig(),
        OptimizerConfig(clip_grad=0.0, bf16=bf16),
        RunConfig(),
    )
    engine = make_engine(config, gpt, np.full(3, 1 / 3), topology, groups, device)
    # The norms and biases leave their constant starts, so that a gradient through them can be wrong.
    with torch.no_grad():
        for name, parameter in engine.module.model_parameters():
            if spec_of(parameter).std == 0.0:
                from megatron_doremi.parallel.parameters import shard, start_values

                spec = spec_of(parameter)
                noisy = start_values(replace(spec, std=0.3), name, 3) + spec.constant
                parameter.copy_(shard(noisy, spec, topology.tensor_size, topology.tensor_rank))
    weights, gradients = {}, {}
    tokens, targets, domains = example(gpt)
    mine = [
        MicroBatch(tokens[i : i + 1], targets[i : i + 1], domains[i : i + 1], domains[i : i + 1])
        for i in range(topology.data_rank, 4, topology.data_size)
    ]

    def collect(values, read):
        for name, parameter in engine.module.model_parameters():
            values[name] = (read(parameter).clone(), spec_of(parameter))

    collect(weights, lambda p: p.detach())
    engine._take_model_step = lambda *a, **k: collect(gradients, lambda p: p._hp_grad.view(p.shape) if bf16 else p.grad)
    engine.train_step(mine)
    sums = engine.step_sums()
    everyone = [None] * topology.world_size
    dist.all_gather_object(everyone, (topology, weights, gradients))
    whole_weights, whole_gradients = {}, {}
    for index, whole in ((1, whole_weights), (2, whole_gradients)):
        for stage in range(topology.pipe_size):
            parts = [e[index] for e in everyone if e[0].pipe_rank == stage and e[0].data_rank == 0]
            for name, (_, spec) in parts[0].items():
                value = unshard([part[name][0] for part in parts], spec)
                if name in whole:
                    assert torch.equal(value, whole[name]), f"{name}: the tied copies differ"
                whole[name] = value
        for e in everyone:
            for name, (value, _) in e[index].items():
                twin = next(
                    o for o in everyone if o[0] == replace(e[0], rank=e[0].rank_at(e[0].pipe_rank, 0, e[0].tensor_rank))
                )
                assert torch.equal(value, twin[index][name][0]), f"{name}: replicas differ"
    return sums[LOSS].tolist(), whole_weights, whole_gradients


LAYOUTS = {
    # ranks, stages, tensor ranks, sequence parallel, bfloat16
    "single": (1, 1, 1, False, False),
    "PP2": (2, 2, 1, False, False),
    "TP2": (2, 1, 2, False, False),
    "TP2-SP": (2, 1, 2, True, False),
    "DP2": (2, 1, 1, False, False),
    "TP2-SP-PP2": (4, 2, 2, True, False),
    "single-bf16": (1, 1, 1, False, True),
    "PP2-bf16": (2, 2, 1, False, True),
    "TP2-SP-bf16": (2, 1, 2, True, True),
}


@functools.cache
def results(layout):
    world, *rest = LAYOUTS[layout]
    return on_ranks(world, all_variants, *rest)[0]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_every_gradient(layout, variant):
    gpt, bf16 = VARIANTS[variant], LAYOUTS[layout][-1]
    sums, weights, gradients = results(layout)[variant]
    exact = {name: value.double().requires_grad_() for name, value in weights.items()}
    tokens, targets, domains = example(gpt)
    losses = plain_token_losses(exact, gpt, tokens, targets)
    assert sums == pytest.approx([losses[domains == d].sum().item() for d in range(3)], rel=1e-2 if bf16 else 1e-5)
    losses.mean().backward()
    assert gradients.keys() == exact.keys()
    for name, value in exact.items():
        assert value.grad.abs().max() > 0, name
        scale = value.grad.abs().max().item()
        error = (gradients[name].double() - value.grad).abs().max().item()
        assert error < (5e-2 if bf16 else 2e-5) * scale, f"{name}: {error} of {scale}"
