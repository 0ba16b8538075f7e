"""Weights and domain names on the command line: `--domain-weights A=0.5,B=0.5` and `--exclude-domains A,B`.

Names may hold spaces, commas and equal signs. A name ends at the last `=` before its weight, so that a comma belongs
to the name unless a weight precedes it: `a, b=1,c=2` names "a, b" and "c". In a list without weights, the longest run
of parts that is a domain's name is one name.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterator, Sequence

from megatron_doremi.errors import Fault

_ENTRY = re.compile(r"\s*(.+?)\s*=\s*([^=,]*?)\s*(?:,|$)", re.DOTALL)
# Of files of weights.
WEIGHTS_SUFFIXES = (".json", ".yaml", ".yml", ".csv")
_TABLE_ROW = re.compile(r"\.csv@", re.IGNORECASE)
_FILE = re.compile(f"({'|'.join(map(re.escape, WEIGHTS_SUFFIXES))})$|{_TABLE_ROW.pattern}", re.IGNORECASE)
# The shortest name that is recognized at the end of a longer one.
_SHORTEST_ENDING = 3
_RULE = "NAME=WEIGHT,NAME=WEIGHT,... with a weight of 0 or more for each domain"
_REMEDY = 'write for example --domain-weights "A=0.5,B=0.5"; a weight of 0 leaves a domain out'


def is_inline(setting: str) -> bool:
    """Whether --domain-weights holds weights rather than a keyword or a path."""
    return "=" in setting and not _FILE.search(setting) and not os.path.lexists(setting)


def file_and_row(setting: str) -> tuple[str, str | None]:
    """The path in --domain-weights, and RUN of FILE.csv@RUN; None without it."""
    match = _TABLE_ROW.search(setting)
    if match is None or os.path.lexists(setting):
        return setting, None
    return setting[: match.end() - 1], setting[match.end() :]


def read_inline(setting: str, subject: str) -> tuple[dict[str, float], list[Fault]]:
    """The weights in `A=0.5,B=0.5` by name, as given, and the faults of its form; names are checked elsewhere."""
    weights: dict[str, float] = {}
    faults: list[Fault] = []
    position = 0
    while position < len(setting):
        match = _ENTRY.match(setting, position)
        if match is None:
            faults.append(Fault(subject, f"no weight after {setting[position:].strip()!r}", _RULE, _REMEDY))
            break
        position = match.end()
        name, text = match.groups()
        try:
            weight = math.nan if "_" in text else float(text)
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight) or weight < 0.0:
            faults.append(Fault(subject, f"{name}={text}", _RULE, _REMEDY))
        if name in weights:
            faults.append(Fault(subject, f"{name!r} twice", "one weight for each domain", "remove one of the two"))
        weights[name] = weight
    return weights, faults


def split_names(words: Sequence[str], known: Sequence[str]) -> Iterator[str]:
    """The names in words such as `A,B`; of parts that are no name together, each one alone."""
    for word in words:
        parts = word.split(",")
        while parts:
            size = next((n for n in range(len(parts), 1, -1) if ",".join(parts[:n]).strip() in known), 1)
            name = ",".join(parts[:size]).strip()
            if name:
                yield name
            parts = parts[size:]


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """`did you mean 'Books'?` for the domain name that is most like `name`; "" if none is.

    A name that `name` ends with, but for case and punctuation, comes first: 'train_the_pile_arxiv' is 'ArXiv'.
    """
    plain = _letters(name)
    endings = [other for other in known if len(_letters(other)) >= _SHORTEST_ENDING and plain.endswith(_letters(other))]
    if endings:
        return f"did you mean {max(endings, key=lambda other: len(_letters(other)))!r}?"
    folded = {other.casefold(): other for other in known}
    near = difflib.get_close_matches(name.casefold().strip(), folded, n=1)
    return f"did you mean {folded[near[0]]!r}?" if near else ""


def _letters(name: str) -> str:
    """Letters and digits only, without case."""
    return "".join(character for character in name.casefold() if character.isalnum())
