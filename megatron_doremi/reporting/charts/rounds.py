"""A chart of the weights over rounds of DoReMi."""

from __future__ import annotations

from megatron_doremi.reporting.charts.chart import (
    Chart,
    Rows,
    Spec,
    extremes,
    plain_names,
    row,
    shown_if,
    spans_decades,
    toggle,
)
from megatron_doremi.reporting.charts.mixture import DECADES, MOST_LINES
from megatron_doremi.reporting.charts.theme import Layout, dash_scale, series_scale
from megatron_doremi.reporting.rounds import RoundsEntry


def rounds_chart(entry: RoundsEntry) -> Chart:
    """The sampling weights of the first reference (round 0), and what each round learned; with a point for each seed.

    Args:
        entry: at least one round.
    """
    last = entry.rounds[-1].weights
    few = len(last) <= MOST_LINES + 2
    shown = sorted(last, key=lambda name: -last[name]) if few else extremes(list(last), last, MOST_LINES)[::-1]
    rows: Rows = []
    for name in shown:
        rows.append(row(line=name, kind="mean", round=0, value=entry.rounds[0].reference_weights[name]))
        for each in entry.rounds:
            rows.append(row(line=name, kind="mean", round=each.round, value=each.weights[name]))
            seeds = each.seed_weights if len(each.seed_weights) > 1 else []
            rows += [row(line=name, kind="seed", round=each.round, value=weights[name]) for weights in seeds]
    lines, log = plain_names(shown), spans_decades(each["value"] for each in rows)

    def make(layout: Layout) -> Spec:
        legend = {"orient": "bottom", "columns": 2 if layout.narrow else 5, "labelLimit": 135 if layout.narrow else 170}
        color = {"field": "line", "title": None, "scale": series_scale(lines), "legend": legend}
        axis_y = {"values": DECADES, "format": "~g"} if log else {"tickCount": 5}
        axis_x = {"grid": False, "values": list(range(len(entry.rounds) + 1)), "format": "d"}
        return {
            "width": layout.width,
            "height": 300 if layout.narrow else 320,
            "encoding": {
                "x": {"field": "round", "type": "quantitative", "title": "round", "axis": axis_x},
                "y": {
                    "field": "value",
                    "type": "quantitative",
                    "title": "weight, logarithmic" if log else "weight",
                    "scale": {"type": "log"} if log else {"zero": True},
                    "axis": axis_y,
                },
                "color": color,
                "tooltip": [{"field": "line"}, {"field": "round"}, {"field": "value"}],
            },
            "layer": [
                {
                    "transform": [{"filter": "datum.kind === 'mean'"}],
                    "params": [toggle("pick", "line")],
                    "mark": {"type": "line", "strokeWidth": 2, "point": {"size": 40}},
                    "encoding": {
                        "strokeDash": {
                            "field": "line",
                            "title": None,
                            "scale": dash_scale(lines),
                            "legend": legend,
                        },
                        "opacity": shown_if("pick"),
                    },
                },
                {
                    "transform": [{"filter": "datum.kind === 'seed'"}],
                    "mark": {"type": "point", "filled": False, "size": 22, "strokeWidth": 1.2},
                    "encoding": {"opacity": shown_if("pick", 0.7)},
                },
            ],
        }

    some = "" if few else f" The {len(shown)} domains with the highest and lowest weights of {len(last)}."
    seeds_text = " Open points: one seed each." if entry.seeds > 1 else ""
    caption = f"Round 0: sampling weights of the first reference; then what each round learned.{some}{seeds_text}"
    return Chart("rounds", "Weights over the rounds", caption, rows, make)
