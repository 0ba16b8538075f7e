"""Differences between the runs of a report: model shape, sequence length, data, precision, held-out windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_doremi.data.manifest import similar_names
from megatron_doremi.reporting.runs import Run, flatten
from megatron_doremi.shapes import with_defaults

# The names of values of config.json, by the last part of the key.
PROPERTIES = {
    "seq_length": "sequence length",
    "tokenizer_sha256": "tokenizer",
    "data_fingerprint": "data fingerprint",
    "held_out_content": "held-out text",
    "bf16": "bfloat16",
}
WINDOWS = "held-out windows"
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

    def sentence(self) -> str:
        """The difference as a sentence of the report."""
        listed = ", ".join(f"{label} {value}" for label, value in self.values.items())
        warning = " Their held-out losses cannot be compared." if self.name in DECISIVE else ""
        return f"The runs differ in {self.name}: {listed}.{warning}"


def differences(runs: Mapping[str, Run]) -> tuple[Difference, ...]:
    """The properties that at least two runs record with different values."""
    properties = {label: _properties(run) for label, run in runs.items()}
    names = dict.fromkeys(name for recorded in properties.values() for name in recorded)
    differing = []
    for name in names:
        values = {label: recorded[name] for label, recorded in properties.items() if recorded.get(name) is not None}
        if any(value != next(iter(values.values())) for value in values.values()):
            differing.append(Difference(name, {label: _shortened(value) for label, value in values.items()}))
    return (*differing, *_window_differences(runs))


def similar_names_note(names: Sequence[str]) -> str | None:
    """A sentence about domain names that differ only by case or spaces, if there are any."""
    similar = [repr(name) for group in similar_names(names) for name in group]
    return f"Domain names that differ only by case or spaces: {', '.join(similar)}." if similar else None


def _properties(run: Run) -> dict[str, Any]:
    """The properties that a run's config.json records, and the defaults of fields that its model shape lacks."""
    shape = run.config.get("gpt")
    config = {**run.config, "gpt": with_defaults(shape)} if isinstance(shape, dict) else run.config
    flat = {key: value for key, value in flatten(config).items() if not key.startswith("identity.")}
    properties = {key.removeprefix("gpt."): value for key, value in flat.items() if key.startswith("gpt.")}
    for key in sorted(flat, key=lambda key: key.count("."), reverse=True):
        name = PROPERTIES.get(key.rsplit(".", 1)[-1])
        # The key with the fewest groups comes last and wins.
        if name is not None:
            properties[name] = flat[key]
    return properties


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
