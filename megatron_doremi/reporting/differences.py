"""What runs that are set side by side do not have in common: shape, length, data, precision, held-out windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_doremi.data.manifest import similar_names
from megatron_doremi.reporting.runs import Run, flatten

# Of config.json, by the last part of the key: what the values are called.
FACTS = {
    "seq_length": "sequence length",
    "tokenizer_sha256": "tokenizer",
    "data_fingerprint": "data fingerprint",
    "held_out_content": "held-out text",
    "bf16": "bfloat16",
}
WINDOWS = "held-out windows"
# Without these two alike, held-out losses are of other text.
DECISIVE = ("held-out text", WINDOWS, "sequence length", "tokenizer")
_SHOWN_DOMAINS = 3


@dataclass(frozen=True)
class Difference:
    """Something in which runs differ.

    Attributes:
        name: what it is.
        values: as text, by the run's label; runs that do not record it are missing.
    """

    name: str
    values: dict[str, str]

    def sentence(self) -> str:
        """For the report."""
        listed = ", ".join(f"{label} {value}" for label, value in self.values.items())
        warning = " Their held-out losses cannot be compared." if self.name in DECISIVE else ""
        return f"The runs differ in {self.name}: {listed}.{warning}"


def differences(runs: Mapping[str, Run]) -> tuple[Difference, ...]:
    """Everything that at least two of the runs record and do not have in common."""
    facts = {label: _facts(run) for label, run in runs.items()}
    names = dict.fromkeys(name for known in facts.values() for name in known)
    found = []
    for name in names:
        values = {label: known[name] for label, known in facts.items() if known.get(name) is not None}
        if any(value != next(iter(values.values())) for value in values.values()):
            found.append(Difference(name, {label: _shown(value) for label, value in values.items()}))
    return (*found, *_windows(runs))


def look_alike(names: Sequence[str]) -> str | None:
    """A sentence about domain names that differ only by case or spaces, if there are any."""
    alike = [repr(name) for group in similar_names(names) for name in group]
    return f"Domain names that differ only by case or spaces: {', '.join(alike)}." if alike else None


def _facts(run: Run) -> dict[str, Any]:
    """What a run's config.json says of the things that have to be alike."""
    flat = {key: value for key, value in flatten(run.config).items() if not key.startswith("identity.")}
    facts = {key.removeprefix("gpt."): value for key, value in flat.items() if key.startswith("gpt.")}
    for key in sorted(flat, key=lambda each: each.count("."), reverse=True):
        name = FACTS.get(key.rsplit(".", 1)[-1])
        # The key with the fewest groups comes last and counts.
        if name is not None:
            facts[name] = flat[key]
    return facts


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}..."


def _windows(runs: Mapping[str, Run]) -> list[Difference]:
    """Windows that the last evaluations read, where they differ for a domain that both have."""
    read = {label: run.evaluations[-1].windows for label, run in runs.items() if run.evaluations}
    known = {label: windows for label, windows in read.items() if windows is not None}
    names = dict.fromkeys(name for windows in known.values() for name in windows)
    differ = [n for n in names if len({windows[n] for windows in known.values() if n in windows}) > 1]
    if not differ:
        return []
    more = ", ..." if len(differ) > _SHOWN_DOMAINS else ""
    values = {
        label: ", ".join(f"{name} {windows.get(name, 0):,}" for name in differ[:_SHOWN_DOMAINS]) + more
        for label, windows in known.items()
    }
    return [Difference(WINDOWS, values)]
