"""Losses and the gradient of every parameter, at several layouts, against a plain model (plain_gpt.py).

Run alone: python -m pytest tests/model/test_against_plain_model.py
"""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from engines import build_engine, gather_full, layout, make_config, read_gradient, read_parameters, small_gpt
from model.plain_gpt import token_losses as plain_token_losses
from model.plain_gpt import z_loss
from ranks import on_ranks

pytestmark = pytest.mark.slow

GPT = small_gpt(max_positions=12)
VARIANTS = {
    "rope, RMSNorm, SwiGLU, grouped queries, tied": GPT,
    "learned, LayerNorm, GELU (tanh), biases, untied": replace(
        GPT,
        num_query_groups=4,
        normalization="LayerNorm",
        swiglu=False,
        position_embedding_type="learned_absolute",
        tied_embeddings=False,
        bias_linear=True,
        openai_gelu=True,
    ),
    "rope, LayerNorm, SwiGLU, biases, tied, normalized queries": replace(
        GPT, normalization="LayerNorm", bias_linear=True, qk_layernorm=True
    ),
    "rope, positions and attention by document": replace(
        GPT, reset_position_ids=True, reset_attention_mask=True, eod=7
    ),
    "learned, attention by document": replace(
        GPT, position_embedding_type="learned_absolute", reset_attention_mask=True, qk_layernorm=True, eod=7
    ),
    "rope, grouped queries, dropout": GPT,
    "learned, attention by document, dropout of attention": replace(
        GPT, position_embedding_type="learned_absolute", reset_attention_mask=True, num_query_groups=4, eod=7
    ),
}
# Settings of the step by variant; other variants have none.
TRAINING = {"learned, LayerNorm, GELU (tanh), biases, untied": {"z_loss": 0.05}}
TRAINING["rope, LayerNorm, SwiGLU, biases, tied, normalized queries"] = {"z_loss": 0.5}
TRAINING["rope, grouped queries, dropout"] = {"attention_dropout": 0.3, "hidden_dropout": 0.2}
TRAINING["learned, attention by document, dropout of attention"] = {"attention_dropout": 0.5}
# Of the windows of `example`.
KEYS = torch.tensor([3, 2**32 - 1, 77, 123456789])


def example(gpt):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, gpt.vocab_size, (4, 13), generator=generator)
    if gpt.reads_documents:
        # Within a window, at its start, twice in a row, at its last input.
        ids[0, 4] = ids[1, 0] = ids[2, 3] = ids[2, 4] = ids[2, 9] = ids[3, 11] = gpt.eod
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.tensor([0, 1, 1, 2])


def all_variants(launch, pipe, tensor, flags, bf16, windows):
    """The losses and gradients of each of VARIANTS, in the processes of one start."""
    context = layout(launch, pipe, tensor, flags.get("sequence_parallel", False))
    # Traced as for the real compiler, which would take minutes for all of these; it is in test_compiled.py.
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    return {
        name: losses_and_gradients(at_layout(gpt, tensor), context, flags, bf16, TRAINING.get(name), windows)
        for name, gpt in VARIANTS.items()
    }


def at_layout(gpt, tensor):
    """The shape with as many groups of queries as four tensor ranks need."""
    return replace(gpt, num_query_groups=4) if tensor == 4 else gpt


