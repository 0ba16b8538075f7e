"""A setting: a dataclass field that is also a flag, with the phases that read it and the bounds of its value."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

REFERENCE, SCORE, PROXY, MAIN, EVALUATE = "reference", "score", "proxy", "main", "evaluate"
PHASES = (REFERENCE, SCORE, PROXY, MAIN, EVALUATE)
TRAINING = (REFERENCE, PROXY, MAIN)
NO_EVALUATION = (*TRAINING, SCORE)
# The value of --domain-weights that needs a budget.
UNIMAX = "unimax"
# The value of --doremi-weighting that samples by the weights.
RESAMPLE = "resample"
MAX_LAYERS, MAX_WIDTH = 10_000, 1 << 20


@dataclass(frozen=True)
class Bounds:
    """The range of a number: far above anything in use, and low enough that a typo allocates no memory.

    Attributes:
        low, high: both included, unless above_low or below_high is set.
    """

    low: float
    high: float
    above_low: bool = False
    below_high: bool = False

    def broken_rule(self, value: float) -> str | None:
        """The rule that a value breaks, or None."""
        under = value <= self.low if self.above_low else value < self.low
        over = value >= self.high if self.below_high else value > self.high
        if not under and not over:
            return None
        if self.high == 1.0 and not self.above_low:
            return "at least 0, below 1" if self.below_high else "between 0 and 1"
        if under and self.above_low:
            return f"above {self.low:g}"
        if under:
            return f"at least {self.low:g}" if self.low else "not negative"
        return f"at most {self.high:,g}" if isinstance(self.high, float) else f"at most {self.high:,}"


STEPS = Bounds(0, 10**9)
WIDTH = Bounds(0, MAX_WIDTH)
RANKS = Bounds(1, 1 << 20)
RANKS_OR_NONE = Bounds(0, 1 << 20)
SHARE = Bounds(0.0, 1.0)
DECAY = Bounds(0.0, 1.0, below_high=True)
RATE = Bounds(0.0, 1e6)
POSITIVE_RATE = Bounds(0.0, 1e6, above_low=True)
# Up to thirty days.
MINUTES = Bounds(0.0, 43_200.0)


def setting(
    default: Any,
    help: str,
    choices: tuple[Any, ...] = (),
    phases: tuple[str, ...] | None = None,
    bounds: Bounds | None = None,
    identifiers: bool = False,
) -> Any:
    """A dataclass field that is also a flag.

    Args:
        choices: the allowed values; empty: any.
        phases: the phases that read it; others refuse it. None: the `default_phases` of its section.
        bounds: the range of a number.
        identifiers: of several words: names of settings, spelled as flags or not, also separated by commas; other
            words, such as paths and names of domains, stay as they are.
    """
    metadata = {"help": help, "choices": choices, "phases": phases, "bounds": bounds, "identifiers": identifiers}
    return dataclasses.field(default=default, metadata=metadata)


def flag_of(name: str) -> str:
    """The flag of a setting: `num_layers` is `--num-layers`."""
    return "--" + name.replace("_", "-")


def phases_of(section: type, field: dataclasses.Field[Any]) -> tuple[str, ...]:
    """The phases that read a setting of a section."""
    return field.metadata["phases"] or section.default_phases  # type: ignore[attr-defined]


# With these values nothing reads the settings beside them. Earlier versions took flags for them.
_UNREAD = (
    ("lr_decay_style", "constant", ("min_lr",)),
    ("position_embedding_type", "learned_absolute", ("rotary_base",)),
    ("doremi_weighting", RESAMPLE, ("doremi_update", "doremi_normalization")),
)


def without_unread(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by name without those that nothing reads: the end of a rate that stays constant, the rotary base of
    learned positions, and of a proxy that samples by its weights the order and the weighing of its loss."""
    unread = {each for name, value, names in _UNREAD if values.get(name) == value for each in names}
    return {name: value for name, value in values.items() if name not in unread}
