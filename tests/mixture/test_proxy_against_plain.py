"""Three proxy steps against Algorithm 1 written out over a plain model and torch's AdamW.

Nothing of ours is in the oracle but the start values, by name: not the model, the objective, the update, the
accumulation over micro-batches or the clipping.

Run alone: python -m pytest tests/mixture/test_proxy_against_plain.py
"""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from engines import build_engine, gather_full, layout, make_config, read_parameters, small_gpt
from model.plain_gpt import token_losses as plain_token_losses
from ranks import on_ranks

pytestmark = pytest.mark.slow

STEPS, WINDOWS, SEQ, K = 3, 8, 12, 3
ETA, C, LR, EPS, CLIP = 0.8, 0.01, 1e-2, 1e-3, 0.5
# Uneven counts; domain 2 is absent from the second batch, whose weights must keep its last lambda.
DOMAINS = [[0, 1, 1, 2, 0, 1, 2, 2], [0, 1, 1, 0, 1, 1, 0, 1], [2, 0, 2, 2, 1, 2, 0, 2]]
SAMPLING = [0.25, 0.375, 0.375]
GPT = small_gpt(max_positions=SEQ)


def batches():
    """(tokens, targets, domains, reference losses) of each step."""
    generator = torch.Generator().manual_seed(8)
    for domains in DOMAINS:
        ids = torch.randint(0, GPT.vocab_size, (WINDOWS, SEQ + 1), generator=generator)
        # Around log 53 = 3.97, so that excess is positive for some tokens and not for others.
        reference = 3.0 + 2.0 * torch.rand(WINDOWS, SEQ, generator=generator)
        yield ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.tensor(domains), reference


def all_options(launch, pipe, tensor, parallel, options):
    """Three steps under each of {name: options}, in the processes of one start."""
    context = layout(launch, pipe, tensor, parallel.get("sequence_parallel", False))
    return {name: proxy_steps(each, context, parallel) for name, each in options.items()}


def proxy_steps(options, context, parallel):
    from megatron_doremi.data.loader import MicroBatch

    topology = context.topology
    data = {"phase": "proxy", "seq_length": SEQ, "micro_batch_size": 2, "global_batch_size": WINDOWS, "seed": 3}
    doremi = {"doremi_step_size": ETA, "doremi_smoothing": C, **options}
    adam = {"clip_grad": CLIP, "adam_eps": EPS, "weight_decay": 0.0, "adam_beta2": 0.99}
    config = make_config(topology, data, parallel, doremi, **adam)
    engine = build_engine(config, GPT, np.array(SAMPLING), context)
    start, trace = gather_full(topology, read_parameters(engine)), []
    for tokens, targets, domains, reference in batches():
        first = range(2 * topology.data_rank, WINDOWS, 2 * topology.data_size)
        mine = [MicroBatch(*(x[i : i + 2] for x in (tokens, targets, domains, domains, reference))) for i in first]
        counts = torch.bincount(domains, minlength=K).double() * SEQ
        engine.set_learning_rate(LR)
        engine.train_step(mine, counts)
        state = engine.objective.controller.state
        trace.append((state.weights.tolist(), state.excess.tolist(), engine.grad_norm()))
    return start, trace, gather_full(topology, read_parameters(engine))


def oracle(start, options):
    """Algorithm 1, in float64, one window at a time."""
    update, objective = options.get("doremi_update", "alternating"), options.get("doremi_objective", "excess")
    resample = options.get("doremi_weighting") == "resample"
    weights = {name: value.double().requires_grad_() for name, value in start.items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=LR, betas=(0.9, 0.99), eps=EPS, weight_decay=0.0)
    alpha, excess, trace = [1 / K] * K, [0.0] * K, []
    for tokens, targets, domains, reference in batches():
        losses = plain_token_losses(weights, GPT, tokens, targets)
        before = list(alpha)
        for d in range(K):
            if (domains == d).any():
                proxy_losses, reference_losses = losses[domains == d].detach(), reference[domains == d].double()
                scores = {
                    "excess": (proxy_losses - reference_losses).clamp(min=0),
                    "hardest": proxy_losses,
                    "easiest": -reference_losses,
                }[objective]
                excess[d] = scores.mean().item()
        raised = [a * math.exp(ETA * x) for a, x in zip(alpha, excess, strict=True)]
        alpha = [(1 - C) * r / sum(raised) + C / K for r in raised]
        used = before if update == "simultaneous" else alpha
        present = [d for d in range(K) if (domains == d).any()]
        if resample:
            objective_value = losses.mean()
        elif options.get("doremi_normalization") == "batch":
            w = [a / q for a, q in zip(used, SAMPLING, strict=True)]
            above = sum(w[d] * losses[domains == d].sum() for d in present)
            objective_value = above / sum(w[d] * losses[domains == d].numel() for d in present)
        else:
            objective_value = sum(used[d] * losses[domains == d].mean() for d in present)
        optimizer.zero_grad()
        objective_value.backward()
        norm = torch.sqrt(sum((w.grad**2).sum() for w in weights.values()))
        for w in weights.values():
            w.grad *= min(1.0, CLIP / (norm.item() + 1e-6))
        optimizer.step()
        trace.append((list(alpha), list(excess), norm.item()))
    return trace, weights


