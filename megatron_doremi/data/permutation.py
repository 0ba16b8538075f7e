"""Keyed permutations of 0..n-1 in closed form: there is no index to build, store or share between processes.

A balanced Feistel network permutes the smallest even number of bits that holds n values. Results outside the range
are permuted again until they fall inside (cycle walking, Black and Rogaway 2002; at most 4 passes expected). Integer
arithmetic only, so that every machine computes the same order.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6


def key_of(*parts: object) -> int:
    """A 64-bit key from the seed and the values that identify a permutation (domain, epoch, step)."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def permute(positions: NDArray[np.int64], size: int, key: int) -> NDArray[np.int64]:
    """The images of positions under a keyed permutation of 0..size-1.

    Args:
        positions: [n] values in 0..size-1.
        size: length of the permutation, at least 1.
        key: 64 bits that select the permutation.

    Returns:
        [n] values in 0..size-1, distinct for distinct positions.
    """
    assert size >= 1
    assert positions.size == 0 or (positions.min() >= 0 and positions.max() < size)
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    values = _feistel(positions.astype(np.uint64), half, key)
    outside = np.flatnonzero(values >= size)
    while outside.size:
        values[outside] = _feistel(values[outside], half, key)
        outside = outside[values[outside] >= size]
    return values.astype(np.int64)


def _feistel(values: NDArray[np.uint64], half: int, key: int) -> NDArray[np.uint64]:
    """One pass of the Feistel network over 2 * half bits."""
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> bits, values & mask
    for number in range(_ROUNDS):
        round_key = np.uint64((key + number * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF)
        left, right = right, left ^ (_mix(right + round_key) & mask)
    return (left << bits) | right


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64 (Steele et al. 2014): every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
