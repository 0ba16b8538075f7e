"""The console's view of a study: verdict, one table and the findings, in a terminal's height and width."""

from __future__ import annotations

import textwrap

from megatron_doremi.reporting.comparison import Study
from megatron_doremi.reporting.rounds import RoundsEntry, concentration_warning, rounds_table, verdict_of_round
from megatron_doremi.reporting.study_tables import difference_table, held_out_table, weights_table
from megatron_doremi.reporting.tables import Table, excerpt, fitted, format_text
from megatron_doremi.reporting.verdict import findings, verdict

WIDTH = 120
LINES = 37
_ROWS = 10


def console_text(study: Study, rounds: RoundsEntry | None = None) -> str:
    """Returns at most LINES lines of at most WIDTH columns: the table, the differences, the verdict, the findings.

    Args:
        rounds: shown in place of the table, if given.
    """
    lines: list[str] = []
    tables: list[Table] = []
    if rounds is not None:
        tables.append(rounds_table(rounds))
        lines += ["", *_wrapped(verdict_of_round(rounds), "")]
        warning = concentration_warning(rounds)
        lines += _wrapped(warning, "") if warning else []
    elif study.compared:
        tables.append(held_out_table(study))
    else:
        weights = weights_table(study)
        tables += [weights] if weights is not None else []
    for table in tables:
        shown, dropped = fitted(excerpt(table, _ROWS), WIDTH)
        if dropped:
            lines.append(f"({dropped} more column{'s' if dropped > 1 else ''} in report.html)")
        lines = [*_wrapped(shown.caption, ""), *format_text(shown).split("\n")[1:], *lines]
    if study.comparisons and any(len(comparison.pairing.pairs) > 1 for comparison in study.comparisons):
        shown, _ = fitted(excerpt(difference_table(study), 9), WIDTH)
        lines += ["", *format_text(shown).split("\n")[1:]]
    lines += ["", *_wrapped(verdict(study), "")]
    sentences = findings(study)
    for number, sentence in enumerate(sentences):
        wrapped = _wrapped(sentence, "- ")
        rest = len(sentences) - number
        if len(lines) + len(wrapped) + (rest > 1) > LINES:
            lines.append(f"- {rest} more in report.html")
            break
        lines += wrapped
    return "\n".join(lines)


def _wrapped(text: str, bullet: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=bullet, subsequent_indent=" " * len(bullet)) or [bullet]
