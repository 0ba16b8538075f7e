"""--compile: the compiled model learns what the other one learns, in few graphs, none of them late.

Run alone: python -m pytest tests/model/test_compiled.py
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engines import build_engine, layout, make_config, small_gpt
from ranks import on_ranks

pytestmark = pytest.mark.slow

GPT = small_gpt(num_layers=3, max_positions=12)
SEQ, WINDOWS, COUNT, STEPS = 12, 2, 3, 4


def run(launch, compiled):
    """Trains a proxy, scores with a frozen model; returns losses by step and the graphs after each step."""
    from torch._dynamo.utils import counters

    from megatron_doremi.data.loader import MicroBatch
    from megatron_doremi.execution import Execution
    from megatron_doremi.model.forward import forward_only
    from megatron_doremi.model.unpipelined import GPTModel

    context = layout(launch, 1, 1)
    data = {"phase": "proxy", "seq_length": SEQ, "micro_batch_size": WINDOWS, "global_batch_size": WINDOWS * COUNT}
    # Chunks of 10, 10 and 4 tokens.
    parallel = {"compile": compiled, "loss_chunk_tokens": 10}
    engine = build_engine(make_config(context.topology, data, parallel), GPT, np.full(2, 0.5), context)
    execution = Execution(loss_chunk_tokens=10, compiled=compiled)
    frozen = GPTModel(GPT, context, 5, execution).requires_grad_(False)
    generator = torch.Generator().manual_seed(2)
    losses, graphs = [], []
    for _ in range(STEPS):
        ids = torch.randint(0, GPT.vocab_size, (COUNT, WINDOWS, SEQ + 1), generator=generator)
        batches = [
            MicroBatch(each[:, :-1].contiguous(), each[:, 1:].contiguous(), torch.tensor([0, 1]), torch.tensor([0, 1]))
            for each in ids
        ]
        reference = forward_only(frozen, batches, COUNT, (WINDOWS, SEQ), context)
        scored = [
            MicroBatch(b.tokens, b.targets, b.domains, b.windows, r) for b, r in zip(batches, reference, strict=True)
        ]
        engine.train_step(scored, torch.tensor([36.0, 36.0], dtype=torch.float64))
        losses.append((engine.objective.stats().loss.tolist(), engine.grad_norm()))
        graphs.append(counters["stats"]["unique_graphs"])
    return losses, graphs, sum(counters["graph_break"].values())


def test_a_compiled_proxy_learns_the_same_in_few_graphs():
    losses, none, _ = on_ranks(1, run, False)[0]
    compiled, graphs, breaks = on_ranks(1, run, True)[0]
    for (loss, norm), (found, found_norm) in zip(losses, compiled, strict=True):
        assert found == pytest.approx(loss, rel=1e-5)
        assert found_norm == pytest.approx(norm, rel=1e-4)
    assert none == [0] * STEPS
    # A block, the final norm, and losses and softmax of two lengths, while training; a block, the norm and the losses
    # of the frozen model, whose block and norm have no gradient.
    assert graphs == [8] * STEPS
    assert breaks == 0
