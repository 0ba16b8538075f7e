"""The blend: which window of which domain each sample is, as pure functions of a small state.

A global batch of B windows holds floor(B * q_i) or ceil(B * q_i) windows of domain i, where q_i is its sampling
weight. The rounding error is carried to the next step as a credit per domain, so that after any number of steps with
constant weights every domain is less than one window away from its exact share (measured by tests/data/test_blend.py).
Weights may change between any two steps. Each epoch visits all windows of a domain once, in the order of a keyed
permutation.

Every rank computes the same global batch and takes its slice; nothing here depends on the layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_doremi.data.permutation import key_of, permute
from megatron_doremi.errors import Fault

# Fractions of a window below this are rounding errors.
_TOLERANCE = 1e-9
# Batches that the tie-break looks ahead.
_HORIZON = 64


def window_count(num_tokens: int, seq_length: int) -> int:
    """Number of windows of seq_length + 1 tokens, at stride seq_length, in a stream of num_tokens tokens."""
    return max(0, (num_tokens - 1) // seq_length)


def too_short(name: str, prefix: object, num_tokens: int, seq_length: int) -> Fault | None:
    """The fault of a domain that is too short for one window; None if it is long enough."""
    if window_count(num_tokens, seq_length) > 0:
        return None
    size = "is empty" if num_tokens == 0 else f"has {num_tokens} tokens"
    return Fault(
        f"domain {name!r} ({prefix})",
        size,
        f"a window takes --seq-length + 1 = {seq_length + 1} tokens",
        "give the domain more text, leave it out with --exclude-domains, or lower --seq-length",
    )


@dataclass(frozen=True)
class BlendState:
    """The position of the blend before step `step`.

    Attributes:
        step: number of global batches consumed.
        credits: [k] windows owed to each domain, float64, sum 0.
        cursors: [k] windows consumed from each domain over all epochs, int64.
    """

    step: int
    credits: NDArray[np.float64]
    cursors: NDArray[np.int64]

    @staticmethod
    def start(num_domains: int) -> BlendState:
        """The state before the first step."""
        return BlendState(0, np.zeros(num_domains), np.zeros(num_domains, dtype=np.int64))

    def to_dict(self, names: Sequence[str]) -> dict[str, Any]:
        """The state for a checkpoint, keyed by domain name. JSON preserves the floats exactly."""
        credits = dict(zip(names, self.credits.tolist(), strict=True))
        cursors = dict(zip(names, self.cursors.tolist(), strict=True))
        return {"step": self.step, "credits": credits, "cursors": cursors}

    @staticmethod
    def from_dict(entry: Mapping[str, Any], names: Sequence[str]) -> BlendState:
        """The state that `to_dict` wrote. Raises KeyError if a domain is missing."""
        credits = np.array([entry["credits"][name] for name in names], dtype=np.float64)
        cursors = np.array([entry["cursors"][name] for name in names], dtype=np.int64)
        return BlendState(int(entry["step"]), credits, cursors)


@dataclass(frozen=True)
class GlobalBatch:
    """The windows of one step, in the order in which replicas and micro-batches slice them.

    Attributes:
        domains: [B] domain index of each window.
        windows: [B] index of each window within its domain.
    """

    domains: NDArray[np.int64]
    windows: NDArray[np.int64]


@dataclass(frozen=True)
class Blend:
    """A mixture of domains.

    Attributes:
        names: [k] domain names. A domain's order of windows depends on its name, not on its position.
        window_counts: [k] windows in each domain's stream.
        batch_size: windows in a global batch, B.
        seed: selects the order of windows.
    """

    names: tuple[str, ...]
    window_counts: tuple[int, ...]
    batch_size: int
    seed: int

    def next_batch(self, state: BlendState, weights: NDArray[np.float64]) -> tuple[GlobalBatch, BlendState]:
        """The global batch at `state` under sampling `weights` ([k], sum 1), and the state after it."""
        counts, state_after = self.advance(state, weights)
        return self.batch_of(state, counts), state_after

    def advance(self, state: BlendState, weights: NDArray[np.float64]) -> tuple[NDArray[np.int64], BlendState]:
        """[k] windows of each domain in the global batch at `state`, and the state after it."""
        counts, credits = quotas(weights, state.credits, self.batch_size)
        return counts, BlendState(state.step + 1, credits, state.cursors + counts)

    def batch_of(self, state: BlendState, counts: NDArray[np.int64]) -> GlobalBatch:
        """The global batch at `state` that has [k] `counts` windows of the domains."""
        domains = np.repeat(np.arange(len(self.names)), counts)
        windows = np.concatenate(
            [self.windows_at(i, int(state.cursors[i]), int(counts[i])) for i in range(len(self.names))]
        )
        places = np.arange(self.batch_size, dtype=np.int64)
        order = permute(places, self.batch_size, key_of(self.seed, "batch", state.step))
        return GlobalBatch(domains[order], windows[order])

    def windows_at(self, domain: int, cursor: int, count: int) -> NDArray[np.int64]:
        """[count] windows of a domain, starting at position `cursor` of its sequence of epochs."""
        size = self.window_counts[domain]
        places = np.arange(cursor, cursor + count, dtype=np.int64)
        windows = np.empty(count, dtype=np.int64)
        epochs = places // size
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            key = key_of(self.seed, "domain", self.names[domain], int(epoch))
            windows[chosen] = permute(places[chosen] % size, size, key)
        return windows


def quotas(
    weights: NDArray[np.float64], credits: NDArray[np.float64], batch_size: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """How many windows each domain gets in a global batch.

    Each domain gets the integer part of its share batch_size * weight. The remaining windows go, one each, to domains
    whose share has a fractional part, in the order of `_most_urgent_first`. With constant weights this keeps every
    domain less than one window away from its exact share at every step.

    Args:
        weights: [k] sampling weights, non-negative, sum 1.
        credits: [k] windows owed so far.
        batch_size: windows to distribute.

    Returns:
        [k] counts with sum batch_size, and [k] credits after the batch.
    """
    shares = batch_size * (weights / weights.sum())
    # A share that is an integer up to rounding (16 * 0.25 = 3.9999...) must not leave a fractional part.
    floors = np.floor(shares + _TOLERANCE)
    fractions = np.maximum(shares - floors, 0.0)
    counts = floors.astype(np.int64)
    remaining = batch_size - int(counts.sum())
    if remaining:
        counts[_most_urgent_first(credits, fractions)[:remaining]] += 1
    return counts, credits + shares - counts


def _most_urgent_first(credits: NDArray[np.float64], fractions: NDArray[np.float64]) -> NDArray[np.int64]:
    """[k] domains in the order in which they get the windows that the integer parts leave.

    This is proportionate-fair scheduling (Baruah, Cohen, Plaxton and Varvel 1996, algorithm PF): domains are tasks,
    the remaining windows of a batch are processors. Domains that would fall a full window behind come first, domains
    that would get a full window ahead come last. Between them, the domain whose exact share crosses an integer sooner
    in the coming batches comes first. Serving the largest credit first is not enough: more domains can become due in
    one batch than there are windows left.
    """
    owed = credits + fractions
    rank = np.where(owed >= 1.0 - _TOLERANCE, 2, np.where(owed > _TOLERANCE, 1, 0))
    rank[fractions == 0.0] = -1
    phase = credits - np.floor(credits)
    ahead = np.arange(1, _HORIZON + 1)[:, None]
    crossing = np.mod(phase + fractions * ahead, 1.0) + fractions - 1.0
    signs = np.sign(np.where(np.abs(crossing) < _TOLERANCE, 0.0, crossing))
    # lexsort sorts by its last key first and is stable: ties go to the earlier domain, on every machine.
    return np.lexsort((*(-signs[::-1]), -rank))
