"""The folder of the rounds: where each run is, what its finished rounds learned, and the files between rounds.

    FOLDER/round-1/seed-1/{reference,scores,proxy}      --save folders of the runs
    FOLDER/round-2/reference_weights.json               sampling weights of the references of round 2
    FOLDER/rounds.json                                  what each round learned, and the verdict
    FOLDER/domain_weights.json                          the learned weights, once the rounds have ended

Everything is computed from the runs' own files: a program that was killed in between computes the same again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from megatron_doremi.data.weights_file import WeightsEntry, save_weights, unfinished_faults
from megatron_doremi.errors import ConfigError, Fault, raise_if_any
from megatron_doremi.reporting.rounds import (
    ROUNDS_FILE,
    End,
    RoundEntry,
    RoundsEntry,
    read_rounds,
)
from megatron_doremi.reporting.runs import Run, read_all, read_run
from megatron_doremi.rounds.stop_rule import Floats, Movement, Source, movement, noise_of_halves, noise_of_seeds
from megatron_doremi.storage.files import atomic_write_text
from megatron_doremi.storage.formats import Name, Schema, read_checked

# Of weights that were normalized again.
_ROUNDING = 1e-6
_RUN_REMEDY = "run the stage again, or give the --save folder of the rounds"


class _SampledEntry(Schema):
    """The part of a run's config.json that names its sampling weights."""

    sampling_weights: dict[Name, Annotated[float, Field(gt=0.0, le=1.0)]]


@dataclass(frozen=True)
class RoundsFolder:
    """Paths in the folder of the rounds."""

    path: Path

    def run(self, number: int, seed: int, stage: str) -> Path:
        """The folder of a run: `stage` is reference, scores or proxy; `seed` counts from 1."""
        return self.path / f"round-{number}" / f"seed-{seed}" / stage

    def current_round(self) -> int:
        """The newest round that is to run; those before it have been judged."""
        number = 1
        while self.reference_weights(number + 1).exists():
            number += 1
        return number

    def reference_weights(self, number: int) -> Path:
        """The weights file of the references of a round after the first; it exists if that round is to run."""
        return self.path / f"round-{number}" / "reference_weights.json"

    @property
    def domain_weights(self) -> Path:
        """The learned weights, once the rounds have ended."""
        return self.path / "domain_weights.json"


@dataclass(frozen=True)
class StopRule:
    """When the rounds end, as given on the command line."""

    min_change: float
    max_rounds: int
    seeds: int


@dataclass(frozen=True)
class _Round:
    """What the runs of a round have left."""

    reference: dict[str, float]
    seeds: list[dict[str, float]]
    steps: Floats | None
    tokenizer_sha256: str | None

    def learned(self) -> Floats:
        """[n, k] weights of each seed."""
        return np.array([[weights[name] for name in self.reference] for weights in self.seeds])

    def mean(self) -> Floats:
        """[k] what the round has learned."""
        mean: Floats = self.learned().mean(axis=0)
        return mean

    def taught(self, sampling: Mapping[str, float]) -> bool:
        """Whether these are the sampling weights of the next round's references, but for rounding."""
        return np.allclose(self.mean(), [sampling[name] for name in self.reference], 0.0, _ROUNDING)


class _Noise:
    """The noise that the rounds so far show.

    Attributes:
        value: None after a first round of one seed.
        source: what shows it.
    """

    def __init__(self) -> None:
        self.value: float | None = None
        self.source: Source = "seeds"
        self._seeds: list[Floats] = []
        self._before: Floats | None = None

    def add(self, each: _Round) -> None:
        """Takes the next round into account."""
        if each.steps is None:
            self._seeds.append(each.learned())
            self.value = noise_of_seeds(self._seeds)
            return
        self.source = "halves"
        if self._before is not None and min(len(each.steps), len(self._before)) > 1:
            noise = noise_of_halves(each.steps, self._before)
            self.value = noise if self.value is None else min(noise, self.value)
        # Only two trajectories are in memory at a time.
        self._before = each.steps


