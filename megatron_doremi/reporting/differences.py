"""Differences between the runs of a report: model shape, sequence length, data, precision, held-out windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_doremi.config import OPTIMIZER_NAMES
from megatron_doremi.data.manifest import similar_names
from megatron_doremi.reporting.runs import Run, flatten
from megatron_doremi.shapes import with_defaults

SEED = "seed"
# Also records where a run branched from another.
OVERRIDES = "settings changed on resuming"
# The names of values of config.json, by the last part of the key.
PROPERTIES = {
    "seq_length": "sequence length",
    "tokenizer_sha256": "tokenizer",
    "data_fingerprint": "data fingerprint",
    "data_content": "training text",
    "held_out_content": "held-out text",
    "bf16": "bfloat16",
    "seed": SEED,
    "global_batch_size": "global batch size",
    "train_iters": "training steps",
    "init_from": "initial weights",
    "overrides": OVERRIDES,
    "torch": "version of torch",
    "deepspeed": "version of deepspeed",
    **{name: name for name in OPTIMIZER_NAMES},
}
WINDOWS = "held-out windows"
STEP = "evaluated step"
# Runs that differ in one of these were evaluated on different text.
DECISIVE = ("held-out text", WINDOWS, "sequence length", "tokenizer")
_SHOWN_DOMAINS = 3


@dataclass(frozen=True)
class Difference:
    """A property in which runs differ.

    Attributes:
        name: of the property.
        values: as text, by the run's label; runs that do not record the property are missing.
    """

    name: str
    values: dict[str, str]

    @property
    def decisive(self) -> bool:
        """Whether the runs were evaluated on different text."""
        return self.name in DECISIVE

    def sentence(self, subject: str = "The runs") -> str:
        """The difference as a sentence of the report."""
        listed = ", ".join(f"{label} {value}" for label, value in self.values.items())
        warning = " Their held-out losses cannot be compared." if self.decisive else ""
        return f"{subject} differ in {self.name}: {listed}.{warning}"


def differences(runs: Mapping[str, Run]) -> tuple[Difference, ...]:
    """The properties that at least two runs record with different values."""
    recorded_by = {label: properties(run) for label, run in runs.items()}
    names = dict.fromkeys(name for recorded in recorded_by.values() for name in recorded)
    differing = []
    for name in names:
        values = {label: recorded[name] for label, recorded in recorded_by.items() if recorded.get(name) is not None}
        if any(value != next(iter(values.values())) for value in values.values()):
            differing.append(Difference(name, {label: _shortened(value) for label, value in values.items()}))
    return (*differing, *_window_differences(runs))


def step_differences(runs: Mapping[str, Run]) -> tuple[Difference, ...]:
    """The steps of the last evaluations, if they differ: a run was killed, or has not ended yet."""
    steps = {label: run.evaluations[-1].iteration for label, run in runs.items() if run.evaluations}
    if len(set(steps.values())) < 2:
        return ()
    return (Difference(STEP, {label: f"{step:,}" for label, step in steps.items()}),)


def similar_names_note(names: Sequence[str]) -> str | None:
    """A sentence about domain names that differ only by case or spaces, if there are any."""
    similar = [repr(name) for group in similar_names(names) for name in group]
    return f"Domain names that differ only by case or spaces: {', '.join(similar)}." if similar else None


def properties(run: Run) -> dict[str, Any]:
    """The compared properties of a run as config.json records them; the model's shape takes its missing defaults."""
    shape = run.config.get("gpt")
    config = {**run.config, "gpt": with_defaults(shape)} if isinstance(shape, dict) else run.config
    flat = flatten(config)
    recorded = {key.removeprefix("gpt."): value for key, value in flat.items() if key.startswith("gpt.")}
    # The identity repeats most values; where they differ, another place wins, and of those the one with fewest groups.
    for key in sorted(flat, key=lambda key: (key.startswith("identity."), key.count(".")), reverse=True):
        name = PROPERTIES.get(key.rsplit(".", 1)[-1])
        if name is not None:
            recorded[name] = _without_own_folder(flat[key]) if name == OVERRIDES else flat[key]
    return recorded


def _without_own_folder(overrides: Any) -> Any:
    """The recorded overrides; an entry on a branch names the run's own folder, in which every two runs differ."""
    if not isinstance(overrides, list):
        return overrides
    entries = [entry if isinstance(entry, dict) else {} for entry in overrides]
    return [{k: v for k, v in entry.items() if entry.get("name") != "branch" or k != "now"} for entry in entries]


def _shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}..."


def _window_differences(runs: Mapping[str, Run]) -> list[Difference]:
    """The numbers of windows that the last evaluations read, if they differ for a domain."""
    newest = {label: run.evaluations[-1].windows for label, run in runs.items() if run.evaluations}
    recorded = {label: windows for label, windows in newest.items() if windows is not None}
    names = dict.fromkeys(name for windows in recorded.values() for name in windows)
    differing = [n for n in names if len({windows[n] for windows in recorded.values() if n in windows}) > 1]
    if not differing:
        return []
    more = ", ..." if len(differing) > _SHOWN_DOMAINS else ""
    values = {
        label: ", ".join(f"{name} {windows.get(name, 0):,}" for name in differing[:_SHOWN_DOMAINS]) + more
        for label, windows in recorded.items()
    }
    return [Difference(WINDOWS, values)]
