"""Compares groups of runs: the first compared group with each other one, paired by seed. Pure: nothing is read here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from megatron_doremi.errors import ConfigError, Fault, raise_if_any
from megatron_doremi.reporting.differences import differences, similar_names_note
from megatron_doremi.reporting.evaluations import HeldOut, Unit
from megatron_doremi.reporting.groups import (
    PROXY,
    Group,
    Pairing,
    check_learned_weights,
    group_faults,
    pair,
    unlike_members,
)
from megatron_doremi.reporting.mixture import trained_tokens, weights_file_note
from megatron_doremi.reporting.paired_difference import PairedDifference, paired_difference
from megatron_doremi.reporting.runs import Run

WORST, UNIFORM_MEAN, TOKEN_MEAN = "worst domain", "uniform mean", "token mean"


@dataclass(frozen=True)
class Contrast:
    """One figure of two groups, pair by pair.

    Attributes:
        subject, rival: [n] the figure of each pair's runs, in the study's unit.
    """

    subject: tuple[float, ...]
    rival: tuple[float, ...]

    @cached_property
    def differences(self) -> tuple[float, ...]:
        """[n] subject - rival; negative if the subject is better."""
        return tuple(a - b for a, b in zip(self.subject, self.rival, strict=True))

    @cached_property
    def paired(self) -> PairedDifference:
        """Mean, standard deviation and interval of the differences."""
        return paired_difference(self.subject, self.rival)


@dataclass(frozen=True)
class RivalComparison:
    """The subject against one rival.

    Attributes:
        pairing: the pairs and what they share.
        domains: differences by domain, of the domains that every run of a pair was evaluated on.
        summary: WORST, UNIFORM_MEAN and, if it is recorded, TOKEN_MEAN.
        worst_names: domains that are a run's worst: of the subject, of the rival.
    """

    pairing: Pairing
    domains: dict[str, Contrast]
    summary: dict[str, Contrast]
    worst_names: tuple[tuple[str, ...], tuple[str, ...]]

    @property
    def visible(self) -> dict[str, int]:
        """Sign of the difference of each domain whose interval excludes 0."""
        return {name: each.paired.sign for name, each in self.domains.items() if each.paired.sign}


@dataclass(frozen=True)
class Study:
    """Everything that a report is made from.

    Attributes:
        groups: every group, in the order given.
        subject: name of the group that is compared with the others; None if nothing is compared.
        comparisons: one for each rival.
        unit: of the held-out losses.
        names: domains, in the order of the manifest or of the first run that has them.
        domain_tokens: training tokens by domain; {} without a manifest.
        weights_match: False if a run of the subject samples by other weights than a proxy's.
        notes: checks and limits, in sentences.
        last_round: if the proxies are of several rounds: the labels of the last round's, whose weights are the result.
        round_name: of that round; "" without rounds.
    """

    groups: tuple[Group, ...]
    subject: str | None
    comparisons: tuple[RivalComparison, ...]
    unit: Unit
    names: tuple[str, ...]
    domain_tokens: dict[str, int]
    weights_match: bool
    notes: tuple[str, ...]
    last_round: frozenset[str] = frozenset()
    round_name: str = ""

    @property
    def compared(self) -> tuple[Group, ...]:
        """The groups whose held-out losses are shown side by side."""
        evaluated = [group for group in self.groups if any(run.evaluations for run in group.runs)]
        return tuple(group for group in evaluated if group.compared or self.subject is None)

    @property
    def color_order(self) -> tuple[str, ...]:
        """The groups in the order of their colors, which are the same in every chart."""
        compared = [group.name for group in self.compared]
        return tuple(dict.fromkeys([*compared, *(group.name for group in self.groups)]))

    @property
    def runs(self) -> dict[str, Run]:
        """Every run by its label."""
        return {group.label(run): run for group in self.groups for run in group.runs}

    @property
    def proxies(self) -> dict[str, Run]:
        """The runs that learned weights, by label."""
        return {label: run for label, run in self.runs.items() if run.has_weights}

    @property
    def pooled_proxies(self) -> dict[str, Run]:
        """The proxies whose mean is the learned mixture, by label: all, or those of the last round."""
        return {label: run for label, run in self.proxies.items() if not self.last_round or label in self.last_round}

    @property
    def learned_name(self) -> str:
        """Heads the learned mixture; where runs are only listed, the mean over their proxies may be no run's."""
        count = len(self.pooled_proxies)
        return f"mean weight of {count}" if count > 1 and self.subject is None and not self.last_round else "learned"

    def pool(self, count: int) -> str:
        """What the learned weights of `count` proxies are, for a sentence: ", the mean of 2 proxies of round 3"."""
        of = f" of {self.round_name}" if self.round_name else ""
        return f", the mean of {count} proxies{of}" if count > 1 else f",{of}" if of else ""

    def held_out(self, run: Run) -> HeldOut | None:
        """The last held-out losses of a run in the study's unit; None if it has none."""
        if not run.evaluations or (self.unit is Unit.BITS and run.evaluations[-1].bits is None):
            return None
        return run.evaluations[-1].held_out(self.unit)


