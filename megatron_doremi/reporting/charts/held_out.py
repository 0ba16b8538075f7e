"""Charts of the last held-out losses: differences with the noise of seeds, losses by domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from megatron_doremi.reporting.charts.chart import (
    Chart,
    Rows,
    Spec,
    extremes,
    plain_names,
    row,
    shown_if,
    toggle,
    top_legend,
)
from megatron_doremi.reporting.charts.theme import Layout, series_scale, shape_scale
from megatron_doremi.reporting.comparison import Contrast, RivalComparison, Study
from megatron_doremi.reporting.verdict import reading

# With more domains than this, charts with a row a domain show both ends, and a chart by rank shows all.
MOST_ROWS = 40
EXTREMES = 24
_READINGS = ("better", "no difference seen", "worse", "one pair cannot tell")
_READING_COLORS = ["var(--better)", "var(--muted)", "var(--worse)", "var(--muted)"]
_READING_SHAPES = ["circle", "square", "triangle-up", "square"]
# Few enough labels for a phone.
_NUMBERS = {"tickCount": 6}
_POINT = {"type": "point", "filled": True, "opacity": 1}
_SEED = {"type": "point", "filled": False, "size": 22, "strokeWidth": 1.2, "opacity": 0.75}


def held_out_charts(study: Study) -> list[Chart]:
    """The charts that a study has the figures for."""
    charts = [summary_differences(study)] if study.comparisons else []
    for number, comparison in enumerate(study.comparisons):
        charts.append(domain_differences(study, comparison, number))
        if len(comparison.domains) > MOST_ROWS:
            charts.append(ranked_differences(study, comparison, number))
    if study.compared:
        charts.append(losses_by_domain(study))
    return charts


def summary_differences(study: Study) -> Chart:
    """Worst domain and means of the subject minus each rival: mean, interval, and a point for each pair."""
    rows: Rows = []
    rivals = plain_names(comparison.pairing.rival for comparison in study.comparisons)
    for comparison in study.comparisons:
        for figure, contrast in comparison.summary.items():
            low, high = contrast.paired.interval or (None, None)
            common = {"figure": figure, "rival": comparison.pairing.rival}
            rows.append(
                row(**common, kind="mean", value=contrast.paired.mean, low=low, high=high, run=_mean_of(contrast))
            )
            for seed, value in zip(comparison.pairing.seeds, contrast.differences, strict=True):
                rows.append(row(**common, kind="seed", value=value, low=None, high=None, run=f"seed {seed}"))

    def make(layout: Layout) -> Spec:
        y = {
            "field": "figure",
            "type": "nominal",
            "title": None,
            "sort": None,
            "axis": {"labelLimit": 110, "ticks": False, "domain": False},
        }
        encoding: Spec = {
            "y": y,
            "yOffset": {"field": "rival", "sort": rivals},
            "color": {
                "field": "rival",
                "title": "against",
                "scale": series_scale(rivals, plain_names(study.color_order)),
            },
            "tooltip": _tooltips("figure", "rival", "run", "value", "low", "high"),
        }
        encoding["color"]["legend"] = top_legend(layout)
        x = {"field": "value", "type": "quantitative", "title": _difference_title(study, layout), "axis": _NUMBERS}
        return {
            "width": layout.width,
            "height": {"step": 17},
            "encoding": encoding,
            "layer": [
                {
                    **_only("mean"),
                    "params": [toggle("pick", "rival")],
                    "mark": {"type": "rule", "strokeWidth": 6, "opacity": 0.35},
                    "encoding": {
                        "x": {"field": "low", "type": "quantitative"},
                        "x2": {"field": "high"},
                        "opacity": shown_if("pick", 0.35),
                    },
                },
                {**_only("seed"), "mark": _SEED, "encoding": {"x": x, "opacity": shown_if("pick", 0.8)}},
                {
                    **_only("mean"),
                    "mark": {**_POINT, "size": 90},
                    "encoding": {"x": x, "opacity": shown_if("pick")},
                },
                _zero_rule(),
            ],
        }

    subject = study.subject
    caption = (
        f"Below 0, {subject} is better. Large point: mean over pairs; open points: one pair of runs each; bar: 95 % "
        "interval of the mean. A bar that covers 0 shows no difference."
    )
    return Chart("differences", f"{subject} against its rivals", caption, rows, make)


def domain_differences(study: Study, comparison: RivalComparison, number: int) -> Chart:
    """The differences by domain with a band of what the noise of seeds alone would show."""
    subject, rival = comparison.pairing.subject, comparison.pairing.rival
    means = {name: contrast.paired.mean for name, contrast in comparison.domains.items()}
    shown = extremes(list(comparison.domains), means, EXTREMES if len(means) > MOST_ROWS else MOST_ROWS)
    rows = _difference_rows(comparison, shown)
    order = plain_names(shown)

    def make(layout: Layout) -> Spec:
        x = {"field": "value", "type": "quantitative", "title": _difference_title(study, layout), "axis": _NUMBERS}
        tooltip = _tooltips("domain", "run", "value", "band", "reading")
        return {
            "width": layout.width,
            "height": {"step": 19},
            "encoding": {"y": _domain_axis(order, layout), "tooltip": tooltip},
            "layer": [
                {
                    **_only("mean"),
                    "mark": {"type": "bar", "color": "var(--band)", "height": {"band": 0.72}},
                    "encoding": {
                        "x": {"field": "low", "type": "quantitative"},
                        "x2": {"field": "band"},
                    },
                },
                {**_only("seed"), "mark": {**_SEED, "color": "var(--muted)"}, "encoding": {"x": x}},
                {
                    **_only("mean"),
                    "params": [toggle("pick", "reading")],
                    "mark": {**_POINT, "size": 80},
                    "encoding": {"x": x, **_reading_encoding(rows, layout), "opacity": shown_if("pick")},
                },
                _zero_rule(),
            ],
        }

    some = f"The {len(shown)} domains at both ends of {len(means)}. " if len(shown) < len(means) else ""
    band = (
        "Gray band: what the noise of seeds alone would show (95 %); a mean outside it is a visible difference. "
        if len(comparison.pairing.pairs) > 1
        else "One pair of runs: the noise of seeds is not known. "
    )
    caption = f"{some}{band}Open points: one pair of runs each. Below 0, {subject} is better."
    return Chart(f"domains_{number + 1}", f"{subject} against {rival} by domain", caption, rows, make)


def ranked_differences(study: Study, comparison: RivalComparison, number: int) -> Chart:
    """Every domain by rank: differences of hundreds of domains at a glance."""
    subject, rival = comparison.pairing.subject, comparison.pairing.rival
    means = {name: contrast.paired.mean for name, contrast in comparison.domains.items()}
    ordered = extremes(list(means), means, len(means))
    ranks = {name: float(rank) for rank, name in enumerate(plain_names(ordered), 1)}
    rows = [{**each, "rank": ranks[each["domain"]]} for each in _difference_rows(comparison, ordered)]

    def make(layout: Layout) -> Spec:
        x = {
            "field": "rank",
            "type": "quantitative",
            "title": "domains, best first",
            "scale": {"domain": [0, len(means) + 1], "nice": False},
            "axis": {"grid": False, "tickCount": 8},
        }
        y = {"field": "value", "type": "quantitative", "title": study.unit.value}
        return {
            "width": layout.width,
            "height": 260,
            "encoding": {"x": x, "tooltip": _tooltips("domain", "run", "value", "band", "reading")},
            "layer": [
                {
                    **_only("mean"),
                    "mark": {"type": "rule", "color": "var(--band)", "strokeWidth": 2},
                    "encoding": {"y": {"field": "low", "type": "quantitative"}, "y2": {"field": "band"}},
                },
                {
                    **_only("seed"),
                    "mark": {"type": "circle", "size": 6, "color": "var(--muted)", "opacity": 0.45},
                    "encoding": {"y": y},
                },
                {
                    **_only("mean"),
                    "params": [toggle("pick", "reading")],
                    "mark": {**_POINT, "size": 20},
                    "encoding": {"y": y, **_reading_encoding(rows, layout), "opacity": shown_if("pick")},
                },
                {"mark": "rule", "data": {"values": [{}]}, "encoding": {"y": {"datum": 0}, "tooltip": {"value": None}}},
            ],
        }

    caption = (
        f"All {len(means)} domains; a name shows on hover, and the table has them all. Gray: the noise of seeds (95 %)."
    )
    return Chart(f"ranks_{number + 1}", f"{subject} against {rival}, every domain", caption, rows, make)


def _difference_rows(comparison: RivalComparison, names: Sequence[str]) -> Rows:
    rows: Rows = []
    for name in names:
        contrast = comparison.domains[name]
        paired = contrast.paired
        margin = None if paired.interval is None else (paired.interval[1] - paired.interval[0]) / 2
        low = None if margin is None else -margin
        common = {"domain": name, "reading": reading(contrast)}
        rows.append(row(**common, kind="mean", value=paired.mean, low=low, band=margin, run=_mean_of(contrast)))
        for seed, value in zip(comparison.pairing.seeds, contrast.differences, strict=True):
            rows.append(row(**common, kind="seed", value=value, low=None, band=None, run=f"seed {seed}"))
    return rows


def losses_by_domain(study: Study) -> Chart:
    """The last held-out loss by domain: a mark for each group's mean, an open one for each of its runs."""
    groups = study.compared
    rows: Rows = []
    means: dict[str, float] = {}
    for group in groups:
        figures = [(run, each) for run in group.runs if (each := study.held_out(run)) is not None]
        for name in study.names:
            values = [(run.seed, each.losses[name]) for run, each in figures if name in each.losses]
            if not values:
                continue
            mean = fmean(value for _, value in values)
            means.setdefault(name, mean)
            common = {"domain": name, "group": group.name}
            low, high = figures[0][1].intervals.get(name, (None, None)) if len(figures) == 1 else (None, None)
            rows.append(row(**common, kind="mean", value=mean, run=f"mean of {len(values)}", low=low, high=high))
            if len(values) > 1:
                rows += [row(**common, kind="seed", value=v, run=f"seed {s}", low=None, high=None) for s, v in values]
    shown = extremes(list(means), means, EXTREMES if len(means) > MOST_ROWS else MOST_ROWS)[::-1]
    order, names, colors = (
        plain_names(shown),
        plain_names(group.name for group in groups),
        plain_names(study.color_order),
    )
    rows = [each for each in rows if each["domain"] in set(order)]

    def make(layout: Layout) -> Spec:
        x = {
            "field": "value",
            "type": "quantitative",
            "title": study.unit.value,
            "scale": {"zero": False},
            "axis": _NUMBERS,
        }
        color = {"field": "group", "title": None, "scale": series_scale(names, colors), "legend": top_legend(layout)}
        return {
            "width": layout.width,
            "height": {"step": 19},
            "encoding": {
                "y": _domain_axis(order, layout),
                "color": color,
                "shape": {
                    "field": "group",
                    "title": None,
                    "scale": shape_scale(names, colors),
                    "legend": top_legend(layout),
                },
                "tooltip": _tooltips("domain", "group", "run", "value", "low", "high"),
            },
            "layer": [
                {
                    **_only("mean"),
                    "mark": {"type": "rule", "strokeWidth": 1.5},
                    "encoding": {
                        "x": {"field": "low", "type": "quantitative"},
                        "x2": {"field": "high"},
                        "opacity": shown_if("pick", 0.6),
                    },
                },
                {**_only("seed"), "mark": _SEED, "encoding": {"x": x, "opacity": shown_if("pick", 0.6)}},
                {
                    **_only("mean"),
                    "params": [toggle("pick", "group")],
                    "mark": {**_POINT, "size": 60},
                    "encoding": {"x": x, "opacity": shown_if("pick")},
                },
            ],
        }

    some = (
        f"The {len(shown)} domains with the lowest and highest losses of {len(means)}. "
        if len(shown) < len(means)
        else ""
    )
    caption = f"{some}Filled: mean over seeds; open: one run each; lines: 95 % over held-out documents, where recorded."
    return Chart("held_out_loss", "Held-out loss by domain", caption, rows, make)


