"""Positions of tokens, what they attend to, and rotary position embeddings (Su et al. 2021, section 3.2)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_doremi.config import GPTConfig


class RotaryTable(NamedTuple):
    """Cosines and sines of the rotary angles, float32.

    Attributes:
        cos, sin: [seq, 1, 1, width / 2]; or [batch, seq, 1, 1, width / 2] where each window has its own positions.
            Both broadcast over [batch, seq, groups, heads of a group, width / 2].
    """

    cos: Tensor
    sin: Tensor


def rotary_table(positions: Tensor, width: int, base: float) -> RotaryTable:
    """The table of these positions: the angle of channel pair i at position p is p * base ** (-2 i / width).

    Args:
        positions: [seq] or [batch, seq], integers. Angles are computed in float32, which is exact for positions below
            2 ** 24.
        width: channels of a head, even.
    """
    frequencies = base ** (-torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width)
    angles = positions.to(torch.float32)[..., None, None, None] * frequencies
    return RotaryTable(angles.cos(), angles.sin())


def document_starts(tokens: Tensor, eod: int) -> Tensor:
    """For each token the place in its window at which its document starts; 0 for the window's first document.

    A document ends with `eod`, so that the next one starts after it, as in Megatron-LM's masks.

    Args:
        tokens: [batch, seq] ids.

    Returns:
        [batch, seq] int64.
    """
    follows = F.pad(tokens[:, :-1] == eod, (1, 0))
    places = torch.arange(tokens.shape[1], device=tokens.device)
    return (places * follows).cummax(dim=1).values


def document_mask(starts: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to attention scores: 0 within a document and not after the token, elsewhere -inf.

    Args:
        starts: [batch, seq], of `document_starts`.

    Returns:
        [batch, 1, seq, seq], for query and key.
    """
    places = torch.arange(starts.shape[1], device=starts.device)
    visible = (places <= places[:, None]) & (places >= starts[:, None, :, None])
    mask = torch.zeros(visible.shape, dtype=dtype, device=starts.device)
    return mask.masked_fill_(~visible, float("-inf"))


class Window(NamedTuple):
    """Where the tokens of a micro-batch stand.

    Attributes:
        positions: [seq], or [batch, seq] where each window has its own.
        rotary: the table of these positions; None with learned positions.
        mask: see `document_mask`; None: each token attends to all before it in its window.
        keys: [batch] of the dropout masks of a layer; None without dropout.
        documents: the bounds of documents within which tokens attend, instead of a mask; see `MicroBatch.documents`.
    """

    positions: Tensor
    rotary: RotaryTable | None
    mask: Tensor | None = None
    keys: Tensor | None = None
    documents: Tensor | None = None


class Positions:
    """The positions of a window's tokens, 0 to seq - 1, and their rotary table.

    A model owns one for all of its layers. It keeps the tensors of the latest sequence length and device, so that
    neither a layer nor a micro-batch computes or holds them again. It is not a module: the table is no buffer, so a
    cast to bfloat16 leaves it in float32, and neither ZeRO 3 nor a checkpoint sees it.
    """

    def __init__(self, gpt: GPTConfig):
        self._gpt = gpt
        self._positions = torch.empty(0, dtype=torch.int64)
        self._table: RotaryTable | None = None

    def of_window(self, seq_length: int, device: torch.device) -> Window:
        """The positions 0 to seq - 1."""
        if len(self._positions) != seq_length or self._positions.device != device:
            self._positions = torch.arange(seq_length, device=device)
            if self._gpt.position_embedding_type == "rope":
                self._table = rotary_table(self._positions, self._gpt.kv_channels, self._gpt.rotary_base)
        return Window(self._positions, self._table)

    def of_documents(self, tokens: Tensor, dtype: torch.dtype, documents: Tensor | None = None) -> Window:
        """The positions of a micro-batch whose documents count, or attend, for themselves.

        Args:
            tokens: [batch, seq] ids.
            dtype: of the activations.
            documents: bounds of the documents, for attention; None: a mask is made.
        """
        gpt = self._gpt
        assert gpt.eod is not None
        window = self.of_window(tokens.shape[1], tokens.device)
        starts = document_starts(tokens, gpt.eod)
        if gpt.reset_position_ids:
            positions = window.positions - starts
            rotary = rotary_table(positions, gpt.kv_channels, gpt.rotary_base) if window.rotary is not None else None
            window = Window(positions, rotary)
        if not gpt.reset_attention_mask:
            return window
        if documents is not None:
            return window._replace(documents=documents)
        return window._replace(mask=document_mask(starts, dtype))