def losses_and_gradients(gpt, context, flags, bf16, training, windows):
    """Runs a global batch through the engine without its optimizer; gathers losses, weights and gradients."""
    import deepspeed

    from megatron_doremi.data.loader import MicroBatch
    from megatron_doremi.parallel.parameters import initial_values, shard, spec_of

    topology = context.topology
    data = {"phase": "main", "seq_length": 12, "micro_batch_size": windows, "global_batch_size": 4, "seed": 3}
    config = make_config(topology, data, flags, training=training, clip_grad=0.0, bf16=bf16)
    engine = build_engine(config, gpt, np.full(3, 1 / 3), context)
    # The norms and biases leave their constant starts, so that a gradient through them can be wrong.
    with torch.no_grad():
        for name, parameter in engine.module.model_parameters():
            spec = spec_of(parameter)
            if spec.std == 0.0:
                noisy = initial_values(replace(spec, std=0.3), name, 3) + spec.constant
                with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                    parameter.copy_(shard(noisy, spec, topology.tensor_size, topology.tensor_rank))
    tokens, targets, domains = example(gpt)
    drops = any("dropout" in name for name in training or {})
    mine = []
    for i in range(topology.data_rank, 4 // windows, topology.data_size):
        these = slice(i * windows, (i + 1) * windows)
        keys = KEYS[these] if drops else None
        mine.append(MicroBatch(tokens[these], targets[these], domains[these], domains[these], keys=keys))

    weights, gradients = read_parameters(engine), {}
    engine._take_model_step = lambda *a, **k: gradients.update(read_parameters(engine, read_gradient(engine)))
    engine.train_step(mine)
    return engine.objective.stats().loss.tolist(), gather_full(topology, weights), gather_full(topology, gradients)


SP = {"sequence_parallel": True}
LAYOUTS = {
    # ranks, stages, tensor ranks, flags, bfloat16
    "single": (1, 1, 1, {}, False),
    "PP2": (2, 2, 1, {}, False),
    "TP2": (2, 1, 2, {}, False),
    "TP2-SP": (2, 1, 2, SP, False),
    "DP2": (2, 1, 1, {}, False),
    "TP2-SP-PP2": (4, 2, 2, SP, False),
    "TP4": (4, 1, 4, {}, False),
    "TP4-SP-recomputed": (4, 1, 4, {"recompute_granularity": "full", **SP}, False),
    "DP2-ZeRO2": (2, 1, 1, {"zero_stage": 2}, False),
    "DP2-ZeRO3": (2, 1, 1, {"zero_stage": 3}, False),
    "TP2-SP-DP2-ZeRO2": (4, 1, 2, {"zero_stage": 2, **SP}, False),
    "TP2-SP-DP2-ZeRO3": (4, 1, 2, {"zero_stage": 3, **SP}, False),
    "single-bf16": (1, 1, 1, {"zero_stage": 1}, True),
    "PP2-bf16": (2, 2, 1, {"zero_stage": 1}, True),
    "TP2-SP-bf16": (2, 1, 2, {"zero_stage": 1, **SP}, True),
    "DP2-ZeRO2-bf16": (2, 1, 1, {"zero_stage": 2}, True),
    "DP2-ZeRO3-bf16": (2, 1, 1, {"zero_stage": 3}, True),
    "single-compiled": (1, 1, 1, {"compile": True}, False),
    "TP2-compiled": (2, 1, 2, {"compile": True}, False),
    "TP2-SP-compiled": (2, 1, 2, {"compile": True, "recompute_granularity": "selective", **SP}, False),
    "TP2-SP-compiled-recomputed": (2, 1, 2, {"compile": True, "recompute_granularity": "full", **SP}, False),
    "PP2-compiled": (2, 2, 1, {"compile": True, "recompute_granularity": "full"}, False),
    "DP2-ZeRO2-bf16-compiled": (2, 1, 1, {"compile": True, "zero_stage": 2}, True),
}
# Layouts with micro-batches of two windows; the others have one.
OF_TWO = ("TP2-SP", "TP2-SP-bf16", "TP4-SP-recomputed", "TP2-SP-DP2-ZeRO3", "TP2-SP-compiled")


@functools.cache
def results(layout):
    world, *rest = LAYOUTS[layout]
    return on_ranks(world, all_variants, *rest, 2 if layout in OF_TWO else 1)[0]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_every_gradient(layout, variant):
    gpt, bf16 = at_layout(VARIANTS[variant], LAYOUTS[layout][2]), LAYOUTS[layout][-1]
    sums, weights, gradients = results(layout)[variant]
    exact = {name: value.double().requires_grad_() for name, value in weights.items()}
    tokens, targets, domains = example(gpt)
    training = TRAINING.get(variant, {})
    rates = training.get("attention_dropout", 0.0), training.get("hidden_dropout", 0.0)
    losses = plain_token_losses(exact, gpt, tokens, targets, rates, KEYS)
    assert sums == pytest.approx([losses[domains == d].sum().item() for d in range(3)], rel=1e-2 if bf16 else 1e-5)
    if "z_loss" in training:
        (losses.mean() + training["z_loss"] * z_loss(exact, gpt, tokens)).backward()
    else:
        losses.mean().backward()
    assert gradients.keys() == exact.keys()
    for name, value in exact.items():
        assert value.grad.abs().max() > 0, name
        scale = value.grad.abs().max().item()
        error = (gradients[name].double() - value.grad).abs().max().item()
        assert error < (5e-2 if bf16 else 2e-5) * scale, f"{name}: {error} of {scale}"
