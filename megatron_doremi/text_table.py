"""Tables of text whose columns stay aligned whatever the names hold: wide, combining, control or unencodable
characters."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Sequence

from megatron_doremi.console import COLUMNS

# At least and at most, of a table's names.
_NAME_COLUMNS = (16, 40)


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


def shown_name(name: str, columns: int) -> str:
    """A name as `shown_text` shows it; the middle of one that is too long is left out, since names differ at both
    ends."""
    line = kept = shown_text(name)
    length = columns - len("...")
    while width_of(kept) > columns:
        kept = line[: length - length // 2] + "..." + line[len(line) - length // 2 :]
        length -= 1
    return kept


def width_of(text: str) -> int:
    """Columns of text at a terminal: two for a wide character, none for a combining one."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.combining(character) > 0 for character in text)


def table_lines(header: Sequence[str], rows: Sequence[Sequence[str]], columns: int = COLUMNS) -> list[str]:
    """The lines of a table: the first column, of names, to the left; the others to the right.

    Args:
        columns: of the widest line. Names have at most 40, at least 16.
    """
    widths = [max(width_of(row[column]) for row in (header, *rows)) for column in range(len(header))]
    room = columns - sum(width + 2 for width in widths[1:])
    names = [shown_name(row[0], min(_NAME_COLUMNS[1], max(_NAME_COLUMNS[0], room))) for row in (header, *rows)]
    widths[0] = max(map(width_of, names))
    lines = []
    for first, (_, *others) in zip(names, (header, *rows), strict=True):
        padded = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first + " " * (widths[0] - width_of(first)), *padded]).rstrip())
    return lines
