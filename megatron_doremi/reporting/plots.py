"""Draws the figures of a report with matplotlib's object interface: no window, no state between figures.

Every function returns a Figure; `png` renders it. A domain has the same color and line style in all figures; colors
repeat after eight domains, with another line style.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatterMathtext, MaxNLocator

from megatron_doremi.reporting.comparison import Comparison, running_mean
from megatron_doremi.reporting.evaluations import Evaluation
from megatron_doremi.reporting.runs import Floats, Integers
from megatron_doremi.reporting.tables import format_difference

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#5b3a8c", "#3d3d3d")
LINE_STYLES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.2, 1.2)), (0, (6, 1.4, 1.2, 1.4)))
BASELINE_COLOR, MAIN_COLOR, NATURAL_COLOR, GUIDE_COLOR = "#8a8f98", "#0072b2", "#b9bec7", "#6b7280"
BETTER_COLOR, WORSE_COLOR = "#1a7f4b", "#b42318"
# A figure has no more pixels than this: more points only cost time and bytes.
MAX_POINTS = 1500
SMOOTHING_PARTS = 60
MAX_LABEL = 26
STYLE: dict[Any, Any] = {
    "font.size": 10.0,
    "axes.titlesize": 11.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": "#9aa0a8",
    "grid.color": "#e6e8ec",
    "grid.linewidth": 0.8,
    "xtick.color": "#3a3f47",
    "ytick.color": "#3a3f47",
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "figure.constrained_layout.w_pad": 0.09,
    "figure.constrained_layout.h_pad": 0.09,
    "savefig.dpi": 130,
}


def png(figure: Figure) -> bytes:
    """Returns the figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=STYLE["savefig.dpi"], facecolor="white")
    return buffer.getvalue()


