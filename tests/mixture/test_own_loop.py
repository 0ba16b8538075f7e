"""examples/own_loop.py: Group DRO by the exported names in a loop of plain PyTorch.

Run alone: python -m pytest tests/mixture/test_own_loop.py
"""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

OWN_LOOP = Path(__file__).resolve().parents[2] / "examples" / "own_loop.py"


def test_it_learns_the_weights_of_algorithm_1():
    loop = runpy.run_path(str(OWN_LOOP))
    streams = [torch.tensor(list(text.encode())) for text in loop["texts"]().values()]
    reference, _ = loop["train"](streams, steps=3)
    _, state = loop["train"](streams, steps=3, reference=reference)

    # The same three steps, with Algorithm 1 written out (eta = 1, c = 1e-3).
    torch.manual_seed(0)
    model, generator = loop["ByteModel"](), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    alpha, total = torch.full((3,), 1 / 3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for _ in range(3):
        ids, domains = loop["batch"](streams, generator)
        losses = loop["token_losses"](model, ids)
        excess = (losses.detach().double() - loop["token_losses"](reference, ids).detach().double()).clamp(min=0)
        raised = alpha * torch.exp(torch.stack([excess[domains == i].mean() for i in range(3)]))
        alpha = 0.999 * raised / raised.sum() + 0.001 / 3
        total += alpha
        optimizer.zero_grad()
        sum(alpha[i] * losses[domains == i].mean() for i in range(3)).backward()
        optimizer.step()
    assert state.mean().tolist() == pytest.approx((total / 3).tolist(), rel=1e-6)
    assert len(OWN_LOOP.read_text().splitlines()) <= 80
