"""ZeRO 2: gradients are reduce-scattered beside every backward pass, and are those of DeepSpeed's own ZeRO 2.

Run alone: python -m pytest tests/parallel/test_sharded_optimizer.py
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from engines import build_engine, gather_full, layout, make_config, read_gradient, read_parameters, small_gpt
from ranks import on_ranks

MICRO_BATCHES = 3


def test_pieces_of_a_bucket():
    """Of 5, 1 and 6 numbers in a row and 2 replicas, the first replica owns 6 numbers, the second the rest."""
    from megatron_doremi.parallel.groups import TensorGroup
    from megatron_doremi.parallel.sharded_optimizer import ShardedOptimizer

    expected = [[(0, 0, 5, 0), (1, 0, 1, 5)], [(2, 0, 6, 0)]]
    for rank, pieces in enumerate(expected):
        parameters = [torch.nn.Parameter(torch.arange(float(size)) + 10 * size) for size in (5, 1, 6)]
        values = [parameter.detach().clone() for parameter in parameters]
        optimizer = ShardedOptimizer(torch.optim.AdamW(parameters), TensorGroup(None, 2, rank))
        found = [(i, optimizer.piece_of(each)) for i, each in enumerate(parameters)]
        assert [(i, p.start, p.count, p.offset) for i, p in found if p is not None] == pieces
        assert all(map(torch.equal, parameters, values))
        master = optimizer.masters()[0]
        for i, piece in found:
            if piece is not None:
                assert torch.equal(piece.of(master), values[i][piece.start : piece.start + piece.count])


def two_steps(launch, tensor, bf16, by_deepspeed):
    """The gradient of the second step, which is not clipped, the parameters after it, its order and its traffic."""
    from megatron_doremi.data.loader import MicroBatch
    from megatron_doremi.engine import optimizer
    from megatron_doremi.parallel import sharded_optimizer
    from megatron_doremi.parallel.deepspeed_internals import DeepSpeedEngine, EngineHooks

    context = layout(launch, 1, tensor)
    topology = context.topology
    if by_deepspeed:
        EngineHooks._configure_zero_optimizer = DeepSpeedEngine._configure_zero_optimizer
    else:
        optimizer.loose_buckets = partial(optimizer.loose_buckets, elements=1500)
    windows = MICRO_BATCHES * topology.data_size
    data = {"phase": "main", "seq_length": 16, "micro_batch_size": 1, "global_batch_size": windows, "seed": 3}
    config = make_config(topology, data, {"zero_stage": 2}, clip_grad=0.0, bf16=bf16, lr=1e-2)
    engine = build_engine(config, small_gpt(), np.full(3, 1 / 3), context)
    ids = torch.randint(0, 53, (windows, 17), generator=torch.Generator().manual_seed(5))
    batches = [
        MicroBatch(ids[i : i + 1, :-1], ids[i : i + 1, 1:], torch.tensor([i % 3]), torch.tensor([i]))
        for i in range(topology.data_rank, windows, topology.data_size)
    ]
    engine.train_step(batches)
    log, gradients = [], {}

    def start_scatter_sum(*arguments, real=sharded_optimizer.start_scatter_sum):
        log.append("reduce")
        return real(*arguments)

    for _, parameter in engine.module.model_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: log.append("gradient"))
    sharded_optimizer.start_scatter_sum = start_scatter_sum
    read = read_gradient(engine)
    engine.train_step(batches, before_step=lambda norm: gradients.update(read_parameters(engine, read)))
    norm = engine.grad_norm()
    return gather_full(topology, gradients), gather_full(topology, read_parameters(engine)), norm, log


@pytest.mark.slow
@pytest.mark.parametrize(("world", "tensor", "bf16"), [(2, 1, False), (2, 1, True), (4, 2, False)])
def test_two_steps_are_those_of_deepspeed(world, tensor, bf16):
    """Gradients bit for bit: of two replicas a sum has but one order. Parameters to rounding: vector instructions of
    AdamW begin at another number."""
    ours, theirs = (on_ranks(world, two_steps, tensor, bf16, by_deepspeed) for by_deepspeed in (False, True))
    for (gradients, parameters, norm, log), (expected, expected_parameters, expected_norm, _) in zip(
        ours, theirs, strict=True
    ):
        assert all(torch.equal(gradients[name], expected[name]) for name in expected)
        for name, value in expected_parameters.items():
            torch.testing.assert_close(parameters[name], value, rtol=2e-7 if not bf16 else 0, atol=1e-8)
        assert norm == pytest.approx(expected_norm, rel=1e-6)
        count = log.count("gradient") // MICRO_BATCHES
        buckets = log.count("reduce") // MICRO_BATCHES
        assert buckets >= 4
        for number in range(MICRO_BATCHES):
            one = log[number * (count + buckets) :][: count + buckets]
            assert (one.count("gradient"), one.count("reduce")) == (count, buckets)
            # Beside the pass, and not after it.
            last = max(i for i, event in enumerate(one) if event == "gradient")
            assert one[:last].count("reduce") >= buckets - 2
            assert one[: one.index("reduce")].count("gradient") < count / 2
