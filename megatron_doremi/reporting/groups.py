"""Groups of runs that differ only in their seed, and the pairs of runs of two groups. Pure: nothing is read here."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_doremi.errors import Fault
from megatron_doremi.reporting.differences import (
    OVERRIDES,
    PROPERTIES,
    SEED,
    STEP,
    WINDOWS,
    Difference,
    differences,
    properties,
    step_differences,
)
from megatron_doremi.reporting.evaluations import Unit
from megatron_doremi.reporting.runs import Run

# Groups of these names are not compared: the proxies give the learned weights, the references their excess losses.
PROXY, REFERENCE = "proxy", "reference"
# What makes a pair: the same initial weights (seed and shape), windows (seed and training text) and held-out text.
SHAPE = "hidden_size"
SHARED = (SEED, SHAPE, "training text", "sequence length", "training steps", "held-out text")
# Weights are copied through JSON and normalized once more: they differ by rounding.
SAME_WEIGHTS = 1e-9


@dataclass(frozen=True)
class Group:
    """Runs of one configuration with different seeds.

    Attributes:
        name: as given on the command line.
        runs: at least one.
    """

    name: str
    runs: tuple[Run, ...]

    @property
    def compared(self) -> bool:
        """Whether its held-out losses are compared with those of other groups."""
        return self.name not in (PROXY, REFERENCE)

    def label(self, run: Run) -> str:
        """The name of one of its runs."""
        if len(self.runs) == 1:
            return self.name
        return f"{self.name} seed {run.seed}" if run.seed is not None else f"{self.name} {self.runs.index(run) + 1}"


@dataclass(frozen=True)
class Pairing:
    """The pairs of runs of two groups.

    Attributes:
        subject, rival: names of the groups.
        seeds: [n] seed of each pair, None where it is not recorded.
        pairs: [n] (subject's run, rival's run).
        differing: what the runs of a pair do not share, and by which a difference can arise as well.
        unrecorded: properties of SHARED that no run records, so that they cannot be checked.
        unpaired: seeds of one group only, which are left out.
    """

    subject: str
    rival: str
    seeds: tuple[int | None, ...]
    pairs: tuple[tuple[Run, Run], ...]
    differing: tuple[Difference, ...]
    unrecorded: tuple[str, ...]
    unpaired: tuple[int, ...]

    @property
    def decisive(self) -> tuple[Difference, ...]:
        """Differences that forbid a comparison of held-out losses."""
        return tuple(each for each in self.differing if each.decisive)

    def sentences(self) -> list[str]:
        """What the pairs share, and what not."""
        both = f"{self.subject} and {self.rival}"
        count = len(self.pairs)
        pairs = "The pair" if count == 1 else f"The {count} pairs"
        verb = "shares" if count == 1 else "share"
        sentences = []
        names = {each.name for each in self.differing}
        if any(name not in (WINDOWS, STEP, *PROPERTIES.values()) for name in names):
            names.add(SHAPE)
        unknown = names.union(self.unrecorded)
        shared = [
            text
            for text, parts in (
                ("seed", (SEED,)),
                ("initial weights", (SEED, SHAPE, "initial weights", OVERRIDES)),
                ("training windows", (SEED, "training text", "sequence length")),
                ("steps", ("training steps", STEP)),
                ("held-out text", ("held-out text", WINDOWS)),
            )
            if not unknown & set(parts)
        ]
        if shared:
            sentences.append(f"{pairs} of {both} {verb} {_listed(shared)}.")
        sentences += [each.sentence() for each in self.differing]
        if self.unrecorded:
            sentences.append(f"Not recorded by {both}, and so not checked: {_listed(self.unrecorded)}.")
        if self.unpaired:
            seeds = _listed([str(seed) for seed in self.unpaired])
            sentences.append(f"Left out, because only one of {both} has the seed: {seeds}.")
        return sentences


def group_faults(groups: Sequence[Group]) -> list[Fault]:
    """Faults of the groups: repeated names, repeated seeds, seeds that are not recorded, runs in two groups."""
    faults = []
    places: dict[str, str] = {}
    for group in groups:
        for run in group.runs if group.compared else ():
            other = places.setdefault(os.path.realpath(run.path), group.name)
            if other != group.name:
                rule = f"a run of one group; it is in {other} as well, where its difference to itself is 0"
                faults.append(Fault(f"--group {group.name}", str(run.path), rule, "leave it out of one of the two"))
    for name, count in Counter(group.name for group in groups).items():
        if count > 1:
            faults.append(Fault("--group", f"{name} is given {count} times", "each name once", "give one of them"))
    for group in groups:
        if len(group.runs) == 1 or not group.compared:
            continue
        counts = Counter(run.seed for run in group.runs)
        unknown = [str(run.path) for run in group.runs if run.seed is None]
        if unknown:
            rule = "several runs of a group are told apart by the seed in config.json"
            faults.append(Fault(f"--group {group.name}", ", ".join(unknown), rule, "give one run of this group"))
        for seed, count in counts.items():
            if seed is not None and count > 1:
                paths = ", ".join(str(run.path) for run in group.runs if run.seed == seed)
                rule = f"runs of a group need different seeds; these have seed {seed}"
                faults.append(Fault(f"--group {group.name}", paths, rule, "give one run a seed"))
    return faults


def pair(subject: Group, rival: Group, unit: Unit = Unit.NATS) -> Pairing:
    """Pairs the runs of two groups by seed; two groups of one run each are a pair whatever their seeds.

    Args:
        unit: of the held-out losses that are compared.

    Returns:
        A pairing without pairs if no seed is in both groups.
    """
    seeds: list[int | None]
    if len(subject.runs) == len(rival.runs) == 1:
        seeds, pairs, unpaired = [subject.runs[0].seed], [(subject.runs[0], rival.runs[0])], []
    else:
        by_seed = {run.seed: run for run in subject.runs if run.seed is not None}
        other = {run.seed: run for run in rival.runs if run.seed is not None}
        common = sorted(by_seed.keys() & other.keys())
        seeds, pairs = list(common), [(by_seed[seed], other[seed]) for seed in common]
        unpaired = sorted(by_seed.keys() ^ other.keys())
    differing: dict[tuple[str, str], Difference] = {}
    for left, right in pairs:
        runs = {subject.name: left, rival.name: right}
        for each in (*differences(runs, unit), *step_differences(runs)):
            differing.setdefault((each.name, str(each.values)), each)
    recorded = {name for runs in pairs for run in runs for name in properties(run)}
    unrecorded = tuple(name for name in SHARED if name not in recorded)
    return Pairing(
        subject.name, rival.name, tuple(seeds), tuple(pairs), tuple(differing.values()), unrecorded, tuple(unpaired)
    )


def unlike_members(group: Group) -> list[str]:
    """A sentence for each property but the seed in which the runs of a group differ."""
    if len(group.runs) == 1:
        return []
    runs = {f"seed {run.seed}": run for run in group.runs}
    found = [each for each in (*differences(runs), *step_differences(runs)) if each.name != SEED]
    return [each.sentence(f"The runs of {group.name}") for each in found]


def check_learned_weights(group: Group, proxies: Group) -> tuple[bool, list[str]]:
    """Whether every run of `group` samples by the weights that a proxy learned.

    Returns:
        (False if a run samples by other weights, sentences). The weights of domain_weights.json are compared with
        those of config.json by content; a run is expected to have the weights of the proxy with its seed.
    """
    learned = {proxies.label(run): run for run in proxies.runs if run.recorded_weights is not None}
    if not learned:
        return True, [f"No proxy has a domain_weights.json, so the weights of {group.name} are not checked."]
    if len(learned) > 1 and len({frozenset(proxy.recorded_weights or {}) for proxy in learned.values()}) == 1:
        means = _mean_weights([proxy.recorded_weights or {} for proxy in learned.values()])
        learned["the mean over the proxies"] = replace(proxies.runs[0], recorded_weights=means, config={})
    right, sentences, seeds = True, [], []
    for run in group.runs:
        sampled, label = run.sampling_weights, group.label(run)
        if sampled is None:
            sentences.append(f"{label} does not record its sampling weights, so they are not checked.")
            continue
        matching = [name for name, proxy in learned.items() if same_weights(sampled, proxy.recorded_weights)]
        if not matching:
            right = False
            sentences.append(f"{label} does not sample by the weights that a given proxy learned.")
        elif run.seed in {learned[name].seed for name in matching} or len(proxies.runs) == 1:
            seeds.append(label)
        else:
            sentences.append(f"{label} samples by the weights of {matching[0]}.")
    if seeds:
        which = "the proxy" if len(proxies.runs) == 1 else "the proxy with its seed"
        subject = f"Every run of {group.name}" if len(seeds) == len(group.runs) > 1 else _listed(seeds)
        verb = "samples" if subject.startswith("Every") or len(seeds) == 1 else "sample"
        sentences.insert(0, f"{subject} {verb} by the weights that {which} learned (compared by content).")
    return right, sentences


def _mean_weights(mixtures: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: sum(mixture[name] for mixture in mixtures) / len(mixtures) for name in mixtures[0]}


def same_weights(a: dict[str, float], b: dict[str, float] | None) -> bool:
    """Whether two mixtures are the same up to rounding."""
    if b is None or a.keys() != b.keys():
        return False
    totals = sum(a.values()), sum(b.values())
    return all(totals) and all(abs(a[name] / totals[0] - b[name] / totals[1]) <= SAME_WEIGHTS for name in a)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