def _mean_of(contrast: Contrast) -> str:
    count = len(contrast.subject)
    return "one pair" if count == 1 else f"mean of {count} pairs"


def _only(kind: str) -> Spec:
    return {"transform": [{"filter": f"datum.kind === '{kind}'"}]}


def _zero_rule() -> Spec:
    return {
        "mark": {"type": "rule", "strokeWidth": 1},
        "data": {"values": [{}]},
        "encoding": {
            "x": {"datum": 0},
            "y": None,
            "yOffset": None,
            "color": {"value": "var(--text)"},
            "tooltip": {"value": None},
        },
    }


def _difference_title(study: Study, layout: Layout) -> str:
    return (
        study.unit.value if layout.narrow else f"difference in {study.unit.value} (below 0: {study.subject} is better)"
    )


def _domain_axis(order: Sequence[str], layout: Layout) -> Spec:
    axis = {"labelLimit": layout.label_limit, "grid": True, "ticks": False, "domain": False}
    return {"field": "domain", "type": "nominal", "title": None, "sort": list(order), "axis": axis}


def _reading_encoding(rows: Rows, layout: Layout) -> Mapping[str, Any]:
    present = {each["reading"] for each in rows}
    legend = {**top_legend(layout), "values": [name for name in _READINGS if name in present]}
    return {
        "color": {
            "field": "reading",
            "title": None,
            "scale": {"domain": list(_READINGS), "range": _READING_COLORS},
            "legend": legend,
        },
        "shape": {
            "field": "reading",
            "title": None,
            "scale": {"domain": list(_READINGS), "range": _READING_SHAPES},
            "legend": legend,
        },
    }


def _tooltips(*fields: str) -> list[Spec]:
    numbers = ("value", "low", "high", "band")
    return [
        {"field": name, "type": "quantitative", "format": ".4~f"}
        if name in numbers
        else {"field": name, "type": "nominal"}
        for name in fields
    ]
