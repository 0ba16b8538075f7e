"""Gradients are summed in float32 at any model precision, and a gradient with NaN or Inf is never applied.

Run alone: python -m pytest tests/engine/test_gradients.py
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engines import build_engine, gather_full, layout, make_config, read_gradient, read_parameters, small_gpt
from ranks import on_ranks

from megatron_doremi.data.loader import MicroBatch

pytestmark = pytest.mark.slow

GPT = small_gpt(tied_embeddings=False)
SEQ, MICRO_BATCHES = 32, 6


def build(launch, zero_stage, bf16, pipe=1, chunk=1024):
    """An engine, and this rank's micro-batches of one window each."""

    context = layout(launch, pipe, 1)
    topology = context.topology
    batch = MICRO_BATCHES * topology.data_size
    data = {"phase": "main", "seq_length": SEQ, "micro_batch_size": 1, "global_batch_size": batch, "seed": 3}
    parallel = {"zero_stage": zero_stage, "loss_chunk_tokens": chunk}
    config = make_config(topology, data, parallel, clip_grad=1.0, bf16=bf16, lr=1e-2)
    engine = build_engine(config, GPT, np.full(3, 1 / 3), context)
    ids = torch.randint(0, GPT.vocab_size, (batch, SEQ + 1), generator=torch.Generator().manual_seed(5))
    domains = torch.arange(batch) % 3
    mine = [
        MicroBatch(ids[i : i + 1, :-1].contiguous(), ids[i : i + 1, 1:].contiguous(), domains[i : i + 1], domains[:1])
        for i in range(topology.data_rank, batch, topology.data_size)
    ]
    return topology, engine, mine


def sums_and_parts(launch, zero_stage):
    """The gradient passed to the optimizer, and the float64 sum of all micro-batches' and ranks' bfloat16 gradients."""
    from megatron_doremi.parallel.exchange import gather_json

    topology, engine, mine = build(launch, zero_stage, bf16=True)
    parts_by_name: dict[str, list[torch.Tensor]] = {name: [] for name, _ in engine.module.model_parameters()}
    hooks = [
        parameter.register_hook(lambda grad, parts=parts_by_name[name]: parts.append(grad.detach().clone()))
        for name, parameter in engine.module.model_parameters()
    ]

    reduced = {}
    engine._take_model_step = lambda *a, **k: reduced.update(read_parameters(engine, read_gradient(engine)))
    engine.train_step(mine)
    assert len(hooks) == len(parts_by_name)
    expected = {}
    for name, parts in parts_by_name.items():
        assert {grad.dtype for grad in parts} == {torch.bfloat16}
        assert len(parts) == MICRO_BATCHES
        local_sum = sum(grad.double() for grad in parts)
        expected[name] = (
            torch.tensor(gather_json(local_sum.tolist()), dtype=torch.float64).sum(dim=0) / topology.data_size
        )
    return gather_full(topology, reduced), expected


@pytest.mark.parametrize(("world", "zero_stage"), [(1, 1), (2, 1), (1, 2), (2, 2), (1, 3), (2, 3)])
def test_bfloat16_gradients_are_summed_in_float32(world, zero_stage):
    """The optimizer's gradient is the float64 sum over micro-batches and replicas, rounded to float32."""
    sums, exact = on_ranks(world, sums_and_parts, zero_stage)[0]
    assert sums.keys() == exact.keys()
    for name, value in exact.items():
        assert sums[name].dtype == torch.float32
        value = value[: sums[name].shape[0]]  # without padding rows
        error = (sums[name].double() - value).abs().max().item() / value.abs().max().item()
        # A sum of at most 12 float32 numbers; rounded to bfloat16 once, it was 2e-3 away.
        assert error < 1e-6, f"{name}: {error:.1e}"


