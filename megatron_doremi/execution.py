"""How a model computes: what changes time and memory and leaves the losses the same, and what only training does."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Execution:
    """How a model computes.

    Attributes:
        recompute: what the backward pass recomputes of a block: none, selective (attention between its projections),
            or full.
        loss_chunk_tokens: hold the logits of at most this many tokens at a time, and recompute them in the backward
            pass; 0: compute the logits of all tokens once and hold them for the backward pass.
        compiled: compile each block, and the losses of rows of logits, by torch.compile.
        normalizers: in training, return the normalizers of the softmax beside the losses (--z-loss).
        attention_dropout, hidden_dropout: rates in training; see `Dropout` in model/dropout.py.
    """

    recompute: str = "none"
    loss_chunk_tokens: int = 0
    compiled: bool = False
    normalizers: bool = False
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0


DEFAULT = Execution()
