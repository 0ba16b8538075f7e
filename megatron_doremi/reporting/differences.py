"""Differences between the runs of a report: model shape, sequence length, data, precision, held-out windows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from megatron_doremi.config import OPTIMIZER_NAMES
from megatron_doremi.data.manifest import similar_names
from megatron_doremi.reporting.evaluations import Unit
from megatron_doremi.reporting.runs import Run, find_number, flatten
from megatron_doremi.settings import without_unread
from megatron_doremi.shapes import with_defaults

SEED, TOKENIZER, HELD_OUT = "seed", "tokenizer", "held-out text"
# Also records where a run branched from another.
OVERRIDES = "settings changed on resuming"
# The names of values of config.json, by the last part of the key.
PROPERTIES = {
    "seq_length": "sequence length",
    "tokenizer_sha256": TOKENIZER,
    "data_fingerprint": "data fingerprint",
    "data_content": "training text",
    "held_out_content": HELD_OUT,
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
DECISIVE = (HELD_OUT, WINDOWS, "sequence length", TOKENIZER)
# What follows from another tokenizer where the text is the same.
OF_TOKENS = (HELD_OUT, WINDOWS)
_SHOWN_DOMAINS = 3


@dataclass(frozen=True)
class Difference:
    """A property in which runs differ.

    Attributes:
        name: of the property.
        values: as text, by the run's label; runs that do not record the property are missing.
        decisive: whether the runs were evaluated on different text.
        meaning: what follows, in sentences.
    """

    name: str
    values: dict[str, str]
    decisive: bool = False
    meaning: str = ""

    def sentence(self, subject: str = "The runs") -> str:
        """The difference as a sentence of the report."""
        listed = ", ".join(f"{label} {value}" for label, value in self.values.items())
        warning = " Their held-out losses cannot be compared." if self.decisive else ""
        return f"{subject} differ in {self.name}: {listed}.{warning}" + (f" {self.meaning}" if self.meaning else "")


def differences(runs: Mapping[str, Run], unit: Unit = Unit.NATS) -> tuple[Difference, ...]:
    """The properties that at least two runs record with different values.

    In bits per byte, another tokenizer on the same text is no obstacle to a comparison of held-out losses.

    Args:
        unit: of the held-out losses that are compared.
    """
    found = _all_differences(runs)
    if unit is Unit.NATS or TOKENIZER not in {each.name for each in found}:
        return found
    obstacle = text_obstacle(runs)
    if obstacle:
        return tuple(replace(each, meaning=obstacle) if each.name == TOKENIZER else each for each in found)
    # Two of the others follow from the tokenizer, and windows of another length may hold as much text.
    meaning = {TOKENIZER: _meaning(runs)}
    kept = [each for each in found if each.name not in OF_TOKENS]
    return tuple(replace(each, decisive=False, meaning=meaning.get(each.name, "")) for each in kept)


def text_obstacle(runs: Mapping[str, Run]) -> str:
    """Why runs with different tokenizers were not evaluated on the same text, or may not have been; "" if they were.

    Their documents are the same as far as the number of documents and the bytes of each tell. Of the domains of the
    last evaluations, those that not all runs have are left out.
    """
    unknown = [label for label, run in runs.items() if not run.held_out_text]
    if unknown:
        return f"Not recorded for {', '.join(unknown)}: whether the text is the same. Evaluate with --phase evaluate."
    read = [set(run.evaluations[-1].nats.losses) if run.evaluations else set() for run in runs.values()]
    for name in sorted(set.intersection(*read)):
        texts = {label: run.held_out_text.get(name, {}) for label, run in runs.items()}
        if any(text != next(iter(texts.values())) for text in texts.values()):
            sizes = [f"{label} {each.get('documents')} of {each.get('bytes')} bytes" for label, each in texts.items()]
            return f"The text differs as well, such as the documents of {name}: {', '.join(sizes)}."
    parts = [label for label, run in runs.items() if not _read_all(run)]
    return f"Only a part was read for {', '.join(parts)}: evaluate without --eval-iters." if parts else ""


def _read_all(run: Run) -> bool:
    """Whether the last evaluation left out no more of each domain than the rest that fills no window."""
    windows = run.evaluations[-1].windows or {}
    unread = {
        name: run.held_out_text[name]["bytes"] - windows.get(name, 0) * size
        for name, size in _window_bytes(run).items()
        if name in run.held_out_text
    }
    # The rest is shorter than a window, but its tokens may be longer than others.
    return all(rest <= 2 * _window_bytes(run)[name] for name, rest in unread.items())


def _window_bytes(run: Run) -> dict[str, float]:
    """Mean bytes of text in a window of each domain of a run's last evaluation."""
    evaluation, length = run.evaluations[-1], find_number(run.config, "seq_length") or math.nan
    nats, bits = evaluation.nats.losses, evaluation.held_out(Unit.BITS).losses
    return {name: length * nats[name] / math.log(2) / loss for name, loss in bits.items() if loss}


def _meaning(runs: Mapping[str, Run]) -> str:
    """What a comparison of runs with different tokenizers on the same text means."""
    texts = next(iter(runs.values())).held_out_text.values()
    documents, size = (sum(text[key] for text in texts) for key in ("documents", "bytes"))
    windows = ", ".join(
        f"{label} {fmean(_window_bytes(run).values() or [math.nan]):,.0f}" for label, run in runs.items()
    )
    return (
        f"The held-out text is the same ({documents:,} documents, {size:,} bytes, alike in each domain), and bits per "
        "byte compare each model together with its tokenizer. A window holds on average, in bytes of text: "
        f"{windows}; more text before a token makes it easier to predict."
    )


def _all_differences(runs: Mapping[str, Run]) -> tuple[Difference, ...]:
    recorded_by = {label: properties(run) for label, run in runs.items()}
    names = dict.fromkeys(name for recorded in recorded_by.values() for name in recorded)
    differing = []
    for name in names:
        values = {label: recorded[name] for label, recorded in recorded_by.items() if recorded.get(name) is not None}
        if any(value != next(iter(values.values())) for value in values.values()):
            shown = {label: _shortened(value) for label, value in values.items()}
            differing.append(Difference(name, shown, name in DECISIVE))
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
    """The compared properties of a run as config.json records them, without those that nothing reads; the model's shape
    takes its missing defaults."""
    shape = run.config.get("gpt")
    config = {**run.config, "gpt": with_defaults(shape)} if isinstance(shape, dict) else run.config
    flat = flatten(config)
    recorded = {key.removeprefix("gpt."): value for key, value in flat.items() if key.startswith("gpt.")}
    # The identity repeats most values; where they differ, another place wins, and of those the one with fewest groups.
    for key in sorted(flat, key=lambda key: (key.startswith("identity."), key.count(".")), reverse=True):
        name = PROPERTIES.get(key.rsplit(".", 1)[-1])
        if name is not None:
            recorded[name] = _without_own_folder(flat[key]) if name == OVERRIDES else flat[key]
    return without_unread(recorded)


def _without_own_folder(overrides: Any) -> Any:
    """The recorded overrides; an entry on a branch names the run's own folder, in which every two runs differ."""
    if not isinstance(overrides, list):
        return overrides
    entries = [entry if isinstance(entry, dict) else {} for entry in overrides]
    return [{k: v for k, v in entry.items() if entry.get("name") != "branch" or k != "now"} for entry in entries]


def _shortened(value: Any) -> str:
    # A flag that was not given, such as --init-from.
    text = "none" if value == "" else str(value)
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
    return [Difference(WINDOWS, values, decisive=True)]
