"""Reads held-out losses: the evaluation lines of metrics.jsonl, and evaluations.jsonl.

`--phase evaluate` appends to the latter, in any folder: one line per evaluation, of any number of runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from megatron_doremi.errors import ConfigError, Fault, raise_if_any
from megatron_doremi.reporting.json_files import read_lines
from megatron_doremi.storage.formats import Count, Name, Positive, Schema, Sha256, check_entry

FILE = "evaluations.jsonl"


Interval = tuple[float, float]
_IntervalEntry = Annotated[list[float], Field(min_length=2, max_length=2)]


class Unit(Enum):
    """The unit of a held-out loss; the value is its name in a report."""

    BITS = "bits per byte"
    NATS = "nats per token"


@dataclass(frozen=True)
class HeldOut:
    """The held-out losses of one evaluation in one unit.

    Attributes:
        losses: by domain; NaN where the run recorded NaN or Inf.
        token_mean: mean over text that has the domains in their natural shares; None if the line has none.
        by_shares: false for a line of version 0.1, whose token mean weighted domains by held-out windows instead.
        intervals: 95 % intervals over held-out documents, by domain; empty if the line has none.
        controls: domains that mean and worst domain leave out, unless there is no other.
    """

    losses: dict[str, float]
    token_mean: float | None = None
    by_shares: bool = True
    intervals: dict[str, Interval] = field(default_factory=dict)
    controls: frozenset[str] = frozenset()

    @property
    def counted(self) -> dict[str, float]:
        """The losses that are not of controls; all of them if there are only controls."""
        return {name: loss for name, loss in self.losses.items() if name not in self.controls} or self.losses

    @property
    def uniform_mean(self) -> float:
        """Unweighted mean over domains; NaN if any domain's loss is."""
        return sum(self.counted.values()) / len(self.counted)

    @property
    def worst(self) -> tuple[str, float]:
        """The domain with the highest loss, and that loss; NaN only if every loss is."""
        counted = self.counted
        name = max(counted, key=lambda domain: -math.inf if math.isnan(loss := counted[domain]) else loss)
        return name, counted[name]

    def restricted_to(self, names: Iterable[str]) -> HeldOut:
        """The losses of `names` alone; the token mean, which is of all domains, stays."""
        kept = set(names)
        return replace(self, losses={name: loss for name, loss in self.losses.items() if name in kept})


@dataclass(frozen=True)
class Evaluation:
    """One evaluation on held-out text.

    Attributes:
        iteration: training steps taken before it.
        nats: losses in nats per token.
        bits: losses in bits per byte; None if the run did not know the bytes of its text.
        windows: windows read of each domain; None if the line does not record them.
    """

    iteration: int
    nats: HeldOut
    bits: HeldOut | None = None
    windows: dict[str, int] | None = None

    def with_controls(self, controls: frozenset[str]) -> Evaluation:
        """The evaluation with these control domains."""
        bits = None if self.bits is None else replace(self.bits, controls=controls)
        return replace(self, nats=replace(self.nats, controls=controls), bits=bits)

    def held_out(self, unit: Unit) -> HeldOut:
        """The losses in a unit. Raises ValueError for bits per byte that were not recorded."""
        if unit is Unit.NATS:
            return self.nats
        if self.bits is None:
            raise ValueError("the evaluation has no bits per byte")
        return self.bits


def float_or_nan(value: Any) -> float:
    """Converts a JSON number to a float, Inf to NaN. Raises TypeError or OverflowError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{str(value)[:60]!r} is not a number")
    result = float(value)
    return result if math.isfinite(result) else math.nan


def iteration_of(row: Mapping[str, Any]) -> int:
    """Returns the iteration of a line. Raises KeyError if it is missing, ValueError if it is not a step number."""
    value = row["iteration"]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError(f"iteration {str(value)[:60]} is not an integer from 0 to 2^63 - 1")
    return value


def evaluation_of(row: Mapping[str, Any]) -> Evaluation:
    """Parses the evaluation in a line of metrics.jsonl. Raises one of MALFORMED if there is none."""
    nats = _held_out(row, "eval")
    if nats is None:
        raise ValueError("an evaluation without a loss")
    windows = row.get("eval_windows")
    if windows is not None:
        windows = {str(name): int(float_or_nan(value)) for name, value in windows.items()}
    return Evaluation(iteration_of(row), nats, _held_out(row, "eval_bpb"), windows)


def _held_out(row: Mapping[str, Any], key: str) -> HeldOut | None:
    """The losses under `key` and the entries whose names begin with it; None if there is no loss."""
    recorded = row.get(key) or {}
    losses = {str(name): float_or_nan(value) for name, value in recorded.items() if value is not None}
    if not losses:
        return None
    token_mean, intervals = row.get(f"{key}_token_mean"), row.get(f"{key}_interval") or {}
    return HeldOut(
        losses,
        None if token_mean is None else float_or_nan(token_mean),
        f"{key}_token_mean_interval" in row,
        {str(name): (float_or_nan(each[0]), float_or_nan(each[1])) for name, each in intervals.items() if each},
    )


class TextEntry(Schema):
    """A domain's held-out text, whatever tokenizer encoded it: its documents, their bytes, a hash of their sizes."""

    documents: Count
    bytes: Count
    sizes_sha256: Sha256


class EvaluationLine(Schema):
    """A line of evaluations.jsonl.

    Attributes:
        run: folder of the evaluated run; `of_this_folder` if evaluations.jsonl is in that folder.
        checkpoint, iteration: the evaluated checkpoint.
        held_out_content: hash of samples of the held-out tokens.
        held_out_text, tokenizer_sha256: missing in lines of early versions.
        eval, eval_bpb: losses in nats per token and, where the bytes of the text are known, in bits per byte.
    """

    FORMAT: ClassVar[str] = "megatron-doremi-evaluation/1"

    run: Name
    of_this_folder: bool
    checkpoint: Name
    iteration: Count
    eval: dict[str, float]
    eval_token_mean: float
    eval_windows: dict[str, Count]
    seq_length: Positive
    held_out_content: str
    bf16: bool
    held_out_text: dict[str, TextEntry] | None = None
    tokenizer_sha256: str | None = None
    eval_interval: dict[str, _IntervalEntry | None] | None = None
    eval_token_mean_interval: _IntervalEntry | None = None
    eval_bpb: dict[str, float] | None = None
    eval_bpb_token_mean: float | None = None
    eval_bpb_interval: dict[str, _IntervalEntry | None] | None = None
    eval_bpb_token_mean_interval: _IntervalEntry | None = None

    def evaluation(self) -> Evaluation:
        """The line's losses."""
        return evaluation_of(self.model_dump(exclude_unset=True))


def read_evaluations(folder: Path) -> list[EvaluationLine]:
    """Reads a folder's evaluations.jsonl, in order; skips lines torn by a full disk or a kill.

    Raises:
        ConfigError: the file cannot be read, or a line is JSON but not an evaluation.
    """
    path, lines = folder / FILE, []
    faults: list[Fault] = []
    for line_number, row, error in read_lines(path, "remove it, or give another folder", missing_ok=True):
        if error is not None:
            continue
        subject = f"{path}, line {line_number}"
        if not isinstance(row, dict) or not row.get("eval"):
            faults.append(Fault(subject, "", "must be an evaluation", "remove the line"))
            continue
        try:
            lines.append(check_entry(row, subject, EvaluationLine, "remove the line"))
        except ConfigError as invalid:
            faults += invalid.faults
    raise_if_any(faults)
    return lines
