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
)
from megatron_doremi.reporting.charts.mixture import MOST_LINES, line_charts
from megatron_doremi.reporting.charts.theme import series_scale
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
        rows.append(row(line=name, round=0, value=entry.rounds[0].reference_weights[name]))
        for each in entry.rounds:
            rows.append(row(line=name, round=each.round, value=each.weights[name]))
            seeds = each.seed_weights if len(each.seed_weights) > 1 else []
            rows += [row(line=name, round=each.round, seed=weights[name]) for weights in seeds]
    log = spans_decades(each.get(key) for each in rows for key in ("value", "seed"))
    axis = {"grid": False, "values": list(range(len(entry.rounds) + 1)), "format": "d"}
    x = {"field": "round", "type": "quantitative", "title": "round", "axis": axis}
    names = plain_names(shown)
    points = [_points("value", True, names, log), _points("seed", False, names, log)]
    some = "" if few else f" The {len(shown)} domains with the highest and lowest weights of {len(last)}."
    seeds_text = " Open points: one seed each." if entry.seeds > 1 else ""
    caption = f"Round 0: sampling weights of the first reference; then what each round learned.{some}{seeds_text}"
    make = line_charts("weight", shown, log, points, False, x)
    return Chart("rounds", "Weights over the rounds", caption, rows, make)


def _points(field: str, filled: bool, names: list[str], log: bool) -> Spec:
    """A layer of points where the rows have `field`."""
    return {
        "transform": [{"filter": f"isValid(datum.{field})"}],
        "mark": {"type": "point", "filled": filled, "size": 40 if filled else 22, "strokeWidth": 1.2},
        "encoding": {
            "y": {"field": field, "type": "quantitative", "scale": {"type": "log"} if log else {"zero": False}},
            "color": {"field": "line", "title": None, "scale": series_scale(names)},
            "opacity": shown_if("pick"),
        },
    }
