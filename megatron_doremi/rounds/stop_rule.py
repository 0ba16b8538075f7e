"""When rounds of DoReMi end: no weight moves by more than the noise of the weights (Xie et al. 2023, section 2).

A round trains a reference on given sampling weights, and a proxy against it. The paper ends when no learned weight
differs from the reference's by 0.001 or more. Two proxies that differ in nothing but their seed differ by more than
that, so the threshold is at least the noise: the size that the change of a round has if nothing but noise moves the
weights. Pure: numbers in, numbers out.
"""

from __future__ import annotations

import math
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


def movement(
    reference: Floats, seeds: Floats, min_change: float, steps: Floats | None = None, before: Floats | None = None
) -> Movement:
    """Judges a round.

    Args:
        reference: [k] sampling weights of the round's reference, sum 1.
        seeds: [n, k] learned weights of the round's proxies, one row for each seed.
        min_change: a change that never counts.
        steps, before: [steps, k] weights at each step of the proxy of one seed, in this round and in the one before;
            read if there is one seed.
    """
    difference = np.abs(seeds.mean(axis=0) - reference)
    noise: float | None = None
    source: Source | None = None
    if len(seeds) > 1:
        noise, source = noise_of_seeds(seeds), "seeds"
    elif steps is not None and before is not None and min(len(steps), len(before)) > 1:
        noise, source = noise_of_halves(steps, before), "halves"
    threshold = min_change if noise is None else max(min_change, noise)
    return Movement(float(difference.max()), int(difference.argmax()), noise, source, threshold)


def noise_of_seeds(seeds: Floats) -> float:
    """The largest standard deviation, over domains, of the difference of two means over n seeds: sqrt(2 / n) s.

    Args:
        seeds: [n, k] weights of n > 1 seeds.
    """
    count = len(seeds)
    return float(math.sqrt(2.0 / count) * seeds.std(axis=0, ddof=1).max())


def noise_of_halves(steps: Floats, before: Floats) -> float:
    """The noise of the difference of two proxies, from its means over the first and the second half of the steps.

    The halves of one proxy differ for another reason than noise: its weights move with the learning rate, in every
    round in the same way. The difference of two rounds, step by step, does not have that movement. If d1 and d2, its
    means over the halves, differ by noise alone, the standard deviation of the mean over all steps is |d1 - d2| / 2.

    Args:
        steps, before: [steps, k] weights at each step, of two proxies; steps that only one of them has are left out.
    """
    count = min(len(steps), len(before))
    difference = steps[:count] - before[:count]
    first, second = difference[: count // 2].mean(axis=0), difference[count // 2 :].mean(axis=0)
    return float(np.abs(first - second).max() / 2.0)
