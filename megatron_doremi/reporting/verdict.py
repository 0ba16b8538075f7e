"""Says in sentences what a study shows, and no more: better, worse, or that no difference can be seen."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from megatron_doremi.reporting.comparison import UNIFORM_MEAN, WORST, Contrast, RivalComparison, Study
from megatron_doremi.reporting.mixture import last_weights, learned_weights, mean_by_domain
from megatron_doremi.reporting.tables import format_difference, format_interval, format_weight

# Two planted domains of the embedded corpus need little weight: one cannot be learned, the other is learned at once.
PLANTED = ("noise", "boilerplate")
_LISTED = 5


def verdict(study: Study) -> str:
    """Returns one sentence on worst domain and mean against every rival."""
    if not study.comparisons:
        if study.subject is None and len(study.runs) == 1:
            return "One run is shown, and nothing is compared; --group NAME=DIR... compares groups of runs."
        if study.subject is None:
            return "The runs are shown side by side and not compared; --group NAME=DIR... compares groups of runs."
        return f"Nothing is compared with {study.subject}: --group NAME=DIR adds a rival."
    clauses = [_clause(comparison) for comparison in study.comparisons]
    if all(comparison.pairing.decisive for comparison in study.comparisons):
        return f"{_sentence('; '.join(clauses))}."
    counts = {len(comparison.pairing.pairs) for comparison in study.comparisons}
    if counts == {1}:
        text = "One run of each cannot tell: " + "; ".join(clauses)
    elif len(counts) == 1:
        text = f"Over {counts.pop()} paired seeds, " + "; ".join(clauses)
    else:
        pairs = zip(study.comparisons, clauses, strict=True)
        text = "; ".join(f"{_over(len(each.pairing.pairs))} {clause}" for each, clause in pairs)
    text = f"{_sentence(text)} ({study.unit.value})"
    if not study.weights_match:
        text += f"; but {study.subject} does not sample by the weights that the proxy learned"
    return text + "."


def _sentence(text: str) -> str:
    """The text with a capital first letter, unless it begins with the name of a group."""
    first = text.split()[0]
    return text[0].upper() + text[1:] if first in ("no", "over", "one") else text


def _over(count: int) -> str:
    return "one pair cannot tell:" if count == 1 else f"over {count} paired seeds"


def _clause(comparison: RivalComparison) -> str:
    """What worst domain and mean say against one rival."""
    pairing = comparison.pairing
    subject, rival = pairing.subject, pairing.rival
    if pairing.decisive:
        names = " and ".join(dict.fromkeys(each.name for each in pairing.decisive))
        return f"{subject} and {rival} cannot be compared, since they differ in {names}"
    worst, mean = comparison.summary[WORST], comparison.summary[UNIFORM_MEAN]
    if len(pairing.pairs) == 1:
        values = format_difference(worst.paired.mean), format_difference(mean.paired.mean)
        named = _common_worst(comparison)
        place = f"the worst domain ({named})" if named else "the worst domain"
        text = f"{subject} against {rival} is {values[0]} in {place} and {values[1]} in the mean"
    else:
        text = _visible_clause(subject, rival, worst, mean, _common_worst(comparison))
    others = list(dict.fromkeys(each.name for each in pairing.differing))
    return text + (f" (they also differ in {_shortened(others)})" if others else "")


def _common_worst(comparison: RivalComparison) -> str:
    """The domain that is the worst of every run; "" if they differ in it."""
    names = {name for side in comparison.worst_names for name in side}
    return names.pop() if len(names) == 1 else ""


def _visible_clause(subject: str, rival: str, worst: Contrast, mean: Contrast, named: str) -> str:
    name = f"{named}: " if named else ""
    in_worst, in_mean = f"in the worst domain ({name}{_value(worst)})", f"in the mean ({_value(mean)})"
    signs = worst.paired.sign, mean.paired.sign
    words = {-1: "better", 1: "worse"}
    if signs == (0, 0):
        return f"no difference between {subject} and {rival} can be seen {in_worst} or {in_mean}"
    if signs[0] == signs[1]:
        return f"{subject} is {words[signs[0]]} than {rival} {in_worst} and {in_mean}"
    if 0 not in signs:
        return f"{subject} is {words[signs[0]]} than {rival} {in_worst} but {words[signs[1]]} {in_mean}"
    seen, unseen = (in_worst, in_mean) if signs[0] else (in_mean, in_worst)
    return f"{subject} is {words[sum(signs)]} than {rival} {seen}, and no difference can be seen {unseen}"


def _value(contrast: Contrast) -> str:
    paired = contrast.paired
    return f"{format_difference(paired.mean)} {format_interval(paired.interval)}"


def reading(contrast: Contrast) -> str:
    """A contrast in a word or two, for a table."""
    if contrast.paired.interval is None:
        return "one pair cannot tell"
    return {-1: "better", 0: "no difference seen", 1: "worse"}[contrast.paired.sign]


def findings(study: Study) -> list[str]:
    """Returns what else there is to say: domains that get better or worse, planted domains, checks and limits."""
    sentences = [sentence for comparison in study.comparisons for sentence in _domain_sentences(comparison)]
    if any(len(comparison.pairing.pairs) == 1 for comparison in study.comparisons):
        sentences.append("One pair has no interval: the variation between seeds was not measured. Train more seeds.")
    return [*sentences, *study.notes, *_planted_sentences(study)]


def _domain_sentences(comparison: RivalComparison) -> list[str]:
    pairing, domains = comparison.pairing, comparison.domains
    if pairing.decisive:
        return []
    if len(pairing.pairs) == 1:
        signs = {n: (each.paired.mean > 0) - (each.paired.mean < 0) for n, each in domains.items()}
        words, end = ("lower", "higher"), "in this one pair"
    else:
        signs, words = comparison.visible, ("better", "worse")
        end = f"beyond the noise of seeds; chance alone would show about {0.05 * len(domains):.2g}"
    parts = []
    for sign, word in zip((-1, 1), words, strict=True):
        names = sorted((n for n, s in signs.items() if s == sign), key=lambda n: -abs(domains[n].paired.mean))
        values = [f"{name} {format_difference(domains[name].paired.mean)}" for name in names]
        listed = f" ({_shortened(values)})" if values else ""
        parts.append(f"{word} on {len(names)}{listed}")
    both = f"{pairing.subject} against {pairing.rival}"
    sentences = [f"Of {len(domains)} domains, {both} is {' and '.join(parts)} {end}."]
    if not _common_worst(comparison):
        sides = zip((pairing.subject, pairing.rival), comparison.worst_names, strict=True)
        listed = "; ".join(f"of {name} {_shortened(names)}" for name, names in sides)
        sentences.append(f"The runs differ in their worst domain: {listed}.")
    return sentences


def _planted_sentences(study: Study) -> list[str]:
    """Whether each planted domain lost or gained weight relative to 1/k, with numbers."""
    runs = list(study.pooled_proxies.values())
    means, lasts = [learned_weights(run) for run in runs], [last_weights(run) for run in runs]
    sentences = []
    for name in PLANTED:
        known = mean_by_domain(means, name)
        if known:
            uniform = 1.0 / len(means[0])
            mean, last = fmean(known), fmean(mean_by_domain(lasts, name))
            sentences.append(
                f"Planted domain {name} {_moved(mean, uniform)} in the mean over all steps ({format_weight(mean)}) and "
                f"{_moved(last, uniform)} at the end ({format_weight(last)}){study.pool(len(known))}, against uniform "
                f"1/{len(means[0])} = {format_weight(uniform)}."
            )
    return sentences


def _moved(weight: float, uniform: float) -> str:
    if format_weight(weight) == format_weight(uniform):
        return "kept its weight"
    return "lost weight" if weight < uniform else "gained weight"


def _shortened(texts: Sequence[str]) -> str:
    more = f", {len(texts) - _LISTED} more" if len(texts) > _LISTED else ""
    return ", ".join(texts[:_LISTED]) + more
