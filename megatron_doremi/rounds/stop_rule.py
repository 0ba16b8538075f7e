"""When rounds of DoReMi end: no weight moves by more than the noise of the weights (Xie et al. 2023, section 2).

A round trains a reference on given sampling weights, and a proxy against it. The paper ends when no learned weight
differs from the reference's by 0.001 or more. Two proxies that differ in nothing but their seed differ by more than
that, so the threshold is at least the noise: the size that the change of a round has if nothing but noise moves the
weights. Pure: numbers in, numbers out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

Source = Literal["seeds", "halves"]


@dataclass(frozen=True)
class Movement:
    """How far a round moved the weights, and what counts as no movement.

    Attributes:
        change: the largest absolute difference of a domain's learned weight from its weight in the reference.
        domain: position of that domain.
        noise: such a difference if nothing but noise moves the weights; None if it is not known.
        noise_from: what showed the noise: the spread over seeds, or halves of the steps; None if it is not known.
        threshold: what the change must not exceed for the rounds to end.
    """

    change: float
    domain: int
    noise: float | None
    noise_from: Source | None
    threshold: float

    @property
    def settled(self) -> bool:
        """Whether the weights have stopped moving."""
        return self.change <= self.threshold


def movement(reference: Floats, learned: Floats, noise: float | None, source: Source, min_change: float) -> Movement:
    """Judges a round.

    Args:
        reference: [k] sampling weights of the round's reference, sum 1.
        learned: [k] learned weights of the round, sum 1.
        noise, source: the noise, and what showed it; None if it is not known.
        min_change: a change that never counts.
    """
    difference = np.abs(learned - reference)
    threshold = min_change if noise is None else max(min_change, noise)
    known = None if noise is None else source
    return Movement(float(difference.max()), int(difference.argmax()), noise, known, threshold)


def noise_of_seeds(rounds: Sequence[Floats]) -> float:
    """The largest standard deviation, over domains, of the difference of two rounds' means over n seeds: sqrt(2 / n) s.

    Args:
        rounds: [n, k] weights of n > 1 seeds, for each round so far; s^2 is the mean of their variances.
    """
    count = len(rounds[0])
    variances = np.mean([seeds.var(axis=0, ddof=1) for seeds in rounds], axis=0)
    return float(math.sqrt(2.0 / count * variances.max()))


def noise_of_halves(steps: Floats, before: Floats) -> float:
    """The noise of the difference of two proxies, from its means over the first and the second half of the steps.

    The halves of one proxy differ for another reason than noise: its weights move with the learning rate, in every
    round in the same way. The difference of two rounds, step by step, does not have that movement. If d1 and d2, its
    means over the halves, differ by noise alone, the standard deviation of the mean over all steps is |d1 - d2| / 2.
    Rounds that do differ add to it, so the smallest of several pairs of rounds is the best.

    Args:
        steps, before: [steps, k] weights at each step, of two proxies; steps that only one of them has are left out.
    """
    count = min(len(steps), len(before))
    difference = steps[:count] - before[:count]
    first, second = difference[: count // 2].mean(axis=0), difference[count // 2 :].mean(axis=0)
    return float(np.abs(first - second).max() / 2.0)
