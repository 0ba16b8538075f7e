"""Held-out losses as runs leave them: lines of metrics.jsonl, and of evaluations.jsonl.

`--phase evaluate` appends to the latter, in any folder: a line an evaluation, of any number of runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from megatron_doremi.errors import ConfigError, Fault, raise_if_any
from megatron_doremi.storage.formats import Count, Name, Positive, Schema, check_entry

FILE = "evaluations.jsonl"


@dataclass(frozen=True)
class Evaluation:
    """One evaluation on held-out text; losses in nats a token.

    Attributes:
        iteration: training step after which it was made.
        losses: held-out loss by domain; NaN where the run wrote no finite number.
        token_mean: mean over all held-out tokens, None where the line has none.
        windows: windows that were read of each domain, None where the line does not say.
    """

    iteration: int
    losses: dict[str, float]
    token_mean: float | None
    windows: dict[str, int] | None = None

    @property
    def uniform_mean(self) -> float:
        """Mean over domains, each counting alike, in nats a token; NaN where one has no finite loss."""
        return sum(self.losses.values()) / len(self.losses)

    @property
    def worst(self) -> tuple[str, float]:
        """The domain with the highest loss, and that loss in nats a token."""
        name = max(self.losses, key=lambda each: -math.inf if math.isnan(self.losses[each]) else self.losses[each])
        return name, self.losses[name]


def number(value: Any) -> float:
    """A JSON number as a float, NaN for one that is NaN or Inf. Raises TypeError or OverflowError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{str(value)[:60]!r} is not a number")
    result = float(value)
    return result if math.isfinite(result) else math.nan


def step(row: Mapping[str, Any]) -> int:
    """The iteration of a line. Raises KeyError or ValueError where it is missing or not a step number."""
    value = row["iteration"]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError(f"iteration {str(value)[:60]} is not an integer from 0 to 2^63 - 1")
    return value


def evaluation_of(row: Mapping[str, Any]) -> Evaluation:
    """The evaluation that a line of metrics.jsonl holds. Raises one of MALFORMED where it holds none."""
    losses = {str(name): number(value) for name, value in row["eval"].items() if value is not None}
    if not losses:
        raise ValueError("an evaluation without a loss")
    token_mean, windows = row.get("eval_token_mean"), row.get("eval_windows")
    if windows is not None:
        windows = {str(name): int(number(value)) for name, value in windows.items()}
    return Evaluation(step(row), losses, None if token_mean is None else number(token_mean), windows)


class EvaluationLine(Schema):
    """A line of evaluations.jsonl.

    Attributes:
        run: folder of the run whose model was evaluated; `of_this_folder` where the file lies in it.
        checkpoint, iteration: which of its checkpoints.
        held_out_content: hash of the held-out text, sampled.
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
        """Its losses."""
        return Evaluation(self.iteration, self.eval, self.eval_token_mean, self.eval_windows)


def read_evaluations(folder: Path) -> list[EvaluationLine]:
    """The lines of a folder's evaluations.jsonl, in order; lines that a full disk or a kill has torn are left out.

    Raises:
        ConfigError: the file cannot be read, or a line is JSON but not an evaluation.
    """
    path, lines = folder / FILE, []
    faults: list[Fault] = []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        fault = Fault(str(path), error.strerror or "", "must be a readable file", "remove it, or give another folder")
        raise ConfigError(fault) from error
    for place, line in enumerate(text.split("\n"), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        try:
            if not isinstance(row, dict) or not row.get("eval"):
                raise ConfigError(Fault(f"{path}, line {place}", "", "must be an evaluation", "remove the line"))
            lines.append(check_entry(row, f"{path}, line {place}", EvaluationLine, "remove the line"))
        except ConfigError as error:
            faults += error.faults
    raise_if_any(faults)
    return lines
