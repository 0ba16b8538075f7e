"""Formats tables: cells as text, and tables as aligned text. Pure: nothing is read or printed here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_doremi.reporting.comparison import Comparison, DomainResult, Pair, mean_and_last_weights
from megatron_doremi.reporting.differences import differences
from megatron_doremi.reporting.runs import Run

NOT_MEASURED = "-"


@dataclass(frozen=True)
class Table:
    """A table of formatted cells.

    Attributes:
        header: one cell per column; the first column is text, the others are numbers.
        rows: one tuple of cells per row.
        summary: rows below a rule.
        caption: contents and units.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    summary: tuple[tuple[str, ...], ...] = ()
    caption: str = ""


def format_loss(value: float | None) -> str:
    """Formats nats per token."""
    return NOT_MEASURED if value is None or np.isnan(value) else f"{value:.3f}"


def format_difference(value: float | None) -> str:
    """Formats a difference in nats per token with its sign, or "0.000" if it rounds to zero."""
    if value is None or np.isnan(value):
        return NOT_MEASURED
    text = f"{value:+.3f}"
    return "0.000" if float(text) == 0.0 else text


def format_weight(value: float) -> str:
    """Formats a weight: four decimals, or two significant digits below 0.001."""
    if np.isnan(value):
        return NOT_MEASURED
    return f"{value:.4f}" if value >= 0.001 or value == 0.0 else f"{value:.1e}"


def format_text(table: Table) -> str:
    """Returns the table as plain text, the first column aligned left and the others right."""
    lines = [table.header, *table.rows, *table.summary]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.header))]
    rule = "  ".join("-" * width for width in widths)
    text = [table.caption] * bool(table.caption) + [_text_line(table.header, widths), rule]
    text += [_text_line(row, widths) for row in table.rows]
    if table.summary:
        text += [rule] + [_text_line(row, widths) for row in table.summary]
    return "\n".join(text)


def _text_line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [cells[0].ljust(widths[0])]
    padded += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return "  ".join(padded).rstrip()


def comparison_table(comparison: Comparison) -> Table:
    """Returns the table of the comparison."""
    header = (
        "domain",
        "train tokens",
        "natural weight",
        "DoReMi weight",
        "last weight",
        "baseline",
        "main",
        "difference",
    )
    worst = comparison.worst_names
    if worst[0] == worst[1]:
        worst_label = f"worst domain ({worst[0]})"
    else:
        worst_label = f"worst domain ({worst[0]}; {worst[1]})"
    return Table(
        header,
        tuple(_domain_cells(domain) for domain in comparison.domains),
        (
            _summary_cells("uniform mean", comparison.uniform_mean),
            _summary_cells(worst_label, comparison.worst),
            _summary_cells("token mean", comparison.token_mean),
            *(
                (f"differs: {each.name}", "", "", "", "", each.values["baseline"], each.values["main"], "")
                for each in comparison.differences
            ),
        ),
        "Held-out loss of baseline and main in nats per token, lower is better; difference: main - baseline.",
    )


def _domain_cells(domain: DomainResult) -> tuple[str, ...]:
    return (
        domain.name,
        f"{domain.tokens:,}",
        format_weight(domain.natural_weight),
        format_weight(domain.doremi_weight),
        format_weight(domain.last_weight),
        *_pair_cells(domain.loss),
    )


def _pair_cells(pair: Pair) -> tuple[str, str, str]:
    return format_loss(pair.baseline), format_loss(pair.main), format_difference(pair.difference)


def _summary_cells(label: str, pair: Pair) -> tuple[str, ...]:
    return (label, "", "", "", "", *_pair_cells(pair))


def run_table(run: Run) -> Table:
    """Returns the table of one run: training loss, held-out loss and, for a proxy, weights per domain."""
    names = run.domain_names()
    header = ["domain"]
    columns: list[list[str]] = []
    if run.has_weights:
        in_file = run.recorded_weights is not None and set(run.recorded_weights) == set(names)
        known = run if in_file else _without_weights_file(run)
        mean, last = mean_and_last_weights(known, names)
        header += ["mean weight", "last weight"]
        columns += [[format_weight(float(each)) for each in vector] for vector in (mean, last)]
    summary: tuple[tuple[str, ...], ...] = ()
    if run.iterations.size:
        final = last_finite(run.loss.ordered(names))
        header.append("training loss")
        columns.append([format_loss(float(each)) for each in final])
    if run.evaluations:
        first, newest = run.evaluations[0], run.evaluations[-1]
        header.append("held-out loss")
        columns.append([format_loss(newest.losses.get(name)) for name in names])
        if newest is not first:
            header.append(f"since step {first.iteration}")
            changes = [Pair(first.losses.get(name), newest.losses.get(name)).difference for name in names]
            columns.append([format_difference(change) for change in changes])
        summary = _run_summary(run, header)
    rows = tuple((name, *(column[index] for column in columns)) for index, name in enumerate(names))
    caption = f"{run.path} (phase {run.phase}): last values, losses in nats per token"
    return Table(tuple(header), rows, summary, caption)


def _run_summary(run: Run, header: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    first, newest = run.evaluations[0], run.evaluations[-1]
    labeled = (
        ("uniform mean", Pair(first.uniform_mean, newest.uniform_mean)),
        (f"worst domain ({newest.worst[0]})", Pair(first.worst[1], newest.worst[1])),
        ("token mean", Pair(first.token_mean, newest.token_mean)),
    )
    place = header.index("held-out loss")
    rows = []
    for label, pair in labeled:
        cells = [label] + [""] * (len(header) - 1)
        cells[place] = format_loss(pair.main)
        if newest is not first:
            cells[place + 1] = format_difference(pair.difference)
        rows.append(tuple(cells))
    return tuple(rows)


def across_runs_table(labels: Sequence[str], runs: Sequence[Run]) -> Table | None:
    """Returns the last held-out losses of several runs, one column per run; None if fewer than two were evaluated."""
    shown = {label: run for label, run in zip(labels, runs, strict=True) if run.evaluations}
    evaluated = [(label, run.evaluations[-1]) for label, run in shown.items()]
    if len(evaluated) < 2:
        return None
    names = dict.fromkeys(name for _, evaluation in evaluated for name in evaluation.losses)
    rows = tuple((name, *(format_loss(each.losses.get(name)) for _, each in evaluated)) for name in names)
    summary = (
        ("uniform mean", *(format_loss(each.uniform_mean) for _, each in evaluated)),
        ("worst domain", *(format_loss(each.worst[1]) for _, each in evaluated)),
        ("token mean", *(format_loss(each.token_mean) for _, each in evaluated)),
        *(
            (f"differs: {difference.name}", *(difference.values.get(label, NOT_MEASURED) for label in shown))
            for difference in differences(shown)
        ),
    )
    header = ("domain", *(f"{label} @{each.iteration}" for label, each in evaluated))
    return Table(header, rows, summary, "Held-out loss in nats per token (run @step of its last evaluation)")


def last_finite(values: np.ndarray) -> np.ndarray:
    """Returns each column's last value that is not NaN: [lines, domains] to [domains]; NaN if there is none."""
    result = np.full(values.shape[1], np.nan)
    for column in range(values.shape[1]):
        present = np.flatnonzero(~np.isnan(values[:, column]))
        if present.size:
            result[column] = values[present[-1], column]
    return result


def _without_weights_file(run: Run) -> Run:
    return replace(run, recorded_weights=None)
