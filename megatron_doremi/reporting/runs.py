"""Reads what a run left on disk, as data: metrics.jsonl, config.json, domain_weights.json, the manifest.

Nothing here imports torch: a report can be made on a laptop from folders copied off a cluster, without the
checkpoints and without the training data. Metrics are kept by column, since a proxy writes a line a step and
200,000 lines as dictionaries would fill a laptop's memory.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron_doremi.errors import MALFORMED, ConfigError, Fault, raise_if_any
from megatron_doremi.reporting.evaluations import (
    FILE,
    Evaluation,
    EvaluationLine,
    evaluation_of,
    number,
    read_evaluations,
    step,
)

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
T = TypeVar("T")

SCALARS = ("loss", "lr", "grad_norm", "dro_loss", "consumed_tokens", "tokens_per_second")
MAX_DEPTH = 50
PHASES = ("reference", "score", "proxy", "main", "evaluate")


@dataclass(frozen=True)
class Series:
    """One quantity per domain over the training lines.

    Attributes:
        names: domains, in the order they first appear in the file.
        values: [lines, domains]; NaN where a line lacks the domain.
    """

    names: tuple[str, ...]
    values: Floats

    def ordered(self, names: Sequence[str]) -> Floats:
        """Returns [lines, len(names)] in the order of `names`; NaN for a domain that is not here."""
        position = {name: column for column, name in enumerate(self.names)}
        missing = np.full(self.values.shape[0], np.nan)
        columns = [self.values[:, position[name]] if name in position else missing for name in names]
        return np.stack(columns, axis=1) if columns else np.empty((self.values.shape[0], 0))


@dataclass(frozen=True)
class Run:
    """A --save folder, read.

    Attributes:
        path: the folder, as the user gave it.
        phase: reference, score, proxy, main, evaluate, or "unknown" where config.json does not say.
        config: config.json.
        iterations: [lines] training step of each training line, ascending.
        scalars: [lines] by name, NaN where absent: see SCALARS.
        loss: training loss by domain in nats a token.
        excess: clipped excess over the reference by domain (lambda_t) in nats a token; a proxy's only.
        weights: domain weights (alpha_t); a proxy's only.
        evaluations: ascending by iteration.
        recorded_weights: the weights of domain_weights.json, None where there is no such file.
        weights_provenance: its provenance entry.
    """

    path: Path
    phase: str
    config: dict[str, Any]
    iterations: Integers
    scalars: dict[str, Floats]
    loss: Series
    excess: Series
    weights: Series
    evaluations: tuple[Evaluation, ...]
    recorded_weights: dict[str, float] | None
    weights_provenance: dict[str, Any]

    @property
    def has_weights(self) -> bool:
        """Whether the training lines carry domain weights, as a proxy's do."""
        return bool(np.isfinite(self.weights.values).any())

    def domain_names(self) -> tuple[str, ...]:
        """Every domain that any line names; the most complete source decides the order."""
        evaluated = self.evaluations[-1].losses if self.evaluations else {}
        return tuple(dict.fromkeys([*self.weights.names, *evaluated, *self.loss.names]))


class _Columns:
    """Rows of {name: number}, kept by column; NaN where a row has no finite number for a name."""

    def __init__(self) -> None:
        self.rows = 0
        self.columns: dict[str, array[float]] = {}

    def append(self, row: Mapping[str, Any]) -> None:
        numbers = {name: math.nan if value is None else number(value) for name, value in row.items()}
        for name, each in numbers.items():
            if name not in self.columns:
                self.columns[name] = array("d", [math.nan]) * self.rows
            self.columns[name].append(each)
        self.rows += 1
        for column in self.columns.values():
            if len(column) < self.rows:
                column.append(math.nan)

    def series(self, keep: Integers) -> Series:
        values = [np.frombuffer(column, dtype=np.float64)[keep] for column in self.columns.values()]
        stacked = np.stack(values, axis=1) if values else np.empty((len(keep), 0))
        return Series(tuple(self.columns), stacked)


@dataclass(frozen=True)
class _Metrics:
    """metrics.jsonl by column; fields as in Run."""

    iterations: Integers
    scalars: dict[str, Floats]
    loss: Series
    excess: Series
    weights: Series
    evaluations: tuple[Evaluation, ...]


