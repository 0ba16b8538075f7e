"""Reads the files of a run's folder: metrics.jsonl, config.json, domain_weights.json.

Nothing here imports torch: a report can be made on a laptop from folders copied off a cluster, without checkpoints
and training data. Metrics are stored by column: a proxy writes a line at every step, and 200,000 lines as dictionaries
would not fit in a laptop's memory.
"""

from __future__ import annotations

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
    float_or_nan,
    iteration_of,
    read_evaluations,
)
from megatron_doremi.reporting.json_files import read_lines, read_object

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
T = TypeVar("T")

# Of config.json and of an evaluation: what the held-out text is, whatever tokenizer encoded it.
TEXT = "held_out_text"
SCALARS = ("loss", "lr", "grad_norm", "dro_loss", "consumed_tokens", "tokens_per_second", "elapsed_ms")
PHASES = ("reference", "score", "proxy", "main", "evaluate")


@dataclass(frozen=True)
class Series:
    """One quantity per domain over the training lines.

    Attributes:
        names: domains, in the order in which they first appear in the file.
        values: [lines, domains]; NaN where a line has no value for the domain.
    """

    names: tuple[str, ...]
    values: Floats

    def ordered(self, names: Sequence[str]) -> Floats:
        """Returns [lines, len(names)] in the order of `names`; NaN for a domain that is missing."""
        position = {name: column for column, name in enumerate(self.names)}
        missing = np.full(self.values.shape[0], np.nan)
        columns = [self.values[:, position[name]] if name in position else missing for name in names]
        return np.stack(columns, axis=1) if columns else np.empty((self.values.shape[0], 0))


@dataclass(frozen=True)
class Run:
    """The contents of a --save folder.

    Attributes:
        path: the folder, as given on the command line.
        phase: reference, score, proxy, main, evaluate, or "unknown" if config.json does not record it.
        config: config.json.
        iterations: [lines] training step of each training line, ascending.
        scalars: [lines] by name, NaN where missing; see SCALARS.
        loss: training loss by domain in nats per token.
        excess: clipped excess over the reference by domain (lambda_t) in nats per token; a proxy's only.
        score: the same of a proxy whose weights another objective drives.
        weights: domain weights (alpha_t); a proxy's only.
        evaluations: ascending by iteration.
        recorded_weights: the weights of domain_weights.json; None if there is no such file.
        weights_provenance: its provenance.
    """

    path: Path
    phase: str
    config: dict[str, Any]
    iterations: Integers
    scalars: dict[str, Floats]
    loss: Series
    excess: Series
    score: Series
    weights: Series
    evaluations: tuple[Evaluation, ...]
    recorded_weights: dict[str, float] | None
    weights_provenance: dict[str, Any]

    @property
    def seed(self) -> int | None:
        """--seed; None if config.json does not record it."""
        seed = find_number(self.config, "seed")
        return None if seed is None else int(seed)

    @property
    def last_step(self) -> int:
        """The last step that a training or evaluation line records."""
        trained = int(self.iterations[-1]) if self.iterations.size else 0
        return max(trained, self.evaluations[-1].iteration if self.evaluations else 0)

    @property
    def sampling_weights(self) -> dict[str, float] | None:
        """The weights by which the run samples its domains; None if config.json does not record them."""
        recorded = self.config.get("sampling_weights")
        if not isinstance(recorded, dict) or not recorded:
            return None
        weights = {str(name): weight for name, weight in recorded.items() if isinstance(weight, int | float)}
        return weights if len(weights) == len(recorded) else None

    @property
    def held_out_text(self) -> dict[str, Any]:
        """The documents, bytes and hash of sizes of each domain's held-out text; {} if they are not recorded."""
        recorded = self.config.get(TEXT)
        entries = recorded.items() if isinstance(recorded, dict) else ()
        keys = ("documents", "bytes")
        return {
            n: each for n, each in entries if isinstance(each, dict) and all(type(each.get(k)) is int for k in keys)
        }

    @property
    def has_weights(self) -> bool:
        """Whether the training lines record domain weights, as a proxy's do."""
        return bool(np.isfinite(self.weights.values).any())

    def domain_names(self) -> tuple[str, ...]:
        """Every domain in any line, in the order of the most complete source."""
        evaluated = self.evaluations[-1].nats.losses if self.evaluations else {}
        return tuple(dict.fromkeys([*self.weights.names, *evaluated, *self.loss.names]))


class _Columns:
    """Rows of {name: number}, stored by column; NaN where a row has no finite number for a name."""

    def __init__(self) -> None:
        self.rows = 0
        self.columns: dict[str, array[float]] = {}

    def append(self, row: Mapping[str, Any]) -> None:
        numbers = {name: math.nan if value is None else float_or_nan(value) for name, value in row.items()}
        for name, value in numbers.items():
            if name not in self.columns:
                self.columns[name] = array("d", [math.nan]) * self.rows
            self.columns[name].append(value)
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
    """The contents of metrics.jsonl, with the fields of Run."""

    iterations: Integers
    scalars: dict[str, Floats]
    loss: Series
    excess: Series
    score: Series
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


def read_runs(path: Path, flag: str = "RUN") -> list[Run]:
    """Reads a --save folder: the run trained in it, if any, and every other run whose evaluations it holds.

    Args:
        path: the folder.
        flag: the argument that gave it, for messages.

    Raises:
        ConfigError: the folder is missing, or one of its files cannot be read.
    """
    if not path.is_dir():
        remedy = "give the --save folder of a run of pretrain_doremi.py"
        raise ConfigError(Fault(flag, str(path), "must be an existing folder", remedy))
    lines = read_evaluations(path)
    after_training = [line for line in lines if line.of_this_folder]
    others: dict[str, list[EvaluationLine]] = {}
    for line in lines:
        if not line.of_this_folder:
            others.setdefault(line.run, []).append(line)
    runs = [_evaluated(Path(name), run_lines) for name, run_lines in others.items()]
    if (path / "metrics.jsonl").exists() or (path / "config.json").exists() or not runs:
        runs.insert(0, _read_trained(path, after_training))
    return runs