OPTIONS = {
    "alternating": {},
    "simultaneous": {"doremi_update": "simultaneous"},
    "resample": {"doremi_weighting": "resample"},
    "hardest": {"doremi_objective": "hardest"},
    "easiest": {"doremi_objective": "easiest"},
    "the authors' normalization": {"doremi_normalization": "batch"},
}
LAYOUTS = {
    "single": (1, 1, 1, {}),
    "PP2": (2, 2, 1, {}),
    "TP2 full recompute": (2, 1, 2, {"recompute_granularity": "full", "sequence_parallel": True}),
    "DP2 ZeRO1 loss in chunks": (2, 1, 1, {"zero_stage": 1, "loss_chunk_tokens": 5}),
    "PP2 selective recompute, chunks": (2, 2, 1, {"recompute_granularity": "selective", "loss_chunk_tokens": 7}),
    "DP2 ZeRO2 offloaded": (2, 1, 1, {"zero_stage": 2, "cpu_offload": True}),
    "DP2 ZeRO3 selective recompute, chunks": (
        2,
        1,
        1,
        {"zero_stage": 3, "recompute_granularity": "selective", "loss_chunk_tokens": 5},
    ),
    "TP2 x DP2 ZeRO2 full recompute": (
        4,
        1,
        2,
        {"zero_stage": 2, "recompute_granularity": "full", "sequence_parallel": True},
    ),
    "TP2 x DP2 ZeRO3 full recompute": (
        4,
        1,
        2,
        {"zero_stage": 3, "recompute_granularity": "full", "sequence_parallel": True},
    ),
}
# Their scores are token losses that every layout computes for the other options as well: once for each kind of engine.
SCORES_ALONE = ("hardest", "easiest")
EVERY_OPTION = ("single", "PP2", "TP2 full recompute", "DP2 ZeRO2 offloaded")
CASES = [
    (layout, option) for layout in LAYOUTS for option in OPTIONS if layout in EVERY_OPTION or option not in SCORES_ALONE
]


@functools.cache
def results(layout):
    """Start values, trace and final weights of each option at a layout."""
    world, *rest = LAYOUTS[layout]
    return on_ranks(world, all_options, *rest, {name: OPTIONS[name] for place, name in CASES if place == layout})[0]


def assert_as_algorithm_1(result, options):
    """Compares start values, trace and final weights with the oracle's."""
    start, trace, end = result
    expected, weights = oracle(start, options)
    for (alpha, excess, norm), (alpha_, excess_, norm_) in zip(trace, expected, strict=True):
        assert alpha == pytest.approx(alpha_, abs=1e-6)
        assert excess == pytest.approx(excess_, rel=1e-5, abs=1e-6)
        assert norm == pytest.approx(norm_, rel=1e-5)
    for name, value in weights.items():
        assert (end[name].double() - value.detach()).abs().max() < 2e-6, name
        assert (end[name] - start[name]).abs().max() > 1e-4, name


@pytest.mark.parametrize(("layout", "option"), CASES)
def test_three_steps(layout, option):
    assert_as_algorithm_1(results(layout)[option], OPTIONS[option])


def holding_forwards(launch, zero_stage):
    """Three steps of an engine that keeps all forward passes of a batch, at any ZeRO stage."""
    from megatron_doremi.engine.engines import OneStageEngine

    OneStageEngine._holds_forwards = lambda self: True
    return proxy_steps({}, layout(launch, 1, 1), {"zero_stage": zero_stage})


def test_the_wrong_gradient_of_several_outstanding_forwards_is_seen():
    """Keeping all forward passes gives right results under ZeRO 2 and wrong ones under ZeRO 3."""
    right, wrong = (on_ranks(2, holding_forwards, stage)[0] for stage in (2, 3))
    assert_as_algorithm_1(right, {})
    with pytest.raises(AssertionError):
        assert_as_algorithm_1(wrong, {})
    # Nothing else gives it away: the first step's weights and losses are right, the norm is a number like any.
    (alpha, excess, norm), (alpha_, excess_, norm_) = right[1][0], wrong[1][0]
    assert (alpha, excess) == (pytest.approx(alpha_), pytest.approx(excess_))
    assert 0.1 < norm_ / norm < 10
    assert norm_ != pytest.approx(norm, rel=0.01)