def judge(folder: RoundsFolder, rule: StopRule) -> RoundsEntry:
    """Judges every round whose proxies exist, and writes rounds.json and either the weights of the next round's
    references or the learned weights.

    Raises:
        ConfigError: there is no round, or a run has not finished, is unreadable or has other domains.
    """
    recorded = recorded_rounds(folder, rule)
    entries: list[RoundEntry] = []
    latest: _Round | None = None
    noise = _Noise()
    ended: End | None = None
    while ended is None and _proxies_exist(folder, len(entries) + 1, rule.seeds):
        latest = _read_round(folder, len(entries) + 1, rule.seeds, latest)
        noise.add(latest)
        sampling, learned = np.array(list(latest.reference.values())), latest.mean()
        moved = movement(sampling, learned, noise.value, noise.source, rule.min_change)
        entries.append(_entry(len(entries) + 1, latest, moved))
        ended = "settled" if moved.settled else "max_rounds" if len(entries) >= rule.max_rounds else None
    if latest is None:
        missing = folder.run(1, 1, "proxy") / "domain_weights.json"
        raise ConfigError(Fault("--save", f"{missing} is missing", "a folder with a finished round", _RUN_REMEDY))
    rounds = RoundsEntry(
        settings={} if recorded is None else recorded.settings,
        min_change=rule.min_change,
        max_rounds=rule.max_rounds,
        seeds=rule.seeds,
        ended=ended,
        rounds=entries,
    )
    _write(folder, rounds, latest.tokenizer_sha256)
    return rounds


def start(folder: RoundsFolder, rule: StopRule, settings: Mapping[str, Any]) -> None:
    """Records the settings of the runs before the first one starts."""
    folder.path.mkdir(parents=True, exist_ok=True)
    write_rounds(folder, RoundsEntry(settings=dict(settings), ended=None, rounds=[], **vars(rule)))


def write_rounds(folder: RoundsFolder, rounds: RoundsEntry) -> None:
    """Writes rounds.json; floats in full precision."""
    entry = {"format": RoundsEntry.FORMAT, **rounds.model_dump()}
    atomic_write_text(folder.path / ROUNDS_FILE, json.dumps(entry, indent=2) + "\n")


def recorded_rounds(folder: RoundsFolder, rule: StopRule) -> RoundsEntry | None:
    """What rounds.json holds; None if there is none. Raises ConfigError, also if the rounds had another --seeds."""
    path = folder.path / ROUNDS_FILE
    if not path.exists():
        return None
    rounds = read_rounds(folder.path, "--save")
    if rounds.seeds != rule.seeds:
        remedy = "give that number, or another --save for new rounds"
        raise ConfigError(Fault("--seeds", str(rule.seeds), f"{rounds.seeds} as in {path}, in every round", remedy))
    return rounds


def _proxies_exist(folder: RoundsFolder, number: int, seeds: int) -> bool:
    """Whether the proxies of a round have begun to learn; a fault later if they have not finished."""
    paths = [folder.run(number, seed, "proxy") / "domain_weights.json" for seed in range(1, seeds + 1)]
    return all(path.exists() for path in paths)