def with_controls(groups: Sequence[Group], controls: Sequence[str]) -> list[Group]:
    """The groups with control domains: shown, but left out of every mean and worst domain.

    Raises:
        ConfigError: no run was evaluated on a domain of that name, or every domain is a control.
    """
    evaluated = {name for g in groups for run in g.runs for each in run.evaluations for name in each.nats.losses}
    listed = ", ".join(sorted(evaluated))
    unknown = [name for name in controls if name not in evaluated]
    if unknown:
        raise ConfigError(Fault("--control-domains", ", ".join(unknown), f"among {listed}", "correct the names"))
    if evaluated and evaluated <= set(controls):
        raise ConfigError(Fault("--control-domains", listed, "at least one other domain", "leave one out"))
    known = frozenset(controls)

    def changed(run: Run) -> Run:
        return replace(run, evaluations=tuple(each.with_controls(known) for each in run.evaluations))

    return [replace(group, runs=tuple(map(changed, group.runs))) for group in groups]


def compare(groups: Sequence[Group], domain_tokens: Mapping[str, int] | None = None) -> Study:
    """Compares the first group that is not of proxies or references with each other such group.

    Args:
        domain_tokens: training tokens by domain, in the manifest's order, if a manifest is known.

    Raises:
        ConfigError: with every reason why the groups cannot be compared.
    """
    tokens = dict(domain_tokens or {})
    compared = [group for group in groups if group.compared]
    faults = [*group_faults(groups), *_evaluation_faults(compared)]
    if not compared:
        faults.append(Fault("--group", ", ".join(g.name for g in groups), "a group to compare", "add --group NAME=DIR"))
    raise_if_any([*faults, *_name_faults(groups, tokens)])
    subject, rivals = compared[0], compared[1:]
    pairings = [pair(subject, rival) for rival in rivals]
    raise_if_any(_pairing_faults(pairings))
    unit, unit_note = choose_unit(
        [run for pairing in pairings for runs in pairing.pairs for run in runs] or subject.runs
    )
    pairings = [pair(subject, rival, unit) for rival in rivals]
    names = _domain_names(groups, tokens)
    match = True
    weight_notes: list[str] = []
    proxies = next((group for group in groups if group.name == PROXY), None)
    if proxies is not None:
        match, weight_notes = check_learned_weights(subject, proxies)
    comparisons = tuple(_against(pairing, unit, names) for pairing in pairings)
    notes = [
        *weight_notes,
        *(sentence for pairing in pairings for sentence in pairing.sentences()),
        *(sentence for group in compared for sentence in unlike_members(group)),
        *(note for comparison in comparisons for note in _limits(comparison, names)),
        *unit_note,
        *_common_notes(groups, names),
    ]
    return Study(tuple(groups), subject.name, comparisons, unit, names, tokens, match, tuple(dict.fromkeys(notes)))


