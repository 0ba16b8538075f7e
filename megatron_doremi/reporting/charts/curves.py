"""Charts of losses over the steps, overlaid."""

from __future__ import annotations

from collections.abc import Sequence

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
    thinned,
    toggle,
    top_legend,
)
from megatron_doremi.reporting.charts.theme import Layout, series_scale
from megatron_doremi.reporting.comparison import Study

# Panels of losses by domain.
MOST_PANELS = 12
_POINTS = 200


def curves(study: Study) -> list[Chart]:
    """The training losses that the runs record, and their held-out losses if a run was evaluated more than once."""
    charts = [training_loss(study), training_loss_by_domain(study), losses_over_time(study)]
    return [chart for chart in charts if chart is not None]


def training_loss(study: Study) -> Chart | None:
    """The loss of every run, one color for each group; None if no run has training lines."""
    rows: Rows = []
    names = []
    for group in study.groups:
        for run in group.runs:
            if not run.iterations.size:
                continue
            values = smooth(run.scalars["loss"][:, None])[:, 0]
            label = group.label(run)
            names.append(group.name)
            for index in thinned(len(values), _POINTS):
                rows.append(row(group=group.name, run=label, step=int(run.iterations[index]), value=values[index]))
    if not rows:
        return None
    groups = [name for name in plain_names(study.color_order) if name in plain_names(names)]
    losses = [each["value"] for each in rows if each["value"] is not None]
    # The first steps are far above everything else.
    low, high = (min(losses), float(np.quantile(losses, 0.98))) if losses else (0.0, 1.0)

    def make(layout: Layout) -> Spec:
        margin = 0.05 * max(high - low, 1e-3)
        scale = {"zero": False, "domain": [low - margin, high + margin], "clamp": True, "nice": False}
        y = {"field": "value", "type": "quantitative", "title": "training loss (nats per token)", "scale": scale}
        return {
            "width": layout.width,
            "height": 300,
            "params": [toggle("pick", "group")],
            "mark": {"type": "line", "strokeWidth": 1.6},
            "encoding": {
                "x": {
                    "field": "step",
                    "type": "quantitative",
                    "title": "step",
                    "axis": {"grid": False, "tickCount": 6},
                },
                "y": y,
                "color": _group_color(study, groups, {"orient": "bottom", "columns": 2 if layout.narrow else 6}),
                "detail": {"field": "run"},
                "opacity": shown_if("pick", 0.85),
                "tooltip": [{"field": "run"}, {"field": "step"}, {"field": "value"}],
            },
        }

    caption = "One line for each run, smoothed; the mean over the batch, so a mixture's own domains weigh in."
    return Chart("training_loss", "Training loss", caption, rows, make)


def training_loss_by_domain(study: Study) -> Chart | None:
    """A panel for each domain, or for those at both ends of the learned or sampled weights."""
    runs = study.runs
    domains = [name for name in study.names if any(name in run.loss.names for run in runs.values())]
    if not domains:
        return None
    weights: dict[str, float] = {}
    for run in runs.values():
        weights = weights or run.recorded_weights or run.sampling_weights or {}
    shown = extremes(domains, {name: weights.get(name, 0.0) for name in domains}, MOST_PANELS)[::-1]
    rows: Rows = []
    for group in study.groups:
        for run in group.runs:
            losses = smooth(run.loss.ordered(shown), 30)
            for column, name in enumerate(shown):
                present = np.flatnonzero(~np.isnan(losses[:, column]))
                for index in present[thinned(len(present), 40)] if present.size else ():
                    step, value = int(run.iterations[index]), losses[index, column]
                    rows.append(row(group=group.name, run=group.label(run), domain=name, step=step, value=value))
    groups, order = plain_names(study.color_order), plain_names(shown)

    def make(layout: Layout) -> Spec:
        columns = 2 if layout.narrow else 4
        axis = {"tickCount": 3, "grid": True}
        return {
            "facet": {
                "field": "domain",
                "type": "nominal",
                "title": None,
                "sort": order,
                "header": {"labelLimit": layout.width // columns - 30, "labelFontWeight": "normal", "labelPadding": 2},
            },
            "columns": columns,
            "spacing": 14,
            "spec": {
                "width": (layout.width - 10) // columns - 42,
                "height": 90,
                "params": [toggle("pick", "group")],
                "mark": {"type": "line", "strokeWidth": 1.3},
                "encoding": {
                    "x": {"field": "step", "type": "quantitative", "title": None, "axis": axis},
                    "y": {
                        "field": "value",
                        "type": "quantitative",
                        "title": None,
                        "scale": {"zero": False},
                        "axis": axis,
                    },
                    "color": _group_color(study, groups, top_legend(layout)),
                    "detail": {"field": "run"},
                    "opacity": shown_if("pick", 0.85),
                    "tooltip": [{"field": "run"}, {"field": "domain"}, {"field": "step"}, {"field": "value"}],
                },
            },
            "resolve": {"scale": {"y": "independent"}},
        }

    some = (
        f"The {len(shown)} domains with the highest and lowest weights of {len(domains)}. "
        if len(shown) < len(domains)
        else ""
    )
    caption = f"{some}Smoothed, in nats per token over the steps; one line for each run."
    return Chart("training_loss_by_domain", "Training loss by domain", caption, rows, make)


def losses_over_time(study: Study) -> Chart | None:
    """Held-out losses over the steps; None if no run was evaluated more than once."""
    rows: Rows = []
    groups = [group for group in study.groups if any(len(run.evaluations) > 1 for run in group.runs)]
    for group in groups:
        for run in group.runs:
            for evaluation in run.evaluations:
                figures = evaluation.bits if study.unit.name == "BITS" else evaluation.nats
                if figures is None:
                    continue
                common = {"group": group.name, "run": group.label(run), "step": evaluation.iteration}
                rows.append(row(**common, figure="uniform mean", value=figures.uniform_mean))
                rows.append(row(**common, figure="worst domain", value=figures.worst[1]))
    if not rows:
        return None
    shown = {group.name for group in groups}
    names = plain_names(name for name in study.color_order if name in shown)

    def make(layout: Layout) -> Spec:
        columns = 1 if layout.narrow else 2
        return {
            "facet": {"field": "figure", "type": "nominal", "title": None, "sort": ["worst domain", "uniform mean"]},
            "columns": columns,
            "spec": {
                "width": (layout.width - 70 * columns) // columns,
                "height": 200,
                "params": [toggle("pick", "group")],
                "mark": {"type": "line", "point": {"size": 18}, "strokeWidth": 1.6},
                "encoding": {
                    "x": {"field": "step", "type": "quantitative", "title": "step", "axis": {"tickCount": 5}},
                    "y": {
                        "field": "value",
                        "type": "quantitative",
                        "title": study.unit.value,
                        "scale": {"zero": False},
                    },
                    "color": _group_color(study, names, top_legend(layout)),
                    "detail": {"field": "run"},
                    "opacity": shown_if("pick"),
                    "tooltip": [{"field": "run"}, {"field": "step"}, {"field": "value"}],
                },
            },
            "resolve": {"scale": {"y": "independent"}},
        }

    caption = "One line for each run."
    return Chart("held_out_over_time", "Held-out loss over the steps", caption, rows, make)


def _group_color(study: Study, groups: Sequence[str], legend: Spec) -> Spec:
    """The color of each run's group, the same in every chart."""
    return {
        "field": "group",
        "title": None,
        "scale": series_scale(groups, plain_names(study.color_order)),
        "legend": legend,
    }
