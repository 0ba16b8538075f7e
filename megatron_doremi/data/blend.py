"""Which window of which domain is sample n: the blend, as pure functions of a small state.

A global batch of B windows holds floor or ceil of B * q_i windows of domain i; what rounding leaves over is
carried as a credit per domain, so that after any number of steps no domain is a whole window away from its
share (for constant weights; tests/data/test_blend.py measures it). Weights may change between any two steps.
Within a domain, epoch e visits all windows once in the order of a keyed permutation.

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

# Below this, a part of a window is rounding.
_TOLERANCE = 1e-9
# Batches that the tie-break looks ahead.
_HORIZON = 64


def window_count(num_tokens: int, seq_length: int) -> int:
    """Windows of seq_length + 1 tokens at stride seq_length that a stream of tokens holds."""
    return max(0, (num_tokens - 1) // seq_length)


def too_short(name: str, prefix: object, num_tokens: int, seq_length: int) -> Fault | None:
    """The fault of a domain that does not fill one window, empty ones included."""
    if window_count(num_tokens, seq_length) > 0:
        return None
    what = "is empty" if num_tokens == 0 else f"has {num_tokens} tokens"
    return Fault(
        f"domain {name!r} ({prefix})",
        what,
        f"a window takes --seq-length + 1 = {seq_length + 1} tokens",
        "give the domain more text, leave it out of the manifest, or lower --seq-length",
    )


@dataclass(frozen=True)
class BlendState:
    """Where the blend stands, before its step `step`.

    Attributes:
        step: global batches taken so far.
        credits: [k] windows owed to each domain, float64, sum 0.
        cursors: [k] windows taken from each domain so far, int64, over all epochs.
    """

    step: int
    credits: NDArray[np.float64]
    cursors: NDArray[np.int64]

    @staticmethod
    def start(num_domains: int) -> BlendState:
        """The state before the first step."""
        return BlendState(0, np.zeros(num_domains), np.zeros(num_domains, dtype=np.int64))

    def to_dict(self, names: Sequence[str]) -> dict[str, Any]:
        """For a checkpoint, keyed by domain; floats survive JSON exactly."""
        credits = dict(zip(names, self.credits.tolist(), strict=True))
        cursors = dict(zip(names, self.cursors.tolist(), strict=True))
        return {"step": self.step, "credits": credits, "cursors": cursors}

    @staticmethod
    def from_dict(entry: Mapping[str, Any], names: Sequence[str]) -> BlendState:
        """The state that `to_dict` wrote. Raises KeyError where a domain is missing."""
        credits = np.array([entry["credits"][name] for name in names], dtype=np.float64)
        cursors = np.array([entry["cursors"][name] for name in names], dtype=np.int64)
        return BlendState(int(entry["step"]), credits, cursors)


@dataclass(frozen=True)
class GlobalBatch:
    """The windows of one step, in the order in which ranks and micro-batches slice them.

    Attributes:
        domains: [B] number of each window's domain.
        windows: [B] number of the window within its domain.
    """

    domains: NDArray[np.int64]
    windows: NDArray[np.int64]


@dataclass(frozen=True)
class Blend:
    """A mixture of domains.

    Attributes:
        names: the domains; their names, not their places, key the order of windows.
        window_counts: [k] windows in each domain's stream.
        batch_size: windows in a global batch.
        seed: chooses the order.
    """

    names: tuple[str, ...]
    window_counts: tuple[int, ...]
    batch_size: int
    seed: int

    def next_batch(self, state: BlendState, weights: NDArray[np.float64]) -> tuple[GlobalBatch, BlendState]:
        """The global batch at `state` under sampling `weights` ([k], sum 1), and the state after it."""
        counts, credits = quotas(weights, state.credits, self.batch_size)
        domains = np.repeat(np.arange(len(self.names)), counts)
        windows = np.concatenate(
            [self.windows_at(i, int(state.cursors[i]), int(counts[i])) for i in range(len(self.names))]
        )
        places = np.arange(self.batch_size, dtype=np.int64)
        order = permute(places, self.batch_size, key_of(self.seed, "batch", state.step))
        batch = GlobalBatch(domains[order], windows[order])
        return batch, BlendState(state.step + 1, credits, state.cursors + counts)

    def windows_at(self, domain: int, cursor: int, count: int) -> NDArray[np.int64]:
        """The `count` windows of a domain from place `cursor` of its endless sequence of epochs on."""
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

    Each gets the whole part of its share batch_size * weight; the places left go, one each, to domains whose
    share has a fractional part, in the order of `_most_urgent_first`. For weights that stay the same this keeps
    every domain less than one window from its exact share at every step.

    Args:
        weights: [k] sampling weights, not negative, sum 1.
        credits: [k] windows owed so far.
        batch_size: windows to hand out.

    Returns:
        [k] counts with sum batch_size, and [k] credits after the batch.
    """
    shares = batch_size * (weights / weights.sum())
    # A share that is whole but for rounding (16 * 0.25 = 3.9999...) must not leave a fractional part behind.
    whole = np.floor(shares + _TOLERANCE)
    fractions = np.maximum(shares - whole, 0.0)
    counts = whole.astype(np.int64)
    left = batch_size - int(counts.sum())
    if left:
        counts[_most_urgent_first(credits, fractions)[:left]] += 1
    return counts, credits + shares - counts


def _most_urgent_first(credits: NDArray[np.float64], fractions: NDArray[np.float64]) -> NDArray[np.int64]:
    """The order in which domains take the places that whole parts leave over.

    This is proportionate-fair scheduling (Baruah, Cohen, Plaxton and Varvel 1996, algorithm PF): domains are
    tasks, `left` places a batch are processors. Who would fall a whole window behind comes first, who would
    get a whole window ahead last, and between them those whose exact share crosses a whole number sooner in
    the batches to come. Serving the largest credit first looks as good and is not: it lets domains fall due
    together, more of them than there are places.
    """
    owed = credits + fractions
    rank = np.where(owed >= 1.0 - _TOLERANCE, 2, np.where(owed > _TOLERANCE, 1, 0))
    rank[fractions == 0.0] = -1
    phase = credits - np.floor(credits)
    ahead = np.arange(1, _HORIZON + 1)[:, None]
    crossing = np.mod(phase + fractions * ahead, 1.0) + fractions - 1.0
    signs = np.sign(np.where(np.abs(crossing) < _TOLERANCE, 0.0, crossing))
    # lexsort's last key counts most and it is stable: ties go to the earlier domain, on every machine.
    return np.lexsort((*(-signs[::-1]), -rank))
