"""Megatron-LM's lists of data sets, with the meaning that they have there.

`--data-args-path`: words 'weight prefix weight prefix ...', or prefixes alone. `--per-split-data-args-path`: a JSON
object {"train": [...], "valid": [...], "test": [...]} whose values are such lists, or such words in one string.
Prefixes are relative to the working directory; version 0.1 took them relative to the list, so that is tried second.
"""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_doremi.data.indexed_dataset import paths_of
from megatron_doremi.errors import Fault, raise_if_any
from megatron_doremi.storage.formats import PathText, Schema, check_entry

# Above any weight that makes sense, and low enough that their sum is a float.
LARGEST_WEIGHT = 1e100
_RULE = "pairs of a weight (a number >= 0) and a prefix, or prefixes alone"
_REMEDY = "write: weight prefix weight prefix ..."
_SPLIT_WORD = re.compile(r"(^|[-_.])(train|training|valid|validation|val|test)(?=[-_.]|$)", re.IGNORECASE)
List = list[PathText | float]


class SplitLists(Schema):
    """The JSON of --per-split-data-args-path."""

    train: List | PathText
    valid: List | PathText | None = None
    test: List | PathText | None = None


@dataclass(frozen=True)
class Listed:
    """A domain of a list.

    Attributes:
        train, valid: prefixes as found on disk; where there is no such pair, below the list's folder.
        weight: the sum over all mentions of the prefix; None in a list without weights.
    """

    name: str
    train: Path
    valid: Path | None
    weight: float | None


@dataclass(frozen=True)
class _Mention:
    prefix: Path
    weight: float | None


def pair_identity(prefix: Path) -> Hashable:
    """The same for two prefixes exactly if they lead to one .bin file, through links and spellings too."""
    real = os.path.realpath(paths_of(prefix)[0])
    try:
        status = os.stat(real)
    except OSError:
        return real
    return (status.st_dev, status.st_ino) if status.st_ino else real


def is_split_lists(entry: Mapping[str, Any]) -> bool:
    """Whether a JSON object is one of lists by split rather than a manifest of this program."""
    return "train" in entry and "format" not in entry and "domains" not in entry


def read_words(path: Path, text: str, subject: str) -> tuple[list[Listed], list[str]]:
    """Reads 'weight prefix weight prefix ...'.

    Args:
        path: the list, for prefixes relative to its folder.
        text: its content.
        subject: how messages call it.

    Returns:
        Domains, and warnings.

    Raises:
        ConfigError: with every fault.
    """
    faults: list[Fault] = []
    mentions, warnings = _mentions(text.split(), path.parent, subject, faults)
    raise_if_any(faults)
    merged = _merged(mentions)
    names = _shortest([os.path.abspath(each.prefix).split(os.sep) for each in merged])
    domains = [Listed(name, each.prefix, None, each.weight) for name, each in zip(names, merged, strict=True)]
    return domains, warnings


def read_split_lists(path: Path, entry: Mapping[str, Any], subject: str) -> tuple[list[Listed], list[str]]:
    """Reads {"train": [...], "valid": [...]}; see `read_words`.

    A held-out prefix belongs to the train prefix that differs from it in the name of the split alone, in a folder or a
    file name: books_train_text_document and books_valid_text_document, train/books and valid/books. That name is no
    part of the domain's. Held-out weights are not read, since every domain is evaluated by itself.
    """
    lists = check_entry(entry, subject, SplitLists, 'give {"train": [weight, prefix, ...], "valid": [...]}')
    faults: list[Fault] = []
    train, warnings = _mentions(_words(lists.train), path.parent, subject, faults)
    valid, more = _mentions(_words(lists.valid or []), path.parent, subject, faults, empty=True)
    raise_if_any(faults)
    merged = _merged(train)
    names = _shortest([_without_split(each.prefix) for each in merged])
    held_out: dict[str, Path] = {}
    for mention in _merged(valid):
        parts = _without_split(mention.prefix)
        matches = [name for name in names if parts[-len(name.split("/")) :] == name.split("/")]
        if len(matches) != 1 or matches[0] in held_out:
            value = f"held-out prefix {mention.prefix}" + (", a second one" if len(matches) == 1 else "")
            rule = "one held-out prefix for a train prefix, named like it but for train and valid: " + ", ".join(names)
            faults.append(Fault(subject, value, rule, "rename the pair, or leave it out of 'valid'"))
        else:
            held_out[matches[0]] = mention.prefix
    raise_if_any(faults)
    domains = [
        Listed(name, each.prefix, held_out.get(name), each.weight) for name, each in zip(names, merged, strict=True)
    ]
    ignored = [f"{subject}: the list 'test' is not read"] if lists.test else []
    return domains, warnings + more + ignored


