"""Makes the tables of a report from a study. Pure: nothing is read or printed here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

import numpy as np

from megatron_doremi.reporting.comparison import TOKEN_MEAN, UNIFORM_MEAN, WORST, RivalComparison, Study
from megatron_doremi.reporting.evaluations import HeldOut
from megatron_doremi.reporting.groups import Group, same_weights
from megatron_doremi.reporting.mixture import (
    epochs,
    last_weights,
    learned_weights,
    mean_by_domain,
    natural_weights,
    trained_tokens,
)
from megatron_doremi.reporting.runs import Run
from megatron_doremi.reporting.tables import (
    Column,
    Row,
    Table,
    Value,
    format_count,
    format_difference,
    format_epochs,
    format_interval,
    format_loss,
    format_seconds,
    format_weight,
)
from megatron_doremi.reporting.verdict import reading

LOWER_IS_BETTER = "lower is better; a difference below 0 is better"


def difference_table(study: Study) -> Table:
    """Worst domain, uniform mean and token mean of the subject against every rival."""
    rows: list[Row] = []
    for comparison in study.comparisons:
        for name, contrast in comparison.summary.items():
            paired = contrast.paired
            rows.append(
                (
                    comparison.pairing.rival,
                    name,
                    fmean(contrast.subject),
                    fmean(contrast.rival),
                    paired.mean,
                    paired.standard_deviation,
                    format_interval(paired.interval),
                    float(paired.count),
                    reading(contrast),
                )
            )
    columns = (
        Column("against"),
        Column("figure"),
        Column(study.subject or "", format_loss),
        Column("rival", format_loss),
        Column("difference", format_difference),
        Column("SD over seeds", format_loss),
        Column("95 % interval"),
        Column("pairs", format_count),
        Column("reading"),
    )
    caption = f"Held-out loss in {study.unit.value}, means over seeds; {LOWER_IS_BETTER}."
    return Table("differences", columns, tuple(rows), caption=caption)


def held_out_table(study: Study) -> Table:
    """Held-out loss by domain: a column for each group (mean over its seeds), and the differences from each rival.

    With many domains, rows are sorted by the first difference, so that both ends can be shown.
    """
    natural = natural_weights(study.domain_tokens)
    learned = [learned_weights(run) for run in study.pooled_proxies.values()]
    figures = {group.name: _held_out(study, group) for group in study.compared}
    columns = [Column("domain")]
    rows: list[list[Value]] = [[name] for name in study.names]
    if natural:
        columns.append(Column("natural", format_weight))
        _append(rows, [natural.get(name) for name in study.names])
    if learned:
        columns.append(Column(study.learned_name, format_weight))
        _append(rows, [_mean(mean_by_domain(learned, name)) for name in study.names])
    places: dict[str, int] = {}
    for group in study.compared:
        places[group.name] = len(columns)
        columns.append(Column(_column_name(study, group), format_loss))
        _append(rows, [_mean(_losses(figures[group.name], name)) for name in study.names])
        if len(group.runs) == 1 and figures[group.name] and figures[group.name][0].intervals:
            intervals = figures[group.name][0].intervals
            columns.append(Column("95 % over documents"))
            _append(rows, [_plain_interval(intervals.get(name)) for name in study.names])
    before = len(columns)
    for comparison in study.comparisons:
        places[f"vs {comparison.pairing.rival}"] = len(columns)
        columns.append(Column(f"vs {comparison.pairing.rival}", format_difference))
        paired = {name: each.paired for name, each in comparison.domains.items()}
        _append(rows, [paired[name].mean if name in paired else None for name in study.names])
        if len(comparison.pairing.pairs) > 1:
            columns.append(Column("95 % interval"))
            _append(rows, [format_interval(paired[name].interval) if name in paired else "" for name in study.names])
    if study.comparisons:
        rows.sort(key=lambda row: (row[before] is None, row[before] or 0.0))
    width = len(columns)
    summary = [_summary_row(study, figures, name, places, width) for name in (WORST, UNIFORM_MEAN, TOKEN_MEAN)]
    step = _common_step(study)
    # Models from elsewhere, such as Hugging Face folders, have no step.
    at = f" at step {step:,}" if step else ""
    caption = f"Held-out loss in {study.unit.value}{at}; {LOWER_IS_BETTER}."
    return Table(
        "held_out_loss",
        tuple(columns),
        tuple(map(tuple, rows)),
        tuple(row for row in summary if any(isinstance(value, float) for value in row)),
        caption,
    )


def _summary_row(
    study: Study, figures: Mapping[str, Sequence[HeldOut]], name: str, places: Mapping[str, int], width: int
) -> Row:
    """A row of `width` cells; `places` gives the column of each group's loss and of each difference ("vs RIVAL")."""
    row: list[Value] = [name, *[""] * (width - 1)]
    for group in study.compared:
        row[places[group.name]] = _mean([v for each in figures[group.name] if (v := _figure(each, name)) is not None])
    for comparison in study.comparisons:
        contrast, place = comparison.summary.get(name), places[f"vs {comparison.pairing.rival}"]
        if contrast is not None:
            row[place] = contrast.paired.mean
            if contrast.paired.interval is not None:
                row[place + 1] = format_interval(contrast.paired.interval)
    return tuple(row)