def list_runs(groups: Sequence[Group], domain_tokens: Mapping[str, int] | None = None) -> Study:
    """A study of runs that are shown side by side and not compared, such as of different configurations."""
    tokens = dict(domain_tokens or {})
    raise_if_any(_name_faults(groups, tokens))
    evaluated = {group.label(run): run for group in groups for run in group.runs if run.evaluations}
    unit, unit_note = choose_unit(list(evaluated.values()))
    names = _domain_names(groups, tokens)
    sentences = [each.sentence() for each in differences(evaluated, unit)]
    notes = (*sentences, *unit_note, *_common_notes(groups, names))
    return Study(tuple(groups), None, (), unit, names, tokens, True, notes)


def choose_unit(runs: Sequence[Run]) -> tuple[Unit, list[str]]:
    """Bits per byte if every run's last evaluation has them for every domain, else nats, with a sentence if some do."""
    newest = [run.evaluations[-1] for run in runs if run.evaluations]
    known = [
        each.bits is not None
        and each.bits.losses.keys() == each.nats.losses.keys()
        and all(map(math.isfinite, each.bits.losses.values()))
        for each in newest
    ]
    if newest and all(known):
        return Unit.BITS, []
    some = any(evaluation.bits is not None for evaluation in newest)
    note = "Losses are in nats per token: not every run knows the bytes of every domain's text." if some else ""
    return Unit.NATS, [note] if note else []


def _against(pairing: Pairing, unit: Unit, order: Sequence[str]) -> RivalComparison:
    pairs = [tuple(run.evaluations[-1].held_out(unit) for run in runs) for runs in pairing.pairs]
    common = set.intersection(*(set(each.losses) for both in pairs for each in both))
    names = [name for name in order if name in common]
    subject = [each.restricted_to(names) for each, _ in pairs]
    rival = [other.restricted_to(names) for _, other in pairs]
    domains = {name: _contrast((a.losses[name] for a in subject), (b.losses[name] for b in rival)) for name in names}
    summary = {
        WORST: _contrast((a.worst[1] for a in subject), (b.worst[1] for b in rival)),
        UNIFORM_MEAN: _contrast((a.uniform_mean for a in subject), (b.uniform_mean for b in rival)),
    }
    token_means = [(a.token_mean, b.token_mean) for a, b in pairs]
    left = [a for a, b in token_means if a is not None and b is not None]
    right = [b for a, b in token_means if a is not None and b is not None]
    if len(left) == len(pairs) and len({each.by_shares for both in pairs for each in both}) == 1:
        summary[TOKEN_MEAN] = Contrast(tuple(left), tuple(right))
    worst = tuple(tuple(dict.fromkeys(each.worst[0] for each in side)) for side in (subject, rival))
    return RivalComparison(pairing, domains, summary, (worst[0], worst[1]))


def _contrast(subject: Iterable[float], rival: Iterable[float]) -> Contrast:
    return Contrast(tuple(subject), tuple(rival))


def _evaluation_faults(groups: Sequence[Group]) -> list[Fault]:
    faults = []
    for group in groups:
        for run in group.runs:
            flag = f"--group {group.name}"
            if not run.evaluations:
                remedy = "train it with held-out text, or run --phase evaluate --load DIR --save DIR with this folder"
                rule = "needs at least one evaluation line in metrics.jsonl"
                faults.append(Fault(flag, str(run.path), rule, remedy))
                continue
            losses = run.evaluations[-1].nats.losses
            diverged = [name for name, loss in losses.items() if not math.isfinite(loss)]
            if diverged:
                remedy = "the run has diverged: train it again, for instance with a lower --lr"
                value = f"{run.path}, step {run.evaluations[-1].iteration}: {_shortened(diverged)}"
                faults.append(Fault(flag, value, "the last held-out losses must be finite numbers", remedy))
    return faults


