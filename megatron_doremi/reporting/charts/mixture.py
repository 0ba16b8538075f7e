"""Charts of weights: learned beside natural and uniform, and their way over the proxy's steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from megatron_doremi.reporting.charts.chart import (
    Chart,
    Rows,
    Spec,
    extremes,
    plain_names,
    row,
    shown_if,
    smooth,
    spans_decades,
    thinned,
    toggle,
)
from megatron_doremi.reporting.charts.held_out import EXTREMES, MOST_ROWS
from megatron_doremi.reporting.charts.theme import Layout, dash_scale, series_scale, shape_scale
from megatron_doremi.reporting.comparison import Study
from megatron_doremi.reporting.groups import same_weights
from megatron_doremi.reporting.mixture import (
    entropy,
    learned_weights,
    mean_by_domain,
    natural_weights,
    running_mean,
    smoothing_floor,
)
from megatron_doremi.reporting.runs import Floats, Integers, Run

# Lines that can still be told apart.
MOST_LINES = 10
_POINTS = 150
# Labels and grid lines of a logarithmic axis; those outside its range are not drawn.
_DECADES = [10.0**power for power in range(-9, 4)]


def mixture_charts(study: Study) -> list[Chart]:
    """The charts of weights that a study has the figures for."""
    weights = weights_by_domain(study)
    charts = [] if weights is None else [weights]
    proxies = study.proxies
    if not proxies:
        return charts
    charts.append(effective_domains(proxies))
    for number, (label, run) in enumerate(proxies.items(), 1):
        charts.append(trajectories(f"weights_{number}", label, run))
        driving = driving_losses(f"excess_{number}", label, run)
        charts += [] if driving is None else [driving]
    return charts


def weights_by_domain(study: Study) -> Chart | None:
    """Learned weights with a point for each proxy, natural weights, and other mixtures; None if there is none."""
    proxies = study.pooled_proxies
    learned = [learned_weights(run) for run in proxies.values()]
    series: dict[str, Mapping[str, float]] = {}
    if learned:
        series[study.learned_name] = {
            n: fmean(mean_by_domain(learned, n)) for n in study.names if mean_by_domain(learned, n)
        }
    if study.domain_tokens:
        series["natural"] = natural_weights(study.domain_tokens)
    for group in study.groups if study.subject is not None else ():
        sampling = group.runs[0].sampling_weights
        uniform = sampling is not None and same_weights(sampling, dict.fromkeys(sampling, 1.0))
        copied = any(same_weights(sampling or {}, learned_weights(run)) for run in proxies.values())
        if group.compared and sampling is not None and not uniform and not copied:
            known = [name for name, other in series.items() if same_weights(sampling, dict(other))]
            series |= {} if known else {group.name: sampling}
    if not series:
        return None
    first = next(iter(series.values()))
    shown = extremes(study.names, first, EXTREMES if len(first) > MOST_ROWS else MOST_ROWS)[::-1]
    rows: Rows = []
    for name in shown:
        rows += [
            row(domain=name, mixture=m, kind="mean", value=w[name], run="") for m, w in series.items() if name in w
        ]
        for (label, _), mixture in zip(proxies.items(), learned, strict=True):
            if len(learned) > 1 and name in mixture:
                rows.append(row(domain=name, mixture=study.learned_name, kind="run", value=mixture[name], run=label))
    order, names, k = plain_names(shown), list(plain_names(series)), len(first)
    scale: Spec = {"type": "log"} if spans_decades(each["value"] for each in rows) else {"zero": True}

    def make(layout: Layout) -> Spec:
        legend = {"orient": "top", "columns": 2 if layout.narrow else 6}
        axis = {"labelLimit": layout.label_limit, "grid": True, "ticks": False, "domain": False}
        title = "weight (logarithmic)" if "type" in scale else "weight"
        axis_x = {"values": _DECADES, "format": "~g"} if "type" in scale else {"tickCount": 6}
        x = {"field": "value", "type": "quantitative", "title": title, "scale": scale, "axis": axis_x}
        return {
            "width": layout.width,
            "height": {"step": 19},
            "encoding": {
                "y": {"field": "domain", "type": "nominal", "title": None, "sort": order, "axis": axis},
                "color": {"field": "mixture", "title": None, "scale": series_scale(names), "legend": legend},
                "shape": {"field": "mixture", "title": None, "scale": shape_scale(names), "legend": legend},
                "tooltip": [{"field": name} for name in ("domain", "mixture", "run", "value")],
            },
            "layer": [
                _rule("x", 1 / k, [4, 3]),
                {
                    "transform": [{"filter": "datum.kind === 'run'"}],
                    "mark": {"type": "point", "filled": False, "size": 22, "strokeWidth": 1.2},
                    "encoding": {"x": x, "opacity": shown_if("pick", 0.7)},
                },
                {
                    "transform": [{"filter": "datum.kind === 'mean'"}],
                    "params": [toggle("pick", "mixture")],
                    "mark": {"type": "point", "filled": True, "size": 70},
                    "encoding": {"x": x, "opacity": shown_if("pick", 0.9)},
                },
            ],
        }

    some = f"The {len(shown)} domains with the highest and lowest weights of {k}. " if len(shown) < k else ""
    seeds = " Open points: one proxy each." if len(learned) > 1 else ""
    learned_in = f" Learned: in {study.round_name}." if study.round_name else ""
    caption = f"{some}Dashed line: uniform, 1/{k}.{learned_in}{seeds}"
    return Chart("domain_weights", "Domain weights", caption, rows, make)


def trajectories(name: str, label: str, run: Run) -> Chart:
    """A proxy's weights at every step (faint) and their mean so far (strong), with the uniform weight and the floor."""
    means = running_mean(run.weights.values)
    shown = _shown_domains(run)
    rows = _line_rows(run.iterations, run.weights.ordered(shown), running_mean(run.weights.ordered(shown)), shown)
    hidden = len(run.weights.names) - len(shown)
    rows += _range_rows(run.iterations, means) if hidden else []
    k = len(run.weights.names)
    floor = smoothing_floor(run, k)
    values = [each[key] for each in rows for key in ("raw", "value", "low") if each.get(key)]
    log = spans_decades(values)
    rules = [_rule("y", 1 / k, [4, 3]), *([_rule("y", floor, [1, 3])] if floor and log else [])]
    floor_text = (
        f"; dotted: floor c/k = {floor:.2g}" if floor and log else f"; floor c/k = {floor:.2g}" if floor else ""
    )
    rest = f"; gray: range of all {k} means" if hidden else ""
    caption = f"Strong: mean so far; faint: each step; dashed: uniform, 1/{k}{floor_text}{rest}."
    title = f"Weights over the steps ({label})"
    return Chart(name, title, caption, rows, line_charts("weight", shown, log, rules, bool(hidden)))