def _read_round(folder: RoundsFolder, number: int, seeds: int, before: _Round | None) -> _Round:
    """Reads the runs of a round. Raises ConfigError with the faults of all of them.

    Args:
        before: the round before; None for the first.
    """
    learned = read_all([partial(_read_seed, folder, number, seed) for seed in range(1, seeds + 1)])
    first, reference = learned[0]
    expected = list(before.reference if before else first.weights)
    tokenizer = before.tokenizer_sha256 if before else first.tokenizer_sha256
    faults = []
    for seed, (entry, sampling) in enumerate(learned, 1):
        path = str(folder.run(number, seed, "proxy").parent)
        if {*entry.weights} != {*expected} or {*sampling} != {*expected}:
            faults.append(Fault(path, "other domains", f"the domains {', '.join(expected)} in each run", _RUN_REMEDY))
        elif sampling != reference:
            rule = "the sampling weights of seed 1 in each reference of a round"
            faults.append(Fault(path, "other sampling weights", rule, _RUN_REMEDY))
        elif before is not None and not before.taught(sampling):
            rule = f"the weights that round {number - 1} has learned, as the sampling weights of the reference"
            faults.append(Fault(path, "other sampling weights", rule, _RUN_REMEDY))
        if entry.tokenizer_sha256 != tokenizer:
            faults.append(Fault(path, "another tokenizer", "one data set for all rounds", _RUN_REMEDY))
    used = [entry.provenance.seed for entry, _ in learned if entry.provenance.seed is not None]
    if len(set(used)) < len(used):
        path = str(folder.run(number, 1, "proxy").parent.parent)
        listed = ", ".join(map(str, used))
        faults.append(Fault(path, f"proxies with --seed {listed}", "a seed of its own for each", _RUN_REMEDY))
    raise_if_any(faults)
    # With several seeds, their spread gives the noise, and the steps of the proxies are not read.
    run = read_run(folder.run(number, 1, "proxy"), "--save") if seeds == 1 else None
    return _Round(
        {name: reference[name] for name in expected},
        [{name: entry.weights[name] for name in expected} for entry, _ in learned],
        None if run is None else _steps(run, expected),
        tokenizer,
    )


def _read_seed(folder: RoundsFolder, number: int, seed: int) -> tuple[WeightsEntry, dict[str, float]]:
    """What a proxy has learned, and the sampling weights of its reference."""
    path = folder.run(number, seed, "proxy") / "domain_weights.json"
    entry = read_checked(path, str(path), WeightsEntry, _RUN_REMEDY)
    raise_if_any(unfinished_faults(str(path), entry.provenance))
    return entry, _sampling_weights(folder.run(number, seed, "reference"))


def _sampling_weights(path: Path) -> dict[str, float]:
    """The weights by which a run samples, by domain."""
    subject = str(path / "config.json")
    recorded = read_checked(path / "config.json", subject, _SampledEntry, _RUN_REMEDY).sampling_weights
    if abs(math.fsum(recorded.values()) - 1.0) > _ROUNDING:
        value = f"sampling_weights of sum {math.fsum(recorded.values()):.6g}"
        raise ConfigError(Fault(subject, value, "sum 1", _RUN_REMEDY))
    return recorded


def _steps(run: Run, names: Sequence[str]) -> Floats:
    """[steps, k] weights at each step of a proxy."""
    values = run.weights.ordered(names)
    return values[np.isfinite(values).all(axis=1)]


def _entry(number: int, each: _Round, moved: Movement) -> RoundEntry:
    names = list(each.reference)
    return RoundEntry(
        round=number,
        reference_weights=each.reference,
        weights=dict(zip(names, each.mean().tolist(), strict=True)),
        seed_weights=each.seeds,
        change=moved.change,
        most_moved=names[moved.domain],
        noise=moved.noise,
        noise_from=moved.noise_from,
        threshold=moved.threshold,
    )


def _write(folder: RoundsFolder, rounds: RoundsEntry, tokenizer_sha256: str | None) -> None:
    """Writes rounds.json, after the weights that it announces."""
    last = rounds.rounds[-1]
    path = folder.domain_weights if rounds.ended else folder.reference_weights(last.round + 1)
    provenance = {
        "method": f"doremi, round {last.round}",
        "seeds": rounds.seeds,
        "change": last.change,
        "noise": last.noise,
        "settled": rounds.ended == "settled",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_weights(path, last.weights, tokenizer_sha256, provenance)
    if not rounds.ended:
        # Of rounds that ended under another rule.
        folder.domain_weights.unlink(missing_ok=True)
    write_rounds(folder, rounds)