def smooth(values: Floats) -> Floats:
    """Returns the centered moving mean over about a sixtieth of the rows: [lines, domains] to [lines, domains].

    NaN values are skipped. The window grows from one row at the start, so that the steep fall of the first steps,
    which drives the weights most, stays visible. At the end it loses only its right half, which avoids a final spike.
    """
    count = values.shape[0]
    half = max(count // (2 * SMOOTHING_PARTS), 1 if count > 20 else 0)
    present = ~np.isnan(values)
    zero = np.zeros((1, values.shape[1]))
    sums = np.concatenate([zero, np.cumsum(np.where(present, values, 0.0), axis=0)])
    counts = np.concatenate([zero, np.cumsum(present, axis=0)])
    place = np.arange(count)
    reach = np.minimum(place, half)
    low, high = place - reach, np.minimum(place + reach + 1, count)
    number = counts[high] - counts[low]
    return np.where(number > 0, (sums[high] - sums[low]) / np.maximum(number, 1), np.nan)


def weights_over_time(iterations: Integers, weights: Floats, names: Sequence[str], floor: float | None) -> Figure:
    """Draws alpha_t (faint) and its running mean (strong) twice: linear and logarithmic.

    Args:
        iterations: [steps].
        weights: [steps, domains].
        names: [domains].
        floor: c / k, or None if it is unknown.
    """
    mean = running_mean(weights)
    with matplotlib.rc_context(STYLE):
        figure, panels = _figure(len(names), panels=2)
        for axes, scale in zip(panels, ("linear", "log"), strict=True):
            _lines(axes, iterations, weights, mean, names)
            axes.axhline(1.0 / len(names), color=GUIDE_COLOR, linewidth=0.9, linestyle="--", zorder=1)
            if floor:
                axes.axhline(floor, color=GUIDE_COLOR, linewidth=0.9, linestyle=":", zorder=1)
            axes.set_yscale(scale)
            axes.set_title(f"Domain weights, {_scale_name(scale)} scale")
        panels[0].set_ylim(bottom=0.0)
        panels[0].set_ylabel("weight")
        positive = _positive(weights)
        if np.isfinite(positive).any():
            lowest = float(np.nanmin(positive))
            panels[1].set_ylim(bottom=0.7 * min(lowest, floor or lowest))
        guides = [("--", f"uniform 1/{len(names)} = {1 / len(names):.3g}")]
        guides += [(":", f"floor c/{len(names)} = {floor:.2g}")] if floor else []
        _legend(figure, panels, mean, names, "running mean (end); faint: each step", guides)
        return figure


def loss_over_time(
    iterations: Integers,
    losses: Floats,
    names: Sequence[str],
    title: str = "Training loss by domain",
    label: str = "loss",
) -> Figure:
    """Draws training losses [lines, domains] in nats per token, or scores: raw (faint) and smoothed (strong)."""
    smoothed = smooth(losses)
    with matplotlib.rc_context(STYLE):
        figure, panels = _figure(len(names), panels=1)
        _lines(panels[0], iterations, losses, smoothed, names)
        panels[0].set_title(title)
        panels[0].set_ylabel(f"{label} (nats per token)")
        _limit_to_bulk(panels[0], losses, smoothed)
        _legend(figure, panels, smoothed, names, "smoothed (end); faint: each line", [])
        return figure


def excess_over_time(iterations: Integers, excess: Floats, names: Sequence[str]) -> Figure:
    """Draws the excess loss lambda_t [steps, domains] over the reference in nats per token, linear and log.

    The excess of the first steps is a hundred times that of the last ones, which a linear scale alone would hide.
    """
    smoothed = smooth(excess)
    with matplotlib.rc_context(STYLE):
        figure, panels = _figure(len(names), panels=2)
        for axes, scale in zip(panels, ("linear", "log"), strict=True):
            # On a logarithmic scale single steps scatter over decades and would fill the background with gray.
            raw = excess if scale == "linear" else None
            _lines(axes, iterations, raw, smoothed if scale == "linear" else _positive(smoothed), names)
            axes.set_yscale(scale)
            axes.set_title(f"Excess loss over the reference, {_scale_name(scale)} scale")
        panels[0].set_ylabel("excess loss (nats per token)")
        _limit_to_bulk(panels[0], excess, smoothed)
        positive = _positive(smoothed)
        if np.isfinite(positive).any():
            panels[1].set_ylim(0.7 * np.nanmin(positive), 1.4 * np.nanmax(positive))
        _legend(figure, panels, smoothed, names, "smoothed (end); faint, left: each step", [])
        return figure


def weight_bars(natural: Floats, doremi: Floats, names: Sequence[str]) -> Figure:
    """Draws natural and DoReMi weights, each [domains], as paired bars, sorted by DoReMi weight."""
    order = np.argsort(doremi, kind="stable")
    place = np.arange(len(names))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.0, 0.42 * len(names) + 1.5), layout="constrained")
        axes = figure.subplots()
        axes.barh(place + 0.2, doremi[order], 0.38, color=MAIN_COLOR, label="DoReMi (mean over all steps)")
        axes.barh(place - 0.2, natural[order], 0.38, color=NATURAL_COLOR, label="natural (share of tokens)")
        pad = 0.008 * max(doremi.max(), natural.max())
        for row, index in enumerate(order):
            for offset, value in ((0.2, doremi[index]), (-0.2, natural[index])):
                text = axes.text(value + pad, row + offset, f"{value:.3f}", va="center", fontsize=8, zorder=4)
                text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.6})
        axes.axvline(1 / len(names), color=GUIDE_COLOR, linewidth=1, linestyle="--", zorder=0.9)
        axes.plot([], [], color=GUIDE_COLOR, linewidth=1, linestyle="--", label=f"uniform 1/{len(names)}")
        _row_labels(axes, [names[index] for index in order], "weight", "Domain weights")
        axes.set_xlim(0, 1.1 * max(doremi.max(), natural.max()) or 1.0)
        _legend_below(figure, axes, 3)
        return figure


