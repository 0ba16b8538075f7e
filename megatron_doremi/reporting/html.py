"""Renders a report as one self-contained HTML file: text, tables with their CSV, and charts as SVG and as data.

All text, which may come from files (domain names, configuration values, paths), is escaped here, once. Nothing is
loaded from elsewhere, and a Content-Security-Policy forbids it; the page is complete without its script.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files

from megatron_doremi.reporting.charts.chart import Chart
from megatron_doremi.reporting.charts.render import data_for_script, page_script, svg
from megatron_doremi.reporting.charts.theme import NARROW, WIDE, css_variables
from megatron_doremi.reporting.tables import Column, Row, Table

LAYOUTS = {"wide": WIDE, "narrow": NARROW}
# A table with more rows scrolls in a box.
_TALL = 25


@dataclass(frozen=True)
class Section:
    """A section of the report; empty parts are omitted.

    Attributes:
        title: heading.
        note: a paragraph below it.
        charts: charts.
        tables: tables of numbers, below the charts.
        values: tables of text, such as configuration values.
        folded: (summary, {key: value}) pairs, collapsed at first.
        more: charts that are collapsed at first.
    """

    title: str
    note: str = ""
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    values: Sequence[Table] = ()
    folded: Sequence[tuple[str, Mapping[str, object]]] = field(default_factory=tuple)
    more: Sequence[Chart] = ()


def page(title: str, verdict: str, findings: Sequence[str], sections: Sequence[Section], footer: str) -> str:
    """Returns the full document; all arguments are plain text, which is escaped here."""
    charts = {chart.name: chart for section in sections for chart in (*section.charts, *section.more)}
    script = page_script()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    style = css_variables() + files("megatron_doremi.reporting").joinpath("page.css").read_text(encoding="ascii")
    # JSON inside a script element: no tag can end or begin there.
    data = json.dumps(data_for_script(charts, LAYOUTS), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    links = "".join(f'<a href="#{_anchor(section.title)}">{escape(section.title)}</a>' for section in sections)
    items = "\n".join(f"<li>{escape(sentence)}</li>" for sentence in findings)
    body = "\n".join(_section(section) for section in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f'<h1>{escape(title)}</h1>\n<p class="verdict">{escape(verdict)}</p>\n'
        f'<ul class="findings">\n{items}\n</ul>\n<nav>{links}</nav>\n{body}\n<footer>{escape(footer)}</footer>\n'
        f'<script type="application/json" id="charts">{data}</script>\n<script>{script}</script>\n</body>\n</html>\n'
    )


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _section(section: Section) -> str:
    parts = [f'<h2 id="{_anchor(section.title)}">{escape(section.title)}</h2>']
    if section.note:
        parts.append(f'<p class="note">{escape(section.note)}</p>')
    parts += [_figure(chart) for chart in section.charts]
    for chart in section.more:
        parts.append(f"<details><summary>{escape(chart.title)}</summary>{_figure(chart)}</details>")
    parts += [_table(table, "") for table in section.tables]
    parts += [_table(table, "values") for table in section.values]
    for summary, values in section.folded:
        rows: tuple[Row, ...] = tuple((key, str(value)) for key, value in values.items())
        inner = _table(Table(_anchor(summary), (Column("key"), Column("value")), rows), "values")
        parts.append(f"<details><summary>{escape(summary)}</summary>{inner}</details>")
    return "\n".join(parts)


def _figure(chart: Chart) -> str:
    stills = "".join(f'<div class="still {name}">{svg(chart, layout)}</div>' for name, layout in LAYOUTS.items())
    title = escape(chart.title)
    return (
        f'<h3>{title}</h3>\n<figure data-chart="{escape(chart.name)}" role="group" aria-label="{title}">'
        f'{stills}<div class="live"></div><figcaption>{escape(chart.caption)}</figcaption></figure>'
    )


def _table(table: Table, css_class: str) -> str:
    head = "".join(f"<th{_words(column)}>{escape(column.name)}</th>" for column in table.columns)
    caption = f'<p class="note">{escape(table.caption)}</p>' if table.caption else ""
    body = "\n".join(_row(row, table.columns) for row in table.rows)
    summary = "\n".join(_row(row, table.columns) for row in table.summary)
    summary = f'<tbody class="summary">\n{summary}\n</tbody>' if summary else ""
    name = f' class="{css_class}"' if css_class else ""
    tall = " tall" if len(table.rows) > _TALL else ""
    file_name = re.sub(r"[^A-Za-z0-9._-]+", "_", table.name) or "table"
    data = base64.b64encode(table.csv().encode("utf-8", "backslashreplace")).decode("ascii")
    link = f'<a download="{file_name}.csv" href="data:text/csv;charset=utf-8;base64,{data}">CSV</a>'
    return (
        f'<div class="table" data-rows="{len(table.rows)}">{caption}<div class="scroll{tall}"><table{name}>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>{summary}</table></div>"
        f'<div class="tools"><span></span>{link}</div></div>'
    )


def _words(column: Column) -> str:
    return ' class="words"' if column.is_text else ""


def _row(row: Row, columns: Sequence[Column]) -> str:
    parts = []
    for value, column in zip(row, columns, strict=True):
        text = escape(column.text(value))
        if isinstance(value, str) or value is None:
            names = " ".join([*(["words"] if column.is_text else []), *_visible(value)])
            parts.append(f'<td class="{names}">{text}</td>' if names else f"<td>{text}</td>")
        else:
            parts.append(f'<td data-value="{value:.6g}">{text}</td>')
    return f"<tr>{''.join(parts)}</tr>"


def _visible(value: str | None) -> list[str]:
    """The class of a reading, or of an interval of differences that excludes 0: only what can be seen has a color."""
    match = re.fullmatch(r"(better|worse)|\[([+-])[0-9.]+, \2[0-9.]+\]", value or "")
    if match is None:
        return []
    return [match[1] or {"-": "better", "+": "worse"}[match[2]]]
