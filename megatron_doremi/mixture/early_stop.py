"""When a proxy may stop early: the mean of its domain weights over all planned steps, extrapolated, with its error.

The mean over T steps, of which t are taken, is

    (t * mean_t + (T - t) * rest) / T

where mean_t is known and `rest`, the mean of the weights in the steps to come, is estimated from a window, the second
half of the t steps: its weights are averaged over 8 groups of consecutive steps, and a line is fitted to the 8 means.
A proxy's weights drift, more slowly the longer it trains, so that `rest` lies between the window's mean (no further
drift) and the extended line (the drift continues). The estimate is halfway, and half of the drift is part of its error.
The other part is noise: of the window, of the slope and of the steps to come, by the prediction interval of a
regression (95 %, Student's t with 6 degrees of freedom), which takes the groups as independent. The widest interval of
any domain serves all: a domain that was quiet, perhaps at the lower bound of the weights, moves like the others when
its turn comes, and nothing in its past says so. docs/early_stop.md has the error on proxies that took all of their
steps.

All arithmetic is float64 in a fixed order, so that all ranks decide alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from megatron_doremi.storage.formats import Name, Positive, Schema
from megatron_doremi.student_t import CONFIDENCE, student_t_quantile

GROUPS = 8
# The history holds the running sums of the weights at multiples of a power of two of steps, at most so many.
_MOST_SUMS = 64
# Nothing is extrapolated to more than four times the steps taken: the drift of the start says nothing that far ahead.
EARLIEST_SHARE = 0.25
# Steps of a group at least. The weights of neighboring steps are nearly equal: in shorter groups the noise looks small.
SHORTEST_GROUP = 8
# Tolerance for the rounding error of a float64 sum over domains and steps, per step.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class FinalMean:
    """The mean of the weights over all planned steps, extrapolated. All vectors are [k] float64.

    Attributes:
        steps: steps taken.
        train_iters: planned steps.
        so_far: mean over the steps taken.
        mean: extrapolated mean, sum 1.
        half_width: half the 95 % interval of a domain's mean, one for all domains.
        low, high: the intervals, without values that the steps to come cannot reach.
    """

    steps: int
    train_iters: int
    so_far: NDArray[np.float64]
    mean: NDArray[np.float64]
    half_width: float
    low: NDArray[np.float64]
    high: NDArray[np.float64]

    def to_dict(self, names: Sequence[str]) -> dict[str, Any]:
        """What the provenance of the learned weights says about an early stop, by domain name."""
        pairs = np.stack((self.low, self.high), axis=1).tolist()
        return {
            "confidence": CONFIDENCE,
            "half_width": self.half_width,
            "interval": dict(zip(names, pairs, strict=True)),
            "mean_so_far": dict(zip(names, self.so_far.tolist(), strict=True)),
        }


def final_mean(sums: NDArray[np.float64], steps: int, group_steps: int, train_iters: int) -> FinalMean:
    """Extrapolates the mean of the weights.

    Args:
        sums: [GROUPS + 1, k] alpha_1 + ... + alpha_s at s = steps - GROUPS * group_steps, ..., steps - group_steps,
            steps.
        steps: steps taken.
        group_steps: steps of a group.
        train_iters: planned steps, more than `steps`.
    """
    rest_steps = train_iters - steps
    groups = np.diff(sums, axis=0) / group_steps
    window = groups.sum(axis=0) / GROUPS
    # In groups, from the middle of the window.
    place = np.arange(GROUPS)[:, None] - (GROUPS - 1) / 2
    spread = float((place**2).sum())
    slope = (place * groups).sum(axis=0) / spread
    ahead = GROUPS / 2 + rest_steps / group_steps / 2
    drift = slope * ahead
    variance = ((groups - window - place * slope) ** 2).sum(axis=0) / (GROUPS - 2)
    noise = np.sqrt(variance * (1 / GROUPS + group_steps / rest_steps + ahead**2 / 4 / spread))
    error = np.abs(drift) / 2 + student_t_quantile(GROUPS - 2) * noise
    rest = np.clip(window + drift / 2, 0.0, 1.0)
    rest = rest / math.fsum(rest)
    mean = (sums[-1] + rest_steps * rest) / train_iters
    mean = mean / math.fsum(mean)
    half_width = float(error.max()) * rest_steps / train_iters
    low = np.maximum(mean - half_width, sums[-1] / train_iters)
    high = np.minimum(mean + half_width, (sums[-1] + rest_steps) / train_iters)
    return FinalMean(steps, train_iters, sums[-1] / steps, mean, half_width, low, high)


def sum_interval(steps: int) -> int:
    """Steps between the running sums that the history holds after `steps` steps: the least power of two that makes
    them at most 64."""
    interval = 1
    while steps > _MOST_SUMS * interval:
        interval *= 2
    return interval


class EarlyStopState(Schema):
    """The history in a checkpoint.

    Attributes:
        drift: --doremi-stop-drift of the run that wrote it.
        steps: ascending.
        sums: by domain, the running sum of its weight after each of `steps`.
    """

    drift: Annotated[float, Field(gt=0, lt=1)]
    steps: list[Positive] = Field(max_length=_MOST_SUMS)
    sums: dict[Name, list[Annotated[float, Field(ge=0)]]]

    @model_validator(mode="after")
    def _consistent(self) -> EarlyStopState:
        if any(later <= step for step, later in zip(self.steps, self.steps[1:], strict=False)):
            raise ValueError("early_stop.steps must ascend")
        if any(len(sums) != len(self.steps) for sums in self.sums.values()):
            raise ValueError(f"early_stop.sums must have {len(self.steps)} numbers, one for each of the steps")
        for step, row in zip(self.steps, zip(*self.sums.values(), strict=True), strict=True):
            if not math.isclose(math.fsum(row), step, rel_tol=_ROUNDING):
                raise ValueError(f"early_stop.sums of step {step} must sum to {step}, not {math.fsum(row)!r}")
        return self


class EarlyStop:
    """Decides after each step whether a proxy stops: when the mean of all steps is known to within +- `drift`.

    The steps at which it is checked depend on their number alone, and not on where the run was interrupted.

    Attributes:
        drift: --doremi-stop-drift, above 0.
        estimate: the extrapolated mean after the last step; None if that step is not checked.
    """

    def __init__(self, drift: float, train_iters: int, warmup: int):
        """
        Args:
            warmup: steps in which the learning rate rises; the window starts after them.
        """
        self.drift = drift
        self._train_iters, self._warmup = train_iters, warmup
        self._sums: dict[int, NDArray[np.float64]] = {}
        self.estimate: FinalMean | None = None

    @property
    def settled(self) -> FinalMean | None:
        """The estimate, if it is good enough to stop."""
        return self.estimate if self.estimate is not None and self.estimate.half_width <= self.drift else None

    def observe(self, steps: int, weight_sum: Tensor) -> None:
        """Takes the running sum of the weights, [k], after `steps` steps."""
        interval = sum_interval(steps)
        if steps % interval == 0:
            # With every doubling of the interval each second sum is dropped.
            self._sums = {step: sums for step, sums in self._sums.items() if step % interval == 0}
            self._sums[steps] = np.array(weight_sum.tolist())
        self.estimate = self._estimate(steps)

    def group_steps(self, steps: int) -> int | None:
        """Steps of a group of the window that ends after `steps` steps; None if that step is not checked."""
        interval = sum_interval(steps)
        group = steps // 2 // interval // GROUPS * interval
        enough = steps >= EARLIEST_SHARE * self._train_iters and steps - GROUPS * group >= self._warmup
        enough = enough and group >= SHORTEST_GROUP and steps < self._train_iters
        return group if enough and steps % interval == 0 else None

    def _estimate(self, steps: int) -> FinalMean | None:
        group = self.group_steps(steps)
        if group is None:
            return None
        sums = [self._sums.get(steps - place * group) for place in range(GROUPS, -1, -1)]
        known = [each for each in sums if each is not None]
        # A history that began at a resume is too short at first.
        return final_mean(np.stack(known), steps, group, self._train_iters) if len(known) == len(sums) else None

    def first_check(self) -> int | None:
        """The first step that is checked; None: the run is too short."""
        step = max(1, math.ceil(EARLIEST_SHARE * self._train_iters))
        while step < self._train_iters:
            if self.group_steps(step):
                return step
            interval = sum_interval(step)
            step = (step // interval + 1) * interval
        return None

    @property
    def rule(self) -> str:
        """The rule as a line for people."""
        total, first = self._train_iters, self.first_check()
        if first is None:
            return f"never: {total:,} steps are too few to judge the weights (--doremi-stop-drift {self.drift:g})"
        return (
            f"from step {first:,} on, once the mean weights of all {total:,} steps are known to within "
            f"{self.drift:g} (--doremi-stop-drift)"
        )

    def to_dict(self, names: Sequence[str]) -> dict[str, Any]:
        """The history for a checkpoint. JSON preserves the floats exactly."""
        columns = zip(*(each.tolist() for each in self._sums.values()), strict=True)
        sums = dict(zip(names, map(list, columns), strict=True)) if self._sums else {name: [] for name in names}
        return {"drift": self.drift, "steps": list(self._sums), "sums": sums}

    def load(self, entry: Mapping[str, Any], names: Sequence[str], steps: int) -> None:
        """Restores the history that `to_dict` returned, `steps` steps into the run; the setting of this run counts."""
        rows = np.array([entry["sums"][name] for name in names]).T
        self._sums = dict(zip(entry["steps"], rows, strict=True))
        self.estimate = self._estimate(steps)
