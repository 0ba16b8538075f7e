"""Tables of raw values with a format for each column, as aligned text and as CSV. Pure: nothing is read or printed."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

Value = str | float | None
Row = tuple[Value, ...]

NOT_MEASURED = "-"


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: its heading.
        format: makes the text of a number; a string is shown as it is, None and NaN as NOT_MEASURED.
    """

    name: str
    format: Callable[[float], str] | None = None

    @property
    def is_text(self) -> bool:
        """Whether the cells are text, which is aligned left."""
        return self.format is None

    def text(self, value: Value) -> str:
        """A cell's text."""
        if isinstance(value, str):
            return value
        if value is None or math.isnan(value):
            return NOT_MEASURED
        return str(value) if self.format is None else self.format(value)


@dataclass(frozen=True)
class Table:
    """A table; CSV holds the raw values, every other form the formatted ones.

    Attributes:
        name: of its CSV file, without a suffix.
        columns: the first is text.
        rows: a value for each column.
        summary: rows below a rule.
        caption: contents and units.
    """

    name: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    summary: tuple[Row, ...] = ()
    caption: str = ""

    def csv(self) -> str:
        """The table as CSV (RFC 4180), raw values; None and NaN are empty."""
        buffer = io.StringIO()
        writer = csv.writer(buffer)
        writer.writerow([column.name for column in self.columns])
        for row in (*self.rows, *self.summary):
            writer.writerow(["" if value is None or value != value else value for value in row])
        return buffer.getvalue()


def format_loss(value: float) -> str:
    """Formats a loss, in nats per token or bits per byte."""
    return f"{value:.3f}"


def format_difference(value: float) -> str:
    """Formats a difference of losses with its sign, or "0.000" if it rounds to zero."""
    text = f"{value:+.3f}"
    return "0.000" if float(text) == 0.0 else text


def format_weight(value: float) -> str:
    """Formats a weight: four decimals, or two significant digits below 0.001."""
    return f"{value:.4f}" if value >= 0.001 or value == 0.0 else f"{value:.1e}"


def format_count(value: float) -> str:
    """Formats a number of tokens or steps."""
    return f"{value:,.0f}"


def format_epochs(value: float) -> str:
    """Formats a number of epochs or a ratio: two decimals, or two significant digits below 0.1."""
    return f"{value:,.2f}" if value >= 0.1 or value == 0.0 else f"{value:.2g}"


def format_interval(interval: tuple[float, float] | None) -> str:
    """Formats an interval of differences."""
    if interval is None:
        return NOT_MEASURED
    return f"[{format_difference(interval[0])}, {format_difference(interval[1])}]"


def format_seconds(value: float) -> str:
    """Formats a duration."""
    if value < 60:
        return f"{value:.1f} s"
    hours, seconds = divmod(round(value), 3600)
    return f"{hours}:{seconds // 60:02d}:{seconds % 60:02d} h" if hours else f"{seconds // 60}:{seconds % 60:02d} min"


def fitted(table: Table, width: int) -> tuple[Table, int]:
    """Drops columns from the right until the text is at most `width` columns wide; returns the number dropped."""
    dropped = 0
    while len(table.columns) > 2 and max(map(len, format_text(table).split("\n")[1:])) > width:
        end = -1
        dropped += 1
        table = replace(
            table,
            columns=table.columns[:end],
            rows=tuple(row[:end] for row in table.rows),
            summary=tuple(row[:end] for row in table.summary),
        )
    return table, dropped


def excerpt(table: Table, limit: int) -> Table:
    """The first and last rows, at most `limit` with a row of dots between them; all of them if they are few."""
    if len(table.rows) <= limit:
        return table
    head, tail = limit // 2, (limit - 1) // 2
    hidden = len(table.rows) - head - tail
    dots: Row = (f"... {hidden:,} more", *[""] * (len(table.columns) - 1))
    return replace(table, rows=(*table.rows[:head], dots, *table.rows[len(table.rows) - tail :]))


def format_text(table: Table, label_width: int = 32) -> str:
    """Returns the table as plain text, text aligned left and numbers right, long names shortened."""
    cells = [[column.text(value) for column, value in zip(table.columns, row, strict=True)] for row in table.rows]
    summary = [[column.text(value) for column, value in zip(table.columns, row, strict=True)] for row in table.summary]
    header = [column.name for column in table.columns]
    lines = [[_shortened(row[0], label_width), *row[1:]] for row in (header, *cells, *summary)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(table.columns))]
    left = [column.is_text for column in table.columns]
    rule = "  ".join("-" * width for width in widths)
    body = [_text_line(line, widths, left) for line in lines]
    text = [table.caption, body[0], rule, *body[1 : 1 + len(cells)]]
    return "\n".join([*text, *([rule, *body[1 + len(cells) :]] if summary else [])])


def _shortened(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 3]}..."


def _text_line(cells: Sequence[str], widths: Sequence[int], left: Sequence[bool]) -> str:
    padded = [
        cell.ljust(width) if is_left else cell.rjust(width)
        for cell, width, is_left in zip(cells, widths, left, strict=True)
    ]
    return "  ".join(padded).rstrip()