def read_all(readers: Iterable[Callable[[], T]]) -> list[T]:
    """Calls every reader and raises one ConfigError with the faults of all of them."""
    results: list[T] = []
    faults: list[Fault] = []
    for reader in readers:
        try:
            results.append(reader())
        except ConfigError as error:
            faults.extend(error.faults)
    raise_if_any(faults)
    return results


def read_runs(path: Path, what: str = "RUN") -> list[Run]:
    """Reads a --save folder: its own run, if it holds one, and every other run that was evaluated into it.

    Args:
        path: the folder.
        what: how the user named it on the command line, for messages.
    """
    if not path.is_dir():
        remedy = "give the --save folder of a run of pretrain_doremi.py"
        raise ConfigError(Fault(what, str(path), "must be an existing folder", remedy))
    lines = read_evaluations(path)
    own = [line.evaluation() for line in lines if line.of_this_folder]
    others: dict[str, list[EvaluationLine]] = {}
    for line in lines:
        if not line.of_this_folder:
            others.setdefault(line.run, []).append(line)
    runs = [_evaluated(Path(name), each) for name, each in others.items()]
    if (path / "metrics.jsonl").exists() or (path / "config.json").exists() or not runs:
        runs.insert(0, _read_trained(path, own))
    return runs


def read_run(path: Path, what: str = "RUN") -> Run:
    """Reads a --save folder that is to hold one run: its own, or the only one that was evaluated into it."""
    first, *rest = read_runs(path, what)
    if rest and first.phase == "evaluate":
        names = ", ".join(str(run.path) for run in (first, *rest))
        raise ConfigError(Fault(what, f"{path / FILE}: {names}", "must be of one run", "give the folder of one run"))
    return first


def _evaluated(path: Path, lines: Sequence[EvaluationLine]) -> Run:
    """A run of which only evaluations are at hand."""
    newest = max(lines, key=lambda line: line.iteration)
    config = {key: getattr(newest, key) for key in ("checkpoint", "seq_length", "held_out_content", "bf16")}
    evaluations = {line.iteration: line.evaluation() for line in lines}
    none = Series((), np.empty((0, 0)))
    history = tuple(evaluations[iteration] for iteration in sorted(evaluations))
    return Run(path, "evaluate", config, np.empty(0, np.int64), {}, none, none, none, history, None, {})


def _read_trained(path: Path, evaluated: Sequence[Evaluation]) -> Run:
    """A run's own folder; `evaluated` after training, which counts before what training wrote at the same step."""
    config = _read_json_object(path / "config.json", "give the folder that the run got as --save")
    metrics = _read_metrics(path / "metrics.jsonl")
    history = {each.iteration: each for each in (*metrics.evaluations, *evaluated)}
    weights_file = path / "domain_weights.json"
    recorded, provenance = (None, {}) if not weights_file.is_file() else _read_weights(weights_file)
    return Run(
        path,
        find_phase(config),
        config,
        metrics.iterations,
        metrics.scalars,
        metrics.loss,
        metrics.excess,
        metrics.weights,
        tuple(history[iteration] for iteration in sorted(history)),
        recorded,
        provenance,
    )


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turns nested objects into {"a.b": value}; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def find_phase(config: Mapping[str, Any]) -> str:
    """Returns the phase that config.json records, at the top or in a group; "unknown" without one."""
    flat = flatten(config)
    for key in sorted(flat, key=lambda each: each.count(".")):
        if key.rsplit(".", 1)[-1] == "phase" and flat[key] in PHASES:
            return str(flat[key])
    return "unknown"


def find_number(config: Mapping[str, Any], leaf: str) -> float | None:
    """Returns the first number whose key, without its groups, is `leaf` or ends in "_`leaf`"."""
    for key, value in flatten(config).items():
        name = key.rsplit(".", 1)[-1]
        if (name == leaf or name.endswith(f"_{leaf}")) and isinstance(value, int | float):
            return float(value)
    return None