def driving_losses(name: str, label: str, run: Run) -> Chart | None:
    """The excess losses, or the scores, that drive a proxy's weights; None if the run does not record them."""
    series, quantity = (run.excess, "excess loss") if run.excess.values.size else (run.score, "score")
    if not series.values.size:
        return None
    shown = [domain for domain in _shown_domains(run) if domain in series.names]
    smoothed = smooth(series.ordered(shown))
    log = spans_decades(smoothed.ravel().tolist())
    strong = np.where(smoothed > 0, smoothed, np.nan) if log else smoothed
    rows = _line_rows(run.iterations, np.full_like(strong, np.nan), strong, shown)
    source = "of the proxy over the reference" if quantity == "excess loss" else "of the proxy"
    caption = f"Smoothed {quantity} {source} in nats per token, which drives the weights."
    title = f"{quantity.capitalize()} over the steps ({label})"
    return Chart(name, title, caption, rows, line_charts(f"{quantity} (nats per token)", shown, log, [], False))


def effective_domains(proxies: Mapping[str, Run]) -> Chart:
    """exp(entropy) of the weights of every proxy: by how many domains the weights are spread."""
    rows: Rows = []
    for label, run in proxies.items():
        points = thinned(len(run.iterations), 2 * _POINTS)
        raw, mean = (np.exp(entropy(each[points])) for each in (run.weights.values, running_mean(run.weights.values)))
        for place, index in enumerate(points):
            rows.append(row(line=label, step=int(run.iterations[index]), raw=raw[place], value=mean[place]))
    k = max(len(run.weights.names) for run in proxies.values())
    rules = [_rule("y", k, [4, 3])]
    caption = (
        "exp(entropy) of the weights: as many domains with equal weights have the same entropy. Strong: of the mean so "
        f"far; faint: of each step; dashed: all {k} domains."
    )
    make = line_charts("effective domains", list(proxies), False, rules, False)
    return Chart("entropy", "Spread of the weights", caption, rows, make)


