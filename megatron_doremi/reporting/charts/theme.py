"""Colors, fonts and shapes of the charts and the page. A color is a CSS variable, so that dark mode needs no script."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Okabe and Ito's palette (2008), which color-blind people can tell apart, darkened and lightened for two backgrounds.
LIGHT = {
    "page": "#ffffff",
    "raised": "#f6f7f9",
    "text": "#1f2430",
    "muted": "#5b6270",
    "line": "#c9cdd4",
    "grid": "#e6e8ec",
    "band": "#d9dde3",
    "better": "#0060a0",
    "worse": "#b84a00",
    "s1": "#0072b2",
    "s2": "#d55e00",
    "s3": "#009e73",
    "s4": "#c2629a",
    "s5": "#a07800",
    "s6": "#3fa0dc",
    "s7": "#5b3a8c",
    "s8": "#4a4f58",
}
DARK = {
    "page": "#14171c",
    "raised": "#1d2128",
    "text": "#e8eaee",
    "muted": "#a3aab6",
    "line": "#4a515c",
    "grid": "#2b3038",
    "band": "#3a414c",
    "better": "#6cb8f0",
    "worse": "#ff9a55",
    "s1": "#4ea8e6",
    "s2": "#ff8a3d",
    "s3": "#2fc79a",
    "s4": "#e79bc8",
    "s5": "#dcb13c",
    "s6": "#9ad4f7",
    "s7": "#b69be8",
    "s8": "#c3c8d0",
}
SERIES = tuple(f"var(--s{number})" for number in range(1, 9))
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-left", "triangle-right")
DASHES = ([1, 0], [6, 2], [2, 2], [8, 2, 2, 2])
# Of equal widths everywhere, so that what was measured without a browser fits in one.
FONT = "Arial, Helvetica, 'Liberation Sans', sans-serif"


@dataclass(frozen=True)
class Layout:
    """What a chart may take up.

    Attributes:
        width: of the figure in pixels, labels included.
        narrow: whether it is for a phone.
    """

    width: int
    narrow: bool

    @property
    def label_limit(self) -> int:
        """Longest name on an axis or in a legend, in pixels."""
        return 110 if self.narrow else 190


WIDE, NARROW = Layout(1040, False), Layout(340, True)

CONFIG: dict[str, Any] = {
    "background": None,
    # The tables say the same to a screen reader in fewer words.
    "aria": False,
    "font": FONT,
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--text)",
        "titleColor": "var(--muted)",
        "gridColor": "var(--grid)",
        "domainColor": "var(--line)",
        "tickColor": "var(--line)",
        "labelFontSize": 11,
        "titleFontSize": 11,
        "titleFontWeight": "normal",
        "labelFontWeight": "normal",
        "labelOverlap": True,
    },
    "legend": {
        "labelColor": "var(--text)",
        "titleColor": "var(--muted)",
        "labelFontSize": 11,
        "titleFontSize": 11,
        "titleFontWeight": "normal",
        "symbolStrokeWidth": 2,
        "symbolOpacity": 1,
        "labelLimit": 190,
    },
    "header": {
        "labelColor": "var(--text)",
        "titleColor": "var(--muted)",
        "labelFontSize": 12,
        "labelFontWeight": "bold",
    },
    "title": {"color": "var(--text)", "anchor": "start", "fontSize": 12},
    "rule": {"color": "var(--muted)"},
}


def css_variables() -> str:
    """The palette as CSS: light, dark where the reader prefers it, and light in print."""
    light = "".join(f"--{name}:{color};" for name, color in LIGHT.items())
    dark = "".join(f"--{name}:{color};" for name, color in DARK.items())
    return (
        f":root{{color-scheme:light;{light}}}\n"
        f"@media screen and (prefers-color-scheme:dark){{:root{{color-scheme:dark;{dark}}}}}\n"
    )


def series_scale(names: Sequence[str], order: Sequence[str] = ()) -> dict[str, Any]:
    """A color for each name by its place in `order` (by default `names`); colors repeat after eight."""
    return {"domain": list(names), "range": [SERIES[place % len(SERIES)] for place in _places(names, order)]}


def shape_scale(names: Sequence[str], order: Sequence[str] = ()) -> dict[str, Any]:
    """A shape for each name by its place in `order` (by default `names`)."""
    return {"domain": list(names), "range": [SHAPES[place % len(SHAPES)] for place in _places(names, order)]}


def _places(names: Sequence[str], order: Sequence[str]) -> list[int]:
    places = {name: place for place, name in enumerate(dict.fromkeys([*order, *names]))}
    return [places[name] for name in names]


def dash_scale(names: list[str]) -> dict[str, Any]:
    """A line style for each name: another one after every eight names, when the colors repeat."""
    return {"domain": names, "range": [DASHES[index // len(SERIES) % len(DASHES)] for index in range(len(names))]}
