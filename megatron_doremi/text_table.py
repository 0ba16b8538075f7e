"""Tables of text whose columns stay aligned whatever the names hold: wide, combining, control or unencodable
characters."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Sequence


def shown_text(text: str, columns: int = 0, encoding: str | None = None) -> str:
    """Text on one line, as a console of this encoding prints it; truncated to a number of columns, unless 0.

    Args:
        encoding: None is that of stdout. What it does not have, and control characters, become backslash escapes.
    """
    encoding = encoding or getattr(sys.stdout, "encoding", None) or "utf-8"
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    line = line.encode(encoding, "backslashreplace").decode(encoding)
    if not columns or width_of(line) <= columns:
        return line
    kept = line[: columns - 3]
    while width_of(kept) > columns - 3:
        kept = kept[:-1]
    return kept + "..."


def width_of(text: str) -> int:
    """Columns of text at a terminal: two for a wide character, none for a combining one."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.combining(character) > 0 for character in text)


def table_lines(header: Sequence[str], rows: Sequence[Sequence[str]], name_columns: int = 40) -> list[str]:
    """The lines of a table: the first column to the left, truncated to `name_columns`; the others to the right."""
    cells = [[shown_text(row[0], name_columns), *row[1:]] for row in (header, *rows)]
    widths = [max(width_of(row[column]) for row in cells) for column in range(len(header))]
    lines = []
    for first, *others in cells:
        padded = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first + " " * (widths[0] - width_of(first)), *padded]).rstrip())
    return lines