def _words(entry: List | str) -> list[str]:
    return entry.split() if isinstance(entry, str) else [str(word) for word in entry]


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _mentions(
    words: Sequence[str], folder: Path, subject: str, faults: list[Fault], empty: bool = False
) -> tuple[list[_Mention], list[str]]:
    """Words as weights and prefixes; those of weight 0 left out, which is said in the warnings."""
    numbers = [_number(word) for word in words]
    paired = len(words) % 2 == 0 and any(number is not None for number in numbers[::2])
    if not empty and not words:
        faults.append(Fault(subject, "0 words", _RULE, _REMEDY))
    if not paired and any(number is not None for number in numbers):
        # Megatron-LM would take a number for the prefix of a pair.
        faults.append(Fault(subject, f"{len(words)} words, numbers among them", _RULE, _REMEDY))
    if faults:
        return [], []
    pairs = list(zip(words[::2], words[1::2], strict=True)) if paired else [("", word) for word in words]
    mentions, warnings = [], []
    for text, word in pairs:
        weight = _number(text) if paired else None
        if paired and not (weight is not None and 0.0 <= weight < LARGEST_WEIGHT):
            faults.append(Fault(subject, f"weight {text} of {word}", _RULE, _REMEDY))
        elif weight == 0.0:
            warnings.append(f"{subject}: {word} has weight 0 and is left out")
        else:
            mentions.append(_Mention(_located(word, folder, subject, faults), weight))
    if not mentions and not faults and not empty:
        faults.append(Fault(subject, "weight 0 for every prefix", "a prefix with a positive weight", _REMEDY))
    return mentions, warnings


def _located(word: str, folder: Path, subject: str, faults: list[Fault]) -> Path:
    """Where the pair of a prefix is: in the working directory, or else below the list's folder."""
    if "\0" in word:
        faults.append(Fault(subject, repr(word[:60]), "prefixes without a NUL character", _REMEDY))
        return folder
    here, beside = Path(word), folder / word
    found = [each for each in (here, beside) if any(os.path.exists(path) for path in paths_of(each))]
    if len(found) == 2 and pair_identity(here) != pair_identity(beside):
        value = f"{word} is a pair in the working directory and another one in {folder}"
        faults.append(Fault(subject, value, "one of them", "give the absolute path"))
    return found[0] if found else beside


def _merged(mentions: Sequence[_Mention]) -> list[_Mention]:
    """One mention a pair, with the sum of the weights. Megatron-LM reads such a pair once for each mention."""
    merged: dict[Hashable, _Mention] = {}
    for each in mentions:
        key = pair_identity(each.prefix)
        before = merged.get(key)
        weight = each.weight if before is None or each.weight is None else (before.weight or 0.0) + each.weight
        merged[key] = _Mention(before.prefix if before else each.prefix, weight)
    return list(merged.values())


def _without_split(prefix: Path) -> list[str]:
    parts = os.path.abspath(prefix).split(os.sep)
    kept = [part for part in (_SPLIT_WORD.sub("", each).strip("-_.") for each in parts) if part]
    return kept or parts[-1:]


def _shortest(paths: Sequence[Sequence[str]]) -> list[str]:
    """Of each path the shortest end that no other path has; whole ones where two are the same but for links."""
    names = []
    for own in paths:
        others = [path for path in paths if path is not own]
        size = next(
            (n for n in range(1, len(own)) if all(list(path[-n:]) != list(own[-n:]) for path in others)), len(own)
        )
        names.append("/".join(own[-size:]))
    return names
