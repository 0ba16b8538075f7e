"""Describes a comparison in sentences: better, worse and by how much, without claims beyond the measurements."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_doremi.reporting.comparison import (
    PLANTED,
    Comparison,
    DomainResult,
    Pair,
    uniform_mean_without,
)
from megatron_doremi.reporting.tables import format_difference, format_loss, format_weight

# A difference that the table prints as 0.000 counts as none, so that sentences and table agree.
NO_DIFFERENCE = "0.000"


def verdict(difference: float | None) -> str:
    """Returns "better", "worse" or "equal" for main - baseline as printed; "" if it was not measured."""
    if difference is None:
        return ""
    if format_difference(difference) == NO_DIFFERENCE:
        return "equal"
    return "better" if difference < 0 else "worse"


def describe(comparison: Comparison) -> list[str]:
    """Returns every sentence about the comparison: losses, means, planted domains, limits."""
    return [
        *describe_domains(comparison.domains),
        *describe_means(comparison),
        *describe_planted(comparison),
        *comparison.notes,
        "One run of each was compared; the variation between seeds was not measured here.",
    ]


def describe_domains(domains: Sequence[DomainResult]) -> list[str]:
    """Returns on which domains main is better than, worse than or equal to the baseline, largest changes first."""
    changes = [(domain.name, domain.loss.difference) for domain in domains]
    measured = [(name, change) for name, change in changes if change is not None]
    of_all = f"of {_domains(len(measured))}"
    sentences = []
    for kind, phrase in (("better", "better than"), ("worse", "worse than"), ("equal", "equal to")):
        group = sorted((each for each in measured if verdict(each[1]) == kind), key=lambda each: -abs(each[1]))
        if kind == "equal":
            listed = ", ".join(name for name, _ in group)
        else:
            listed = ", ".join(f"{name} ({format_difference(change)})" for name, change in group)
        if group:
            sentences.append(f"main is {phrase} the baseline on {len(group)} {of_all} (nats per token): {listed}.")
        elif kind != "equal":
            sentences.append(f"main is {phrase} the baseline on 0 {of_all}.")
    return sentences


def describe_means(comparison: Comparison) -> list[str]:
    """Returns a sentence for each of uniform mean, worst domain and token mean."""
    main_worst, baseline_worst = comparison.worst_names[1], comparison.worst_names[0]
    sentences = [_pair_sentence("Uniform mean", comparison.uniform_mean)]
    planted = [domain.name for domain in comparison.domains if domain.planted]
    rest = uniform_mean_without(comparison, planted)
    if planted and rest.difference is not None:
        sentences.append(_pair_sentence(f"Uniform mean without the planted {_and(planted)}", rest))
    label = f"Worst domain ({main_worst} for main, {baseline_worst} for the baseline)"
    if main_worst == baseline_worst:
        label = f"Worst domain ({main_worst} for both)"
    sentences.append(_pair_sentence(label, comparison.worst))
    if comparison.token_mean.difference is not None:
        sentences.append(_pair_sentence("Token mean", comparison.token_mean))
    return sentences


def describe_planted(comparison: Comparison) -> list[str]:
    """Returns whether each planted domain lost or gained weight relative to 1/k, with numbers."""
    uniform, count = comparison.uniform_weight, len(comparison.domains)
    sentences = []
    for domain in (each for name in PLANTED for each in comparison.domains if each.name == name):
        mean, last = domain.doremi_weight, domain.last_weight
        sentences.append(
            f"Planted domain {domain.name} {_moved(mean, uniform)} in the mean over all steps "
            f"({format_weight(mean)}) and {_moved(last, uniform)} at the end ({format_weight(last)}), "
            f"against uniform 1/{count} = {format_weight(uniform)}."
        )
    return sentences


def _moved(weight: float, uniform: float) -> str:
    if format_weight(weight) == format_weight(uniform):
        return "kept its weight"
    return "lost weight" if weight < uniform else "gained weight"


def _pair_sentence(label: str, pair: Pair) -> str:
    difference = pair.difference
    change = f"{format_difference(difference)}, {verdict(difference)}"
    losses = f"main {format_loss(pair.main)} against {format_loss(pair.baseline)}"
    return f"{label}: {losses} nats per token ({change})."


def _domains(count: int) -> str:
    return "1 domain" if count == 1 else f"{count} domains"


def _and(names: Sequence[str]) -> str:
    return " and ".join(names)