def _depth(document: Any) -> int:
    """Levels of nesting, without recursion."""
    level, depth = [document], 0
    while level:
        level = [
            each
            for value in level
            if isinstance(value, dict | list)
            for each in (value.values() if isinstance(value, dict) else value)
        ]
        depth += 1
    return depth


def _read_text(path: Path, remedy: str) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(Fault(str(path), error.strerror or "", "must be a readable file", remedy)) from error


def _read_json_object(path: Path, remedy: str) -> dict[str, Any]:
    text = _read_text(path, remedy)
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(Fault(str(path), str(error), "must be JSON", remedy)) from error
    if _depth(document) > MAX_DEPTH:
        raise ConfigError(Fault(str(path), "", f"must not be nested deeper than {MAX_DEPTH} levels", remedy))
    if not isinstance(document, dict):
        raise ConfigError(Fault(str(path), type(document).__name__, "must be a JSON object", remedy))
    return document


def _read_weights(path: Path) -> tuple[dict[str, float], dict[str, Any]]:
    remedy = "remove the file: the report then takes the mean of the weights in metrics.jsonl"
    document = _read_json_object(path, remedy)
    try:
        weights = {str(name): number(value) for name, value in document["weights"].items()}
        if not math.isclose(sum(weights.values()), 1.0, rel_tol=1e-6) or min(weights.values()) < 0.0:
            raise ValueError(f"weights with sum {sum(weights.values()):g}")
    except MALFORMED as error:
        rule = 'needs "weights": {NAME: number}, not negative, with sum 1'
        raise ConfigError(Fault(str(path), str(error), rule, remedy)) from error
    provenance = document.get("provenance")
    return weights, provenance if isinstance(provenance, dict) else {}


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number, object); a last line that does not parse is torn (a killed run) and left out."""
    torn: tuple[int, str] | None = None
    try:
        file = path.open(encoding="utf-8", errors="replace")
    except OSError as error:
        remedy = "give the --save folder of a run that has reached its first log interval"
        raise ConfigError(Fault(str(path), error.strerror or "", "must be a readable file", remedy)) from error
    with file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            if torn is not None:
                raise ConfigError(_bad_line(path, *torn))
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                torn = (number, str(error))
                continue
            if not isinstance(row, dict):
                torn = (number, f"a JSON {type(row).__name__}")
                continue
            yield number, row


def _bad_line(path: Path, number: int, problem: str) -> Fault:
    rule = "every line but the last must be a metrics line: one JSON object with numbers"
    return Fault(f"{path}, line {number}", problem, rule, "remove the line")


def _read_metrics(path: Path) -> _Metrics:
    scalars, loss, excess, weights = _Columns(), _Columns(), _Columns(), _Columns()
    iterations: array[int] = array("q")
    evaluations: dict[int, Evaluation] = {}
    for place, row in _json_lines(path):
        try:
            iteration = step(row)
            if row.get("eval"):
                evaluations[iteration] = evaluation_of(row)
            if "loss" in row:
                scalars.append({name: row.get(name) for name in SCALARS})
                loss.append(row.get("domain_loss") or {})
                excess.append(row.get("domain_excess") or {})
                weights.append(row.get("domain_weights") or {})
                iterations.append(iteration)
        except MALFORMED as error:
            raise ConfigError(_bad_line(path, place, f"{type(error).__name__}: {error}")) from error
    if not iterations and not evaluations:
        remedy = "wait for the run's first log interval, or give another run"
        raise ConfigError(Fault(str(path), "", "needs at least one training or evaluation line", remedy))
    steps = np.array(iterations, dtype=np.int64)
    keep = _last_of_each(steps)
    columns = scalars.series(keep)
    return _Metrics(
        steps[keep],
        {name: columns.values[:, index] for index, name in enumerate(columns.names)},
        loss.series(keep),
        excess.series(keep),
        weights.series(keep),
        tuple(evaluations[iteration] for iteration in sorted(evaluations)),
    )


def _last_of_each(iterations: Integers) -> Integers:
    """Returns the positions of each iteration's last line, ascending by iteration.

    A run does not repeat an iteration, but a folder that was restored by hand can; the later line counts.
    """
    _, from_the_end = np.unique(iterations[::-1], return_index=True)
    return (len(iterations) - 1 - from_the_end).astype(np.int64)