def test_the_gradient_of_a_chunked_head_is_summed_in_float32():
    """64 chunks: summed in bfloat16, the output layer's gradient loses digits with every chunk."""
    from megatron_doremi.execution import Execution
    from megatron_doremi.parallel.cross_entropy import token_losses
    from megatron_doremi.parallel.groups import TensorGroup

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 1024, 16, generator=generator).bfloat16()
    weight = (0.3 * torch.randn(48, 16, generator=generator)).bfloat16()
    targets = torch.randint(0, 41, (1, 1024), generator=generator)

    def weight_gradient(chunk, weight):
        weight = weight.clone().requires_grad_()
        execution = Execution(loss_chunk_tokens=chunk)
        token_losses(hidden.to(weight.dtype), weight, targets, 41, TensorGroup(None, 1, 0), execution).sum().backward()
        return weight.grad

    # A chunk's gradient of the logits is rounded to bfloat16 either way.
    with torch.no_grad():
        logits = (hidden[0] @ weight.T).float()
        logits[:, 41:] = -torch.inf
        rows = (logits.softmax(-1) - torch.nn.functional.one_hot(targets[0], 48)).bfloat16().double()
    exact = rows.T @ hidden[0].double()
    once = (weight_gradient(16, weight).double() - exact).abs()
    assert (once <= exact.abs() * 2.0**-8 + 1e-6).all()
    # In float32 chunks change nothing but the order of a sum.
    full = weight_gradient(0, weight.float())
    torch.testing.assert_close(weight_gradient(16, weight.float()), full, rtol=1e-5, atol=1e-5)


ENGINES = {
    # ranks, stages, ZeRO, bfloat16
    "ZeRO 0": (1, 1, 0, False),
    "DP2, ZeRO 0": (2, 1, 0, False),
    "PP2, ZeRO 0": (2, 2, 0, False),
    "DP2, ZeRO 1": (2, 1, 1, False),
    "DP2, ZeRO 2": (2, 1, 2, False),
    "DP2, ZeRO 3": (2, 1, 3, False),
    "PP2, DP2, ZeRO 1": (4, 2, 1, False),
    "DP3, ZeRO 2": (3, 1, 2, False),
    "PP2, bf16": (2, 2, 1, True),
    "DP2, bf16, ZeRO 2": (2, 1, 2, True),
    "DP2, bf16, ZeRO 3": (2, 1, 3, True),
}


def infinite_gradient(launch, pipe, zero_stage, bf16):
    """Two steps; in the second the gradient of one vector is infinite in one micro-batch of the last rank."""
    from megatron_doremi.cluster.step_flags import reduce_flags

    topology, engine, mine = build(launch, zero_stage, bf16, pipe)
    overflow_flags = []

    def before_step(norm):
        flags = reduce_flags(engine.objective.current.stats.stack(), norm, 0, False, False)
        assert not flags.loss_non_finite
        overflow_flags.append(flags.gradient_non_finite)
        if flags.gradient_non_finite:
            raise ArithmeticError
        return flags.norm

    engine.train_step(mine, before_step=before_step)
    assert engine.was_step_applied()
    assert np.isfinite(engine.grad_norm())
    before = gather_full(topology, read_parameters(engine))
    if launch.rank == launch.world_size - 1:
        name, parameter = next((n, p) for n, p in engine.module.model_parameters() if n == "layers.1.mlp_norm.weight")
        calls = []
        parameter.register_hook(lambda grad: calls.append(name) or (grad * torch.inf if len(calls) == 3 else grad))
    try:
        engine.train_step(mine, before_step=before_step)
        skipped = not engine.was_step_applied()
    except ArithmeticError:
        skipped = True
    after = gather_full(topology, read_parameters(engine))
    return overflow_flags, skipped, all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_infinite_gradient_moves_no_parameter(engine):
    world, *settings = ENGINES[engine]
    for overflow_flags, skipped, unchanged in on_ranks(world, infinite_gradient, *settings):
        # The flags know the norm before the step, except with ZeRO 3, whose optimizer skips the step.
        assert overflow_flags == [False, not engine.endswith("ZeRO 3")]
        assert skipped
        assert unchanged
