"""Positions of tokens, and rotary position embeddings of queries and keys (Su et al. 2021, section 3.2)."""

from __future__ import annotations

from typing import NamedTuple

import torch
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

    def of_window(self, seq_length: int, device: torch.device) -> tuple[Tensor, RotaryTable | None]:
        """The positions, [seq], and their table; None in place of the table with learned positions."""
        if len(self._positions) != seq_length or self._positions.device != device:
            self._positions = torch.arange(seq_length, device=device)
            if self._gpt.position_embedding_type == "rope":
                self._table = rotary_table(self._positions, self._gpt.kv_channels, self._gpt.rotary_base)
        return self._positions, self._table
