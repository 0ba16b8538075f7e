"""Positions and attention that reset at the ends of documents.

Run alone: python -m pytest tests/model/test_document_masks.py
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from engines import small_gpt
from model.plain_gpt import token_losses as plain_token_losses

from megatron_doremi.execution import Execution
from megatron_doremi.model.positions import document_mask, document_starts
from megatron_doremi.model.unpipelined import GPTModel
from megatron_doremi.parallel.context import unsharded

EOD = 7
GPT = small_gpt(max_positions=12, eod=EOD)
BOTH = {"reset_position_ids": True, "reset_attention_mask": True}


def windows():
    ids = torch.randint(8, GPT.vocab_size, (3, 13), generator=torch.Generator().manual_seed(1))
    ids[0, 4] = ids[2, 0] = ids[2, 5] = ids[2, 6] = ids[2, 11] = EOD
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def model(execution=None, **changes):
    made = GPTModel(replace(GPT, **changes), unsharded(torch.device("cpu")), 3, execution or Execution())
    return made.requires_grad_(execution is not None)


def test_where_documents_start_and_what_they_see():
    tokens = torch.tensor([[1, EOD, 2, 3], [EOD, EOD, 4, EOD]])
    starts = document_starts(tokens, EOD)
    assert starts.tolist() == [[0, 0, 2, 2], [0, 1, 2, 2]]
    seen = (document_mask(starts, torch.float32) == 0)[:, 0].int().tolist()
    assert seen[0] == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert seen[1] == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


@pytest.mark.parametrize("kind", ["rope", "learned_absolute"])
def test_a_window_of_documents_has_the_losses_of_each_alone(kind):
    gpt = model(position_embedding_type=kind, **BOTH)
    plain = model(position_embedding_type=kind)
    tokens, targets = windows()
    losses = gpt(tokens, targets)
    for window, bounds in enumerate([(0, 5, 12), (0, 12), (0, 1, 6, 7, 12)]):
        for start, stop in pairwise(bounds):
            alone = plain(tokens[window : window + 1, start:stop], targets[window : window + 1, start:stop])
            assert torch.allclose(losses[window, start:stop], alone[0], rtol=0, atol=2e-6)
    # Only the window without an end has the losses of a model without resets.
    assert [torch.equal(*pair) for pair in zip(losses, plain(tokens, targets), strict=True)] != [True] * 3
    assert torch.allclose(losses[1], plain(tokens, targets)[1], atol=2e-6)


@pytest.mark.parametrize("kind", ["rope", "learned_absolute"])
@pytest.mark.parametrize("flag", BOTH)
def test_each_flag_alone(flag, kind):
    """With rope, positions that reset change what attends across documents: distances become negative there."""
    gpt = replace(GPT, position_embedding_type=kind, **{flag: True})
    made = model(position_embedding_type=kind, **{flag: True})
    tokens, targets = windows()
    exact = {name: parameter.double() for name, parameter in made.model_parameters()}
    exact["embedding.weight"] = exact["embedding.weight"][: GPT.vocab_size]
    assert torch.allclose(made(tokens, targets).double(), plain_token_losses(exact, gpt, tokens, targets), atol=1e-5)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_sees_the_same_documents(recompute):
    tokens, targets = windows()
    gradients = []
    for execution in (Execution(), Execution(recompute)):
        made = model(execution, **BOTH)
        made(tokens, targets).mean().backward()
        gradients.append([parameter.grad for _, parameter in made.model_parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
