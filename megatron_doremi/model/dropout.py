"""Dropout (Srivastava et al. 2014) whose masks are a function of the place of a number in the full model.

A mask is computed, not drawn: whether a number is kept is a hash of the window's key (which the loader makes of seed,
step and the window's place in the global batch), layer, site, position or query, and channel or key. So it is the same
at any layout, after a resume and when a block is recomputed, and there is no random state to save or to restore.
Tensor-parallel ranks agree on the residual stream that they share, and differ in their own heads and positions.

Keys and hashes are in [0, 2 ** 32), held as int64, so that no product overflows on any device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_MULTIPLIER, _MASK = 0x45D9F3B, 0xFFFFFFFF
# Sites of a layer: the embeddings, which belong to the first one, have one, too.
PROBABILITIES, AFTER_ATTENTION, AFTER_MLP, EMBEDDINGS = 1, 2, 3, 4


class Dropout(NamedTuple):
    """Rates at which numbers become 0, each at least 0 and below 1.

    Attributes:
        attention: of attention probabilities.
        hidden: of the embeddings, and of what attention and feed-forward layer add to the residual stream.
    """

    attention: float = 0.0
    hidden: float = 0.0


NONE = Dropout()


def mix(values: Tensor) -> Tensor:
    """A hash of 32 bits of each value (two rounds of multiply and xorshift)."""
    for _ in range(2):
        values = (((values >> 16) ^ values) * _MULTIPLIER) & _MASK
    return (values >> 16) ^ values


def layer_keys(keys: Tensor, layer: int) -> Tensor:
    """Keys of a layer's windows: [batch] -> [batch]."""
    return mix(keys ^ mix(torch.full_like(keys, layer + 1)))


def kept(keys: Tensor, places: Tensor, channels: Tensor, rate: float) -> Tensor:
    """Which numbers remain.

    Args:
        keys: [...] of the windows, or of the heads of windows.
        places: [s] positions or queries, in the full sequence.
        channels: [c] channels or keys, in the full model.

    Returns:
        [..., s, c] booleans, each true with probability 1 - rate.
    """
    rows = mix(keys.unsqueeze(-1) ^ mix(places + 1))
    return mix(rows.unsqueeze(-1) ^ mix(channels + (1 << 24))) >= int(rate * 2**32)


def drop(x: Tensor, keep: Tensor, rate: float) -> Tensor:
    """0 where `keep` is false, and x / (1 - rate) elsewhere, which has the mean of x."""
    return torch.where(keep, x * (1.0 / (1.0 - rate)), 0.0)


def drop_hidden(x: Tensor, keys: Tensor, site: int, first: int, rate: float) -> Tensor:
    """Dropout of the residual stream, [batch, seq, hidden]; `first`: place of x's first position in the sequence."""
    places = torch.arange(first, first + x.shape[1], device=x.device)
    return drop(x, kept(mix(keys + site), places, torch.arange(x.shape[2], device=x.device), rate), rate)


def drop_probabilities(probabilities: Tensor, keys: Tensor, first: int, rate: float) -> Tensor:
    """Dropout of attention probabilities, [batch, heads, query, key]; `first`: number of the first head."""
    heads = torch.arange(first + 1, first + 1 + probabilities.shape[1], device=probabilities.device)
    places = torch.arange(probabilities.shape[2], device=probabilities.device)
    of_heads = mix(mix(keys + PROBABILITIES).unsqueeze(-1) ^ mix(heads))
    return drop(probabilities, kept(of_heads, places, places, rate), rate)
