"""Reads held-out losses: the evaluation lines of metrics.jsonl, and evaluations.jsonl.

`--phase evaluate` appends to the latter, in any folder: one line per evaluation, of any number of runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from megatron_doremi.errors import ConfigError, Fault, raise_if_any
from megatron_doremi.reporting.json_files import read_lines
from megatron_doremi.storage.formats import Count, Name, Positive, Schema, check_entry

FILE = "evaluations.jsonl"


@dataclass(frozen=True)
class Evaluation:
    """One evaluation on held-out text; losses in nats per token.

    Attributes:
        iteration: training steps taken before it.
        losses: held-out loss by domain; NaN where the run recorded NaN or Inf.
        token_mean: mean over all held-out tokens; None if the line has none.
        windows: windows read of each domain; None if the line does not record them.
    """

    iteration: int
    losses: dict[str, float]
    token_mean: float | None
    windows: dict[str, int] | None = None

    @property
    def uniform_mean(self) -> float:
        """Unweighted mean over domains, in nats per token; NaN if any domain's loss is."""
        return sum(self.losses.values()) / len(self.losses)

    @property
    def worst(self) -> tuple[str, float]:
        """The domain with the highest loss, and that loss in nats per token; NaN only if every loss is."""
        name = max(self.losses, key=lambda domain: -math.inf if math.isnan(loss := self.losses[domain]) else loss)
        return name, self.losses[name]


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
    losses = {str(name): float_or_nan(value) for name, value in row["eval"].items() if value is not None}
    if not losses:
        raise ValueError("an evaluation without a loss")
    token_mean, windows = row.get("eval_token_mean"), row.get("eval_windows")
    if windows is not None:
        windows = {str(name): int(float_or_nan(value)) for name, value in windows.items()}
    return Evaluation(iteration_of(row), losses, None if token_mean is None else float_or_nan(token_mean), windows)


class EvaluationLine(Schema):
    """A line of evaluations.jsonl.

    Attributes:
        run: folder of the evaluated run; `of_this_folder` if evaluations.jsonl is in that folder.
        checkpoint, iteration: the evaluated checkpoint.
        held_out_content: hash of samples of the held-out text.
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

    def evaluation(self) -> Evaluation:
        """The line's losses."""
        return Evaluation(self.iteration, self.eval, self.eval_token_mean, self.eval_windows)


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