def read_run(path: Path, flag: str = "RUN") -> Run:
    """Reads a --save folder of one run: the one trained in it, or the only one whose evaluations it holds."""
    first, *rest = read_runs(path, flag)
    if rest and first.phase == "evaluate":
        names = ", ".join(str(run.path) for run in (first, *rest))
        raise ConfigError(Fault(flag, f"{path / FILE}: {names}", "must be of one run", "give the folder of one run"))
    return first


def _evaluated(path: Path, lines: Sequence[EvaluationLine]) -> Run:
    """A run of which only the evaluations are known."""
    newest = _newest(lines)
    names = ("checkpoint", "seq_length", "held_out_content", "bf16", "tokenizer_sha256")
    config = {key: getattr(newest, key) for key in names} | _text_of(newest)
    evaluations = {line.iteration: line.evaluation() for line in lines}
    empty = Series((), np.empty((0, 0)))
    history = tuple(evaluations[iteration] for iteration in sorted(evaluations))
    return Run(path, "evaluate", config, np.empty(0, np.int64), {}, empty, empty, empty, empty, history, None, {})


def _text_of(line: EvaluationLine) -> dict[str, Any]:
    """The entry `held_out_text` of config.json of an evaluation; its value is None if the line has none."""
    return {TEXT: line.model_dump(include={TEXT})[TEXT]}


def _newest(lines: Sequence[EvaluationLine]) -> EvaluationLine:
    """The evaluation that counts: of the last step, and of several at that step the last line."""
    return max(reversed(lines), key=lambda line: line.iteration)


def _read_trained(path: Path, after_training: Sequence[EvaluationLine]) -> Run:
    """A run's own folder; evaluations `after_training` replace those that training wrote at the same step."""
    config = read_object(path / "config.json", "give the --save folder of a run")
    metrics = _read_metrics(path / "metrics.jsonl")
    later = [line.evaluation() for line in after_training]
    history = {evaluation.iteration: evaluation for evaluation in (*metrics.evaluations, *later)}
    if after_training and _newest(after_training).iteration == max(history):
        # The text that was read may be another one than that of training.
        newest = _newest(after_training)
        config = {**config, "held_out_content": newest.held_out_content, **_text_of(newest)}
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
        metrics.score,
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
    """Returns the phase that config.json records, at the top level or in a group; "unknown" if there is none."""
    flat = flatten(config)
    for key in sorted(flat, key=lambda key: key.count(".")):
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


def _read_weights(path: Path) -> tuple[dict[str, float], dict[str, Any]]:
    remedy = "remove the file: the report then uses the mean of the weights in metrics.jsonl"
    document = read_object(path, remedy)
    try:
        weights = {str(name): float_or_nan(value) for name, value in document["weights"].items()}
        if not math.isclose(sum(weights.values()), 1.0, rel_tol=1e-6) or min(weights.values()) < 0.0:
            raise ValueError(f"weights with sum {sum(weights.values()):g}")
    except MALFORMED as error:
        rule = 'needs "weights": {NAME: number}, nonnegative, with sum 1'
        raise ConfigError(Fault(str(path), str(error), rule, remedy)) from error
    provenance = document.get("provenance")
    return weights, provenance if isinstance(provenance, dict) else {}


def _metrics_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number, object); skips a last line that is not an object, which a killed run has torn."""
    torn: Fault | None = None
    remedy = "give the --save folder of a run that has reached its first log interval"
    for line_number, row, error in read_lines(path, remedy):
        if torn is not None:
            raise ConfigError(torn)
        if isinstance(row, dict):
            yield line_number, row
        else:
            torn = _bad_line(path, line_number, error or f"a JSON {type(row).__name__}")


def _bad_line(path: Path, line_number: int, problem: str) -> Fault:
    rule = "every line but the last must be a metrics line: one JSON object with numbers"
    return Fault(f"{path}, line {line_number}", problem, rule, "remove the line")


def _read_metrics(path: Path) -> _Metrics:
    scalars, loss, excess, score, weights = _Columns(), _Columns(), _Columns(), _Columns(), _Columns()
    iterations: array[int] = array("q")
    evaluations: dict[int, Evaluation] = {}
    for line_number, row in _metrics_lines(path):
        try:
            iteration = iteration_of(row)
            if row.get("eval"):
                evaluations[iteration] = evaluation_of(row)
            if "loss" in row:
                scalars.append({name: row.get(name) for name in SCALARS})
                loss.append(row.get("domain_loss") or {})
                excess.append(row.get("domain_excess") or {})
                score.append(row.get("domain_score") or {})
                weights.append(row.get("domain_weights") or {})
                iterations.append(iteration)
        except MALFORMED as error:
            raise ConfigError(_bad_line(path, line_number, f"{type(error).__name__}: {error}")) from error
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
        score.series(keep),
        weights.series(keep),
        tuple(evaluations[iteration] for iteration in sorted(evaluations)),
    )


def _last_of_each(iterations: Integers) -> Integers:
    """Returns the index of each iteration's last line, ascending by iteration.

    A run does not repeat an iteration, but a folder restored by hand may; the later line counts.
    """
    _, from_the_end = np.unique(iterations[::-1], return_index=True)
    return (len(iterations) - 1 - from_the_end).astype(np.int64)
