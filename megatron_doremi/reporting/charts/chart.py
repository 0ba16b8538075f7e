"""A chart: rows of data and a Vega-Lite specification for each layout. Pure: nothing is drawn here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_doremi.reporting.charts.theme import CONFIG, Layout
from megatron_doremi.reporting.runs import Floats, Integers

Spec = dict[str, Any]
Rows = list[dict[str, Any]]
SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
_DIGITS = 5
_JAVASCRIPT = {
    *("constructor", "hasOwnProperty", "isPrototypeOf", "propertyIsEnumerable", "toLocaleString", "toString"),
    *("valueOf", "__proto__", "__defineGetter__", "__defineSetter__", "__lookupGetter__", "__lookupSetter__"),
}


@dataclass(frozen=True)
class Chart:
    """A chart of the report.

    Attributes:
        name: of its files, without a suffix.
        title, caption: text above and below it.
        rows: {field: text or number}; fields are named by the chart, never by a file.
        make: the specification for a layout, without data and configuration.
    """

    name: str
    title: str
    caption: str
    rows: Rows
    make: Callable[[Layout], Spec]

    def spec(self, layout: Layout) -> Spec:
        """The specification for a layout; its data is named "rows" and is not inside."""
        made = self.make(layout)
        fit = {} if "facet" in made else {"autosize": {"type": "fit-x", "contains": "padding"}}
        return {
            "$schema": SCHEMA,
            **fit,
            **made,
            "data": {"name": "rows"},
            "config": CONFIG,
        }

    def complete(self, layout: Layout) -> Spec:
        """The specification with its data."""
        return {**self.spec(layout), "datasets": {"rows": self.rows}}


def row(**fields: Any) -> dict[str, Any]:
    """A row of data: numbers rounded to what a chart can show, NaN as None, text that every encoder accepts."""
    return {name: _plain(value) for name, value in fields.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        # A lone surrogate cannot be encoded, and Vega looks names up among the properties of a JavaScript object.
        text = value.encode("utf-8", "backslashreplace").decode("utf-8")
        return f"{text} " if text in _JAVASCRIPT else text
    if isinstance(value, float | np.floating):
        number = float(value)
        return float(f"{number:.{_DIGITS}g}") if math.isfinite(number) else None
    return value


def thinned(count: int, most: int) -> Integers:
    """Returns the indices of the rows to draw: all, or `most` evenly spaced ones including both ends."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def smooth(values: Floats, parts: int = 60) -> Floats:
    """Returns the centered moving mean over about 1/`parts` of the rows: [lines, domains] to [lines, domains].

    NaN values are skipped. The window grows from one row at the start, so that the steep fall of the first steps,
    which drives the weights most, stays visible. At the end it loses only its right half, which avoids a final spike.
    """
    count = values.shape[0]
    half = max(count // (2 * parts), 1 if count > 20 else 0)
    present = ~np.isnan(values)
    zero = np.zeros((1, values.shape[1]))
    sums = np.concatenate([zero, np.cumsum(np.where(present, values, 0.0), axis=0)])
    counts = np.concatenate([zero, np.cumsum(present, axis=0)])
    place = np.arange(count)
    reach = np.minimum(place, half)
    low, high = place - reach, np.minimum(place + reach + 1, count)
    number = counts[high] - counts[low]
    return np.where(number > 0, (sums[high] - sums[low]) / np.maximum(number, 1), np.nan)


def extremes(names: Sequence[str], values: Mapping[str, float], most: int) -> list[str]:
    """Returns all names by ascending value, or the lowest and highest `most` // 2 of them if there are more."""
    ordered = sorted((name for name in names if name in values), key=lambda name: values[name])
    if len(ordered) <= most:
        return ordered
    half = most // 2
    return [*ordered[:half], *ordered[-half:]]


def plain_names(names: Iterable[str]) -> list[str]:
    """Names as they stand in the rows."""
    return [_plain(name) for name in names]


def spans_decades(values: Iterable[float | None]) -> bool:
    """Whether positive values differ so much that a logarithmic scale shows them better."""
    positive = [value for value in values if value is not None and 0 < value < math.inf]
    return bool(positive) and max(positive) / min(positive) > 30


def toggle(name: str, field: str) -> Spec:
    """A selection by a click on the legend."""
    return {"name": name, "select": {"type": "point", "fields": [field]}, "bind": "legend"}


def shown_if(name: str, shown: float = 1.0, hidden: float = 0.06) -> Spec:
    """An opacity that fades what the selection `name` leaves out."""
    return {"condition": {"param": name, "value": shown}, "value": hidden}


def top_legend(layout: Layout) -> Spec:
    """A legend above the chart."""
    return {"orient": "top", "columns": 2 if layout.narrow else 6, "labelLimit": 135 if layout.narrow else 190}
