"""Renders charts with Vega-Lite by vl-convert, without a browser and without a network."""

from __future__ import annotations

import functools
import json
import re
from importlib.resources import files
from typing import Any

import vl_convert

from megatron_doremi.reporting.charts.chart import Chart
from megatron_doremi.reporting.charts.theme import LIGHT, WIDE, Layout

# Nothing may be fetched: every specification holds its data.
_NO_URLS: list[str] = []
_SCALE = 2.0


def svg(chart: Chart, layout: Layout) -> str:
    """The chart as an SVG element whose colors are CSS variables, to be placed in a page with other charts."""
    text = vl_convert.vegalite_to_svg(chart.complete(layout), allowed_base_urls=_NO_URLS)
    # Vega numbers its clip paths from 0 in every chart.
    prefix = f"{chart.name}-{'narrow' if layout.narrow else 'wide'}-"
    text = re.sub(r'id="(clip|gradient)', rf'id="{prefix}\1', text)
    text = re.sub(r"url\(#(clip|gradient)", rf"url(#{prefix}\1", text)
    # A hundredth of a pixel is enough, and halves the file.
    return re.sub(r' (?:d|transform)="[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found.group()), text)


def png(chart: Chart) -> bytes:
    """The chart as a PNG on white, twice the size of the wide layout."""
    spec = json.dumps(chart.complete(WIDE))
    for name, color in LIGHT.items():
        spec = spec.replace(f"var(--{name})", color)
    document = json.loads(spec)
    document["config"]["background"] = "white"
    document["padding"] = 12
    return vl_convert.vegalite_to_png(document, scale=_SCALE, allowed_base_urls=_NO_URLS)


@functools.cache
def page_script() -> str:
    """The script of a report: Vega-Lite with all that it needs, and page.js, which uses it."""
    snippet = files("megatron_doremi.reporting").joinpath("page.js").read_text(encoding="ascii")
    script: str = vl_convert.javascript_bundle(snippet)
    # The script stands inside a script element, which the first closing tag ends.
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def data_for_script(charts: dict[str, Chart], layouts: dict[str, Layout]) -> dict[str, Any]:
    """What page.js draws: for each chart its rows by column, and a specification for each layout."""
    return {
        key: {
            "columns": list(fields := dict.fromkeys(name for each in chart.rows for name in each)),
            "values": [[each.get(name) for name in fields] for each in chart.rows],
            **{name: chart.spec(layout) for name, layout in layouts.items()},
        }
        for key, chart in charts.items()
    }
