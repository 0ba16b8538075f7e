"""The record of rounds of DoReMi, rounds.json, and its tables. tools/doremi_rounds.py writes it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from megatron_doremi.reporting.mixture import entropy
from megatron_doremi.reporting.tables import Column, Row, Table, format_epochs, format_weight
from megatron_doremi.storage.formats import Name, Positive, Schema, read_checked

ROUNDS_FILE = "rounds.json"
End = Literal["settled", "max_rounds"]
Weights = dict[Name, Annotated[float, Field(ge=0.0, le=1.0)]]
Distance = Annotated[float, Field(ge=0.0)]


class RoundEntry(Schema):
    """A round that has ended.

    Attributes:
        round: its number, from 1.
        reference_weights: sampling weights of its reference.
        weights: what its proxies learned, the mean over seeds.
        seed_weights: what each proxy learned.
        change, most_moved: the largest absolute difference between `weights` and `reference_weights`, and its domain.
        noise, noise_from: see rounds/stop_rule.py; null if it is not known.
        threshold: the change at which rounds end.
    """

    round: Positive
    reference_weights: Weights
    weights: Weights
    seed_weights: list[Weights] = Field(min_length=1)
    change: Distance
    most_moved: Name
    noise: Distance | None
    noise_from: Literal["seeds", "halves"] | None
    threshold: Distance

    @model_validator(mode="after")
    def _same_domains(self) -> RoundEntry:
        if any(each.keys() != self.weights.keys() for each in (self.reference_weights, *self.seed_weights)):
            raise ValueError("reference_weights, weights and seed_weights must name the same domains")
        if self.most_moved not in self.weights:
            raise ValueError("most_moved must be one of the domains")
        return self


class RoundsEntry(Schema):
    """The rounds so far.

    Attributes:
        settings: those of the runs, by name; empty if the runs were started one by one.
        ended: why there is no further round; null if there is one.
    """

    FORMAT: ClassVar[str] = "megatron-doremi-rounds/1"
    settings: dict[str, Any]
    min_change: Distance
    max_rounds: Positive
    seeds: Positive
    ended: End | None
    rounds: list[RoundEntry]

    @model_validator(mode="after")
    def _in_order(self) -> RoundsEntry:
        if [each.round for each in self.rounds] != list(range(1, len(self.rounds) + 1)):
            raise ValueError("rounds must be numbered from 1")
        if any(each.weights.keys() != self.rounds[0].weights.keys() for each in self.rounds):
            raise ValueError("every round must have the same domains")
        return self


def read_rounds(folder: Path, flag: str) -> RoundsEntry:
    """Reads FOLDER/rounds.json. Raises ConfigError."""
    return read_checked(
        folder / ROUNDS_FILE,
        f"{flag} {folder / ROUNDS_FILE}",
        RoundsEntry,
        "give the --save folder of doremi_rounds.py",
    )


def divergence(weights: Weights, reference: Weights) -> float:
    """KL(weights || reference) in nats; Inf if the reference leaves out a domain that has a weight."""
    terms = [(w, reference[name]) for name, w in weights.items() if w > 0.0]
    return math.fsum(w * math.log(w / r) for w, r in terms) if all(r > 0.0 for _, r in terms) else math.inf


def effective_domains(weights: Weights) -> float:
    """exp(entropy): as many domains with equal weights have the same entropy."""
    return math.exp(entropy(np.array([list(weights.values())]))[0])


def rounds_table(entry: RoundsEntry) -> Table:
    """A row for each round: how far it moved the weights, and what would have ended the rounds."""
    rows: list[Row] = [
        (
            str(each.round),
            each.change,
            each.most_moved,
            each.noise,
            each.noise_from or "",
            each.threshold,
            divergence(each.weights, each.reference_weights),
            effective_domains(each.weights),
        )
        for each in entry.rounds
    ]
    columns = (
        Column("round"),
        Column("largest change", format_weight),
        Column("of domain"),
        Column("noise", format_weight),
        Column("noise from"),
        Column("threshold", format_weight),
        Column("KL (nats)", format_weight),
        Column("effective domains", format_epochs),
    )
    caption = (
        "Change of a weight between the round's reference and what its proxies learned; rounds end when the largest is "
        "at most the threshold, the larger of --min-change and the noise."
    )
    return Table("rounds", columns, tuple(rows), caption=caption)


def round_table(each: RoundEntry) -> Table:
    """The weights of one round by domain, most moved first."""
    moved = {name: weight - each.reference_weights[name] for name, weight in each.weights.items()}
    rows: tuple[Row, ...] = tuple(
        (name, each.reference_weights[name], each.weights[name], moved[name])
        for name in sorted(moved, key=lambda name: (-abs(moved[name]), name))
    )
    columns = (
        Column("domain"),
        Column("reference", format_weight),
        Column("learned", format_weight),
        Column("change", lambda value: f"{value:+.4f}"),
    )
    return Table(
        f"round_{each.round}",
        columns,
        rows,
        caption=f"Round {each.round}: sampling weights of its reference, learned weights.",
    )


def verdict_of_round(entry: RoundsEntry) -> str:
    """A sentence on the last round: whether another one follows, and why."""
    last = entry.rounds[-1]
    moved = f"round {last.round}: the largest change of a weight is {last.change:.4f} ({last.most_moved})"
    limit = f"--min-change {entry.min_change:g}"
    if last.noise is not None:
        source = "the seeds" if last.noise_from == "seeds" else "halves of the difference to the round before"
        limit = f"the larger of {limit} and the noise {last.noise:.4f} (from {source})"
    if entry.ended == "settled":
        return f"{moved}, at most {limit}: the weights have settled"
    if entry.ended == "max_rounds":
        return f"{moved}, more than {limit}: not settled after --max-rounds {entry.max_rounds}"
    return f"{moved}, more than {limit}: another round follows"


def concentration_warning(entry: RoundsEntry) -> str | None:
    """A sentence if the weights of the last round are on less than half as many domains as the first reference's."""
    first, last = entry.rounds[0].reference_weights, entry.rounds[-1].weights
    before, now = effective_domains(first), effective_domains(last)
    if now >= before / 2:
        return None
    name = max(last, key=lambda each: last[each])
    return (
        f"warning: the rounds concentrate the weights: {now:.1f} effective domains, {before:.1f} at the start; "
        f"{name} has {last[name]:.2f}. Compare earlier rounds before you use the last one (docs/rounds.md)"
    )