def held_out_pairs(comparison: Comparison) -> Figure:
    """Draws the last held-out losses per domain as paired dots, and main - baseline as bars next to them."""
    rows = [domain for domain in reversed(comparison.domains) if domain.loss.difference is not None]
    baseline = np.array([domain.loss.baseline for domain in rows], dtype=np.float64)
    main = np.array([domain.loss.main for domain in rows], dtype=np.float64)
    place = np.arange(len(rows))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.0, 0.34 * len(rows) + 1.7), layout="constrained")
        losses, change = figure.subplots(1, 2, sharey=True, width_ratios=(1.15, 1.0))
        losses.hlines(place, np.minimum(baseline, main), np.maximum(baseline, main), color="#c9cdd4", lw=3)
        losses.scatter(baseline, place, s=52, color=BASELINE_COLOR, label="baseline", zorder=3)
        losses.scatter(main, place, s=46, color=MAIN_COLOR, label="main", zorder=4, alpha=0.9)
        _row_labels(losses, [domain.name for domain in rows], "nats per token", "Held-out loss")
        _difference_bars(change, main - baseline)
        _legend_below(figure, losses, 2)
        return figure


def _difference_bars(axes: Axes, differences: Floats) -> None:
    """Draws main - baseline [domains], with each bar labeled as in the table."""
    reach = max(float(np.abs(differences).max()), 1e-3)
    for row, difference in enumerate(differences):
        text = format_difference(float(difference))
        color = {"-": BETTER_COLOR, "+": WORSE_COLOR}.get(text[0], GUIDE_COLOR)
        axes.barh(row, difference, 0.56, color=color, alpha=0.85)
        side, align = (-1, "right") if difference < 0 else (1, "left")
        place = float(difference) + side * 0.03 * reach
        axes.text(place, row, text, va="center", ha=align, fontsize=9, color=color)
    axes.axvline(0.0, color="#9aa0a8", linewidth=1)
    axes.set_xlim(-1.35 * reach, 1.35 * reach)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(False, axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("nats per token")
    axes.set_title("main - baseline (negative is better)")


def evaluations_over_time(evaluations: Mapping[str, Sequence[Evaluation]], names: Sequence[str]) -> Figure:
    """Draws held-out losses over the steps: a panel for the uniform mean, then one per domain.

    Args:
        evaluations: evaluations of each run by its label; meant for a few runs.
        names: domains, in the order of the panels.
    """
    columns = 4 if len(names) + 1 <= 12 else 5
    rows = -(-(len(names) + 1) // columns)
    palette = _run_colors(tuple(evaluations))
    with matplotlib.rc_context({**STYLE, "axes.titlesize": 9.5, "font.size": 9.0}):
        figure = Figure(figsize=(2.75 * columns, 1.95 * rows + 0.75), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
        for panel, name in zip(grid.flat, ["", *names], strict=False):
            for label, history in evaluations.items():
                measured = [each for each in history if not name or name in each.losses]
                values = [each.losses[name] if name else each.uniform_mean for each in measured]
                steps = [each.iteration for each in measured]
                panel.plot(steps, values, color=palette[label], linewidth=1.6, marker="o", markersize=2.6)
            panel.set_title(_label(name) if name else "uniform mean")
            panel.xaxis.set_major_locator(MaxNLocator(3, integer=True))
            panel.yaxis.set_major_locator(MaxNLocator(4))
        for panel in list(grid.flat)[len(names) + 1 :]:
            panel.set_axis_off()
        for column in range(columns):
            used = [row for row in range(rows) if row * columns + column <= len(names)]
            if used:
                grid[used[-1], column].tick_params(labelbottom=True)
        handles = [grid[0, 0].plot([], [], color=color, linewidth=2.4)[0] for color in palette.values()]
        figure.legend(handles, [_label(label) for label in palette], loc="outside upper left", ncols=6)
        figure.supylabel("held-out loss (nats per token)", fontsize=9.5)
        figure.supxlabel("step", fontsize=9.5)
        return figure


def _run_colors(labels: Sequence[str]) -> dict[str, str]:
    fixed = {"baseline": BASELINE_COLOR, "main": MAIN_COLOR}
    return {label: fixed.get(label, COLORS[index % len(COLORS)]) for index, label in enumerate(labels)}


def _scale_name(scale: str) -> str:
    return "logarithmic" if scale == "log" else "linear"


def _positive(values: Floats) -> Floats:
    """Returns values with NaN for those that a logarithmic scale cannot show."""
    return np.where(values > 0, values, np.nan)


def _limit_to_bulk(axes: Axes, values: Floats, smoothed: Floats) -> None:
    """Limits the y axis so that single spikes of the faint lines do not flatten everything else."""
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return
    low, high = np.quantile(finite, [0.0005, 0.9995])
    low, high = min(low, np.nanmin(smoothed)), max(high, np.nanmax(smoothed))
    margin = 0.04 * max(high - low, 1e-3)
    axes.set_ylim(max(low - margin, 0.0) if low >= 0 else low - margin, high + margin)


def _figure(domain_count: int, panels: int) -> tuple[Figure, list[Axes]]:
    """Returns a figure tall enough for its legend, and its panels."""
    height = min(max(4.4, 0.215 * domain_count + 1.3), 9.0)
    figure = Figure(figsize=(13.0 if panels == 2 else 10.5, height), layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def _row_labels(axes: Axes, names: Sequence[str], unit: str, title: str) -> None:
    axes.set_yticks(np.arange(len(names)), [_label(name) for name in names])
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.set_xlabel(unit)
    axes.set_title(title)


def _lines(axes: Axes, iterations: Integers, raw: Floats | None, strong: Floats, names: Sequence[str]) -> None:
    points = _points(len(iterations))
    # Many faint lines would merge into one gray area.
    faint = 0.28 if len(names) <= 10 else 0.13
    steps = iterations[points]
    for index in range(len(names)):
        color, style = _look(index)
        if raw is not None:
            axes.plot(steps, raw[points, index], color=color, alpha=faint, linewidth=0.7, zorder=2)
        axes.plot(steps, strong[points, index], color=color, linestyle=style, linewidth=1.9, zorder=3)
    axes.set_xlabel("step")
    axes.margins(x=0.01)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _points(count: int) -> Integers:
    """Returns the indices of the rows to draw: all, or MAX_POINTS evenly spaced ones including both ends."""
    return np.unique(np.linspace(0, count - 1, min(count, MAX_POINTS)).round().astype(np.int64))


def _look(index: int) -> tuple[str, Any]:
    return COLORS[index % len(COLORS)], LINE_STYLES[index // len(COLORS) % len(LINE_STYLES)]


def _legend(
    figure: Figure,
    panels: Sequence[Axes],
    strong: Floats,
    names: Sequence[str],
    title: str,
    guides: Sequence[tuple[str, str]],
) -> None:
    """Draws the legend to the right of the panels, sorted by the last values of the lines, which it shows."""
    ends = np.array([_end(strong[:, index]) for index in range(len(names))])
    order = np.argsort(-np.nan_to_num(ends, nan=-np.inf), kind="stable")
    handles, labels = [], []
    for index in order:
        color, style = _look(int(index))
        handles.append(panels[0].plot([], [], color=color, linestyle=style, linewidth=1.9)[0])
        labels.append(f"{_label(names[index])}  {ends[index]:.3g}")
    for style, label in guides:
        handles.append(panels[0].plot([], [], color=GUIDE_COLOR, linestyle=style, linewidth=1)[0])
        labels.append(label)
    figure.legend(
        handles,
        labels,
        loc="outside right center",
        ncols=1 if len(names) <= 36 else 2,
        title=title,
        title_fontsize=9,
        alignment="left",
        handlelength=2.8,
    )
    for axes in panels:
        if axes.get_yscale() == "log":
            axes.yaxis.set_major_formatter(LogFormatterMathtext())


def _end(values: Floats) -> float:
    finite = values[~np.isnan(values)]
    return float(finite[-1]) if finite.size else float("nan")


def _legend_below(figure: Figure, axes: Axes, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def _label(name: str) -> str:
    """Shortens and escapes a name so that matplotlib neither parses it as math nor hides it from a legend."""
    short = name if len(name) <= MAX_LABEL else f"{name[: MAX_LABEL - 3]}..."
    # A lone surrogate cannot be drawn.
    plain = short.replace("$", r"\$").encode("utf-8", "backslashreplace").decode("utf-8")
    return f" {plain}" if plain.startswith("_") else plain
