"""Renders a report as one self-contained HTML file: text, tables, and images as data URIs.

All text, which may come from files (domain names, configuration values, paths), is escaped here, once.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from megatron_doremi.reporting.tables import Table

CSS = """
:root { color-scheme: light; }
body { font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #1f2430;
  background: #fff; max-width: 1080px; margin: 2.2rem auto 4rem; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; } h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; }
.subtitle { color: #5b6270; margin: 0 0 1.6rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: #5b6270; padding-bottom: .4rem; }
th, td { padding: .28rem .8rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: .2rem; }
thead th { border-bottom: 2px solid #c9cdd4; } tbody tr + tr td { border-top: 1px solid #eceef2; }
tbody.summary { border-top: 2px solid #c9cdd4; font-weight: 600; }
.better { color: #1a7f4b; } .worse { color: #b42318; }
ul { padding-left: 1.2rem; } li { margin: .25rem 0; }
figure { margin: 1.2rem 0 2rem; } figure img { max-width: 100%; height: auto; border: 1px solid #eceef2; }
figcaption { color: #5b6270; font-size: .9rem; }
details { margin: .6rem 0; } summary { cursor: pointer; }
.values td { white-space: normal; text-align: left; overflow-wrap: anywhere; }
.values th { text-align: left; }
"""


@dataclass(frozen=True)
class Image:
    """A figure of the report.

    Attributes:
        name: file name of the PNG, without a folder.
        png: its bytes.
        caption: text under the figure.
    """

    name: str
    png: bytes
    caption: str


@dataclass(frozen=True)
class Section:
    """A section of the report; empty parts are omitted.

    Attributes:
        title: heading.
        sentences: bullet points.
        tables: tables of numbers.
        images: figures.
        values: tables of text, such as configuration values.
        folded: (summary, {key: value}) pairs, collapsed at first.
    """

    title: str
    sentences: Sequence[str] = ()
    tables: Sequence[Table] = ()
    images: Sequence[Image] = ()
    values: Sequence[Table] = ()
    folded: Sequence[tuple[str, Mapping[str, object]]] = field(default_factory=tuple)


def page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """Returns the full document; all arguments are plain text, which is escaped here."""
    body = "\n".join(_section(section) for section in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        f'<h1>{escape(title)}</h1>\n<p class="subtitle">{escape(subtitle)}</p>\n{body}\n</body>\n</html>\n'
    )


def _section(section: Section) -> str:
    parts = [f"<h2>{escape(section.title)}</h2>"]
    if section.sentences:
        items = "\n".join(f"<li>{escape(sentence)}</li>" for sentence in section.sentences)
        parts.append(f"<ul>\n{items}\n</ul>")
    parts += [_table(table, "") for table in section.tables]
    parts += [_figure(image) for image in section.images]
    parts += [_table(table, "values") for table in section.values]
    for summary, values in section.folded:
        rows = tuple((key, str(value)) for key, value in values.items())
        inner = _table(Table(("key", "value"), rows), "values")
        parts.append(f"<details><summary>{escape(summary)}</summary>{inner}</details>")
    return "\n".join(parts)


def _figure(image: Image) -> str:
    encoded = base64.b64encode(image.png).decode("ascii")
    caption = escape(image.caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{encoded}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _table(table: Table, css_class: str) -> str:
    marked = table.header.index("difference") if "difference" in table.header else None
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
    caption = f"<caption>{escape(table.caption)}</caption>" if table.caption else ""
    body = "\n".join(_row(row, marked) for row in table.rows)
    summary = "\n".join(_row(row, marked) for row in table.summary)
    summary = f'<tbody class="summary">\n{summary}\n</tbody>' if summary else ""
    name = f' class="{css_class}"' if css_class else ""
    return (
        f'<div class="scroll"><table{name}>{caption}<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>{summary}</table></div>"
    )


def _row(cells: Sequence[str], marked: int | None) -> str:
    parts = []
    for column, cell in enumerate(cells):
        sign = {"-": "better", "+": "worse"}.get(cell[:1]) if column == marked and len(cell) > 1 else None
        name = f' class="{sign}"' if sign else ""
        parts.append(f"<td{name}>{escape(cell)}</td>")
    return f"<tr>{''.join(parts)}</tr>"