def _name_faults(groups: Sequence[Group], domain_tokens: Mapping[str, int]) -> list[Fault]:
    """Faults of runs whose domains are not the manifest's."""
    faults = []
    for group in groups if domain_tokens else ():
        for run in group.runs:
            unknown = [name for name in run.domain_names() if name not in domain_tokens]
            if unknown:
                remedy = "give --domains the manifest that the runs were trained on"
                value = f"{run.path}: not in the manifest: {_shortened(unknown)}"
                faults.append(Fault("--domains", value, "domain names must be the manifest's", remedy))
    return faults


def _pairing_faults(pairings: Sequence[Pairing]) -> list[Fault]:
    faults = []
    for pairing in pairings:
        subject = f"--group {pairing.subject} and --group {pairing.rival}"
        if not pairing.pairs:
            seeds = ", ".join(str(seed) for seed in pairing.unpaired)
            remedy = "train both with the same seeds, or give one run of each"
            faults.append(Fault(subject, f"seeds {seeds}", "need a seed in common", remedy))
            continue
        evaluated = [set(run.evaluations[-1].nats.losses) for runs in pairing.pairs for run in runs]
        if not set.intersection(*evaluated):
            rule = "must share at least one evaluated domain"
            faults.append(Fault(subject, "", rule, "evaluate both on the same manifest"))
    return faults


def _limits(comparison: RivalComparison, names: Sequence[str]) -> Iterable[str]:
    pairing = comparison.pairing
    for left, right in pairing.pairs:
        tokens = trained_tokens(left), trained_tokens(right)
        sides = f"for {pairing.subject}, {{}} for {pairing.rival}"
        same_step = left.evaluations[-1].iteration == right.evaluations[-1].iteration
        if same_step and tokens[0] is not None and tokens[1] is not None and tokens[0] != tokens[1]:
            yield f"The budgets differ: {tokens[0]:,.0f} tokens {sides.format(f'{tokens[1]:,.0f}')}."
    if TOKEN_MEAN not in comparison.summary:
        yield (
            f"{pairing.subject} and {pairing.rival} have no token mean in common: a run does not record it, or some "
            "weighted domains by held-out windows, as version 0.1 did, and others by their natural shares."
        )
    missing = [name for name in names if name not in comparison.domains]
    if missing:
        both = f"{pairing.subject} and {pairing.rival}"
        yield f"Not evaluated for all runs of {both}, so left out of mean and worst domain: {_shortened(missing)}."


def _common_notes(groups: Sequence[Group], names: Sequence[str]) -> Iterable[str]:
    for group in groups:
        for run in group.runs:
            note = weights_file_note(run, group.label(run)) if run.has_weights else None
            if note is not None:
                yield note
    evaluations = [run.evaluations[-1].nats for group in groups for run in group.runs if run.evaluations]
    controls = sorted({name for each in evaluations for name in each.controls})
    if controls:
        verb = "is a control" if len(controls) == 1 else "are controls"
        yield f"{', '.join(controls)} {verb}: left out of worst domain and uniform mean, not of the token mean."
    similar = similar_names_note(names)
    if similar is not None:
        yield similar


def _domain_names(groups: Sequence[Group], domain_tokens: Mapping[str, int]) -> tuple[str, ...]:
    recorded = (name for group in groups for run in group.runs for name in run.domain_names())
    return tuple(dict.fromkeys([*domain_tokens, *recorded]))


def _shortened(names: Sequence[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def comparison_as_data(comparison: RivalComparison) -> dict[str, Any]:
    """Returns a comparison as plain data for results.json."""
    pairing = comparison.pairing
    return {
        "subject": pairing.subject,
        "rival": pairing.rival,
        "seeds": list(pairing.seeds),
        "summary": {name: _contrast_as_data(each) for name, each in comparison.summary.items()},
        "domains": {name: _contrast_as_data(each) for name, each in comparison.domains.items()},
        "differing": {each.name: each.values for each in pairing.differing},
    }


def _contrast_as_data(contrast: Contrast) -> dict[str, Any]:
    paired = contrast.paired
    return {
        "subject": list(contrast.subject),
        "rival": list(contrast.rival),
        "difference": paired.mean,
        "standard_deviation": paired.standard_deviation,
        "interval": None if paired.interval is None else list(paired.interval),
    }