def domain_table(study: Study, comparison: RivalComparison) -> Table:
    """Who gets better and who gets worse against one rival, best first."""
    subject, rival = comparison.pairing.subject, comparison.pairing.rival
    ratio = _weight_ratios(study, comparison)
    rows: list[Row] = []
    for name, contrast in sorted(comparison.domains.items(), key=lambda item: item[1].paired.mean):
        paired = contrast.paired
        better = sum(each < 0 for each in contrast.differences)
        rows.append(
            (
                name,
                ratio.get(name),
                fmean(contrast.subject),
                fmean(contrast.rival),
                paired.mean,
                paired.standard_deviation,
                format_interval(paired.interval),
                f"{better} of {paired.count}",
                reading(contrast),
            )
        )
    columns = (
        Column("domain"),
        Column("weight ratio", format_epochs),
        Column(subject, format_loss),
        Column(rival, format_loss),
        Column("difference", format_difference),
        Column("SD over seeds", format_loss),
        Column("95 % interval"),
        Column("pairs better"),
        Column("reading"),
    )
    caption = (
        f"{subject} against {rival} in {study.unit.value}, best first; weight ratio: sampling weight of {subject} over "
        f"that of {rival}."
    )
    return Table(f"{subject}_against_{rival}", columns, tuple(rows), caption=caption)


def _weight_ratios(study: Study, comparison: RivalComparison) -> dict[str, float]:
    """Mean sampling weight of the subject over the rival's, by domain; {} if not recorded."""
    sides = []
    for number in (0, 1):
        mixtures = [pair[number].sampling_weights for pair in comparison.pairing.pairs]
        sides.append([mixture for mixture in mixtures if mixture is not None])
    if not sides[0] or not sides[1]:
        return {}
    ratios = {}
    for name in study.names:
        own, other = _mean(mean_by_domain(sides[0], name)), _mean(mean_by_domain(sides[1], name))
        if own is not None and other:
            ratios[name] = own / other
    return ratios


def weights_table(study: Study) -> Table | None:
    """Learned, natural and sampling weights by domain, with epochs; None if no run has weights."""
    learned = [learned_weights(run) for run in study.pooled_proxies.values()]
    natural = natural_weights(study.domain_tokens)
    columns = [Column("domain")]
    rows: list[list[Value]] = [[name] for name in study.names]
    if natural:
        columns += [Column("training tokens", format_count), Column("natural", format_weight)]
        _append(rows, [float(study.domain_tokens.get(name, 0)) for name in study.names])
        _append(rows, [natural.get(name) for name in study.names])
    by_name_mean: dict[str, float] = {}
    if learned:
        by_name_mean = _mean_mixture(learned, study.names)
        by_name = {name: mean_by_domain(learned, name) for name in study.names}
        last = [last_weights(run) for run in study.pooled_proxies.values()]
        columns.append(Column(study.learned_name, format_weight))
        _append(rows, [by_name_mean.get(name) for name in study.names])
        if len(learned) > 1:
            columns += [Column("lowest", format_weight), Column("highest", format_weight)]
            _append(rows, [min(by_name[name], default=None) for name in study.names])
            _append(rows, [max(by_name[name], default=None) for name in study.names])
        columns.append(Column("at the end", format_weight))
        _append(rows, [_mean(mean_by_domain(last, name)) for name in study.names])
    for group in study.compared if study.subject is not None else ():
        sampling = [run.sampling_weights for run in group.runs if run.sampling_weights is not None]
        passes = [each for run in group.runs if (each := epochs(run, study.domain_tokens))]
        known = [natural, by_name_mean, dict.fromkeys(study.names, 1.0)]
        if sampling and not any(same_weights(_mean_mixture(sampling, study.names), each) for each in known):
            columns.append(Column(f"{group.name} samples", format_weight))
            _append(rows, [_mean(mean_by_domain(sampling, name)) for name in study.names])
        if passes:
            columns.append(Column(f"{group.name} epochs", format_epochs))
            _append(rows, [_mean(mean_by_domain(passes, name)) for name in study.names])
    if len(columns) == 1:
        return None
    if learned:
        place = [column.name for column in columns].index(study.learned_name)
        rows.sort(key=lambda row: -float(row[place] or 0.0))
    caption = f"Domain weights; uniform is 1/{len(study.names)} = {format_weight(1 / max(1, len(study.names)))}"
    caption += f"; learned: mean over all steps{study.pool(len(learned))}" if learned else ""
    return Table("weights", tuple(columns), tuple(map(tuple, rows)), caption=f"{caption}.")