def _shown_domains(run: Run) -> list[str]:
    """All domains, heaviest first, or those at both ends if there are too many lines."""
    weights = learned_weights(run)
    if len(weights) <= MOST_LINES + 2:
        return sorted(weights, key=lambda name: -weights[name])
    return extremes(list(weights), weights, MOST_LINES)[::-1]


def _line_rows(iterations: Integers, raw: Floats, strong: Floats, names: Sequence[str]) -> Rows:
    points = thinned(len(iterations), _POINTS)
    return [
        row(line=name, step=int(iterations[index]), raw=raw[index, column], value=strong[index, column])
        for column, name in enumerate(names)
        for index in points
    ]


def _range_rows(iterations: Integers, values: Floats) -> Rows:
    points = thinned(len(iterations), _POINTS // 2)
    return [row(step=int(iterations[i]), low=np.nanmin(values[i]), high=np.nanmax(values[i])) for i in points.tolist()]


def _rule(axis: str, value: float, dash: list[int]) -> Spec:
    encoding: dict[str, Any] = {"x": None, "y": None, "color": {"value": "var(--muted)"}, "tooltip": {"value": None}}
    encoding |= {axis: {"datum": value}, "shape": None}
    mark = {"type": "rule", "strokeDash": dash, "strokeWidth": 1.2}
    return {"data": {"values": [{}]}, "mark": mark, "encoding": encoding}


def line_charts(
    title: str, names: Sequence[str], log: bool, layers: Sequence[Spec], band: bool, x: Spec | None = None
) -> Any:
    """Makes a line for each name, strong (field value) over faint (field raw).

    Args:
        layers: drawn on top.
        band: also an area from field low to field high.
        x: the horizontal axis; None: the field step.
    """
    lines = plain_names(names)
    x = x or {"field": "step", "type": "quantitative", "title": "step", "axis": {"grid": False, "tickCount": 6}}

    def make(layout: Layout) -> Spec:
        legend = {"orient": "bottom", "columns": 2 if layout.narrow else 5, "labelLimit": 135 if layout.narrow else 170}
        scale: Spec = {"type": "log"} if log else {"zero": False}
        y = {"type": "quantitative", "title": f"{title}, logarithmic" if log else title, "scale": scale}
        y["axis"] = {"values": _DECADES, "format": "~g"} if log else {"tickCount": 5}
        looks = {
            "color": {"field": "line", "title": None, "scale": series_scale(lines), "legend": legend},
            "strokeDash": {"field": "line", "title": None, "scale": dash_scale(lines), "legend": legend},
        }
        shown = "isValid(datum.line)"
        area = {
            "transform": [{"filter": "isValid(datum.low)"}],
            "mark": {"type": "area", "color": "var(--band)", "opacity": 0.6},
            "encoding": {"y": {**y, "field": "low"}, "y2": {"field": "high"}},
        }
        return {
            "width": layout.width,
            "height": 300 if layout.narrow else 320,
            "encoding": {"x": x},
            "layer": [
                *([area] if band else []),
                {
                    "transform": [{"filter": f"{shown} && isValid(datum.raw)"}],
                    "mark": {"type": "line", "strokeWidth": 0.8},
                    "encoding": {
                        "y": {**y, "field": "raw"},
                        "color": looks["color"],
                        "opacity": shown_if("pick", 0.3, 0.02),
                    },
                },
                {
                    "transform": [{"filter": f"{shown} && isValid(datum.value)"}],
                    "params": [toggle("pick", "line")],
                    "mark": {"type": "line", "strokeWidth": 2},
                    "encoding": {
                        "y": {**y, "field": "value"},
                        **looks,
                        "opacity": shown_if("pick"),
                        "tooltip": [{"field": "line"}, {"field": x["field"]}, {"field": "value"}, {"field": "raw"}],
                    },
                },
                *layers,
            ],
        }

    return make