def run_table(study: Study) -> Table | None:
    """The last held-out figures of every run; None if none was evaluated."""
    rows: list[Row] = []
    for label, run in study.runs.items():
        figures = study.held_out(run)
        if figures is not None:
            name, worst = figures.worst
            step = float(run.evaluations[-1].iteration)
            rows.append((label, _seed(run), step, figures.uniform_mean, worst, name, figures.token_mean))
    if not rows:
        return None
    columns = (
        Column("run"),
        Column("seed"),
        Column("step", format_count),
        Column("uniform mean", format_loss),
        Column("worst", format_loss),
        Column("worst domain"),
        Column("token mean", format_loss),
    )
    return Table("runs", columns, tuple(rows), caption=f"Last evaluation of every run, in {study.unit.value}.")


def cost_table(study: Study) -> Table:
    """Steps, tokens and time of every run, with a sum for each group of several."""
    rows, summary = [], []
    for group in study.groups:
        costs = []
        for run in group.runs:
            costs.append((trained_tokens(run), training_seconds(run)))
            tokens, seconds = costs[-1]
            speed = tokens / seconds if tokens is not None and seconds else None
            processes, steps = _processes(run), float(run.last_step)
            rows.append((group.label(run), run.phase, _seed(run), processes, steps, tokens, seconds, speed))
        if len(group.runs) > 1:
            sums = [_sum([cost[place] for cost in costs]) for place in (0, 1)]
            summary.append((f"{group.name}, {len(group.runs)} runs", "", "", "", "", *sums, ""))
    columns = (
        Column("run"),
        Column("phase"),
        Column("seed"),
        Column("processes", format_count),
        Column("steps", format_count),
        Column("tokens", format_count),
        Column("time", format_seconds),
        Column("tokens/s", format_count),
    )
    caption = "Training cost; time without evaluations and checkpoints."
    return Table("cost", columns, tuple(rows), tuple(summary), caption)


def _processes(run: Run) -> float | None:
    """The processes of a run's layout; None if config.json does not record it."""
    layout = run.config.get("topology")
    sizes = list(layout.values()) if isinstance(layout, dict) else []
    return float(math.prod(sizes)) if sizes and all(isinstance(size, int) for size in sizes) else None


def training_seconds(run: Run) -> float | None:
    """Seconds that a run's steps took, without evaluations and checkpoints; None if it does not record them."""
    step_ms = run.scalars.get("elapsed_ms")
    if step_ms is None or not np.isfinite(step_ms).any():
        return None
    steps = np.diff(run.iterations, prepend=0).astype(np.float64)
    if len(steps) > 1:
        # The first line of a run that was branched off another is not its first interval.
        steps[0] = min(steps[0], float(np.median(steps[1:])))
    return float(np.nansum(step_ms * steps) / 1e3)


def _held_out(study: Study, group: Group) -> list[HeldOut]:
    """The last losses of a group's runs: of those that stand in a pair, if the group is compared."""
    paired: list[Run] = []
    for comparison in study.comparisons:
        if group.name in (comparison.pairing.subject, comparison.pairing.rival):
            place = 0 if group.name == comparison.pairing.subject else 1
            paired += [runs[place] for runs in comparison.pairing.pairs if runs[place] not in paired]
    return [each for run in paired or group.runs if (each := study.held_out(run)) is not None]


def _figure(figures: HeldOut, name: str) -> float | None:
    if name == TOKEN_MEAN:
        return figures.token_mean
    return figures.worst[1] if name == WORST else figures.uniform_mean


def _losses(figures: Sequence[HeldOut], name: str) -> list[float]:
    return [each.losses[name] for each in figures if name in each.losses]


def _column_name(study: Study, group: Group) -> str:
    """The group's name, with the step of its evaluation unless all groups of the study share it, or it has none."""
    steps = _steps([group])
    return group.name if _common_step(study) is not None or steps == "0" else f"{group.name} @{steps}"


def _common_step(study: Study) -> int | None:
    """The step of every last evaluation shown; None if they differ."""
    steps = {run.evaluations[-1].iteration for group in study.compared for run in group.runs if run.evaluations}
    return steps.pop() if len(steps) == 1 else None


def _steps(groups: Sequence[Group]) -> str:
    steps = sorted({run.evaluations[-1].iteration for group in groups for run in group.runs if run.evaluations})
    return "-".join(str(step) for step in dict.fromkeys((steps[0], steps[-1])))


def _plain_interval(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"[{format_loss(interval[0])}, {format_loss(interval[1])}]"


def _mean_mixture(mixtures: Sequence[Mapping[str, float]], names: Sequence[str]) -> dict[str, float]:
    """The mean of each domain's weight over the mixtures that have it."""
    return {name: fmean(values) for name in names if (values := mean_by_domain(mixtures, name))}


def _append(rows: Sequence[list[Value]], values: Sequence[Value]) -> None:
    for row, value in zip(rows, values, strict=True):
        row.append(value)


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) if known else None


def _seed(run: Run) -> str:
    return "-" if run.seed is None else str(run.seed)
