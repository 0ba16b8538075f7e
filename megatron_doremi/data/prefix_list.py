"""Megatron-LM's lists of data sets, with Megatron-LM's semantics.

`--data-path`, `--data-args-path`: words 'weight prefix weight prefix ...', or prefixes alone.
`--per-split-data-args-path`: a JSON object {"train": [...], "valid": [...], "test": [...]} whose values are lists of
such words, or one string of them. Prefixes are relative to the working directory. Version 0.1 resolved them relative to
the list's folder, which is still the fallback.
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

# Larger than any sensible weight, and small enough that a sum of weights does not overflow a float.
LARGEST_WEIGHT = 1e100
_RULE = "pairs of a weight (a number >= 0) and a prefix, or prefixes alone"
_REMEDY = "write: weight prefix weight prefix ..."
_SPLIT_WORD = re.compile(r"(^|[-_.])(train|training|valid|validation|val|test)(?=[-_.]|$)", re.IGNORECASE)
List = list[PathText | float]


class SplitLists(Schema):
    """The JSON file of --per-split-data-args-path."""

    train: List | PathText
    valid: List | PathText | None = None
    test: List | PathText | None = None


@dataclass(frozen=True)
class ListedDomain:
    """A domain of a list.

    Attributes:
        train, valid: prefixes of the pairs on disk; of a missing pair, the prefix as the list has it.
        weight: the sum over all occurrences of the prefix; None in a list without weights.
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
    """A key that is equal for two prefixes exactly if they name the same .bin file, also through links."""
    real = os.path.realpath(paths_of(prefix)[0])
    try:
        status = os.stat(real)
    except OSError:
        return real
    return (status.st_dev, status.st_ino) if status.st_ino else real


def is_split_lists(entry: Mapping[str, Any]) -> bool:
    """Whether a JSON object holds Megatron-LM's lists by split rather than a manifest of this program."""
    return "train" in entry and "format" not in entry and "domains" not in entry


def read_words(path: Path, text: str, subject: str) -> tuple[list[ListedDomain], list[str]]:
    """Reads 'weight prefix weight prefix ...'.

    Args:
        path: the list's path; prefixes may be relative to its folder.
        text: its content.
        subject: its name in messages.

    Returns:
        The domains, and warnings.

    Raises:
        ConfigError: with all faults.
    """
    faults: list[Fault] = []
    mentions, warnings = _mentions(text.split(), path.parent, subject, faults)
    raise_if_any(faults)
    merged = _merged(mentions)
    names = _shortest_names([os.path.abspath(mention.prefix).split(os.sep) for mention in merged])
    domains = [ListedDomain(name, each.prefix, None, each.weight) for name, each in zip(names, merged, strict=True)]
    return domains, warnings


def read_split_lists(path: Path, entry: Mapping[str, Any], subject: str) -> tuple[list[ListedDomain], list[str]]:
    """Reads {"train": [...], "valid": [...]}; see `read_words`.

    A held-out prefix belongs to the train prefix from which it differs only by the name of the split, in a folder or
    file name: books_train_text_document and books_valid_text_document, or train/books and valid/books. The domain's
    name excludes the split. Held-out weights are ignored, because every domain is evaluated separately.
    """
    lists = check_entry(entry, subject, SplitLists, 'give {"train": [weight, prefix, ...], "valid": [...]}')
    faults: list[Fault] = []
    train, warnings = _mentions(_words(lists.train), path.parent, subject, faults)
    valid, valid_warnings = _mentions(_words(lists.valid or []), path.parent, subject, faults, empty=True)
    raise_if_any(faults)
    merged = _merged(train)
    names = _shortest_names([_without_split(mention.prefix) for mention in merged])
    held_out: dict[str, Path] = {}
    for mention in _merged(valid):
        parts = _without_split(mention.prefix)
        matches = [name for name in names if parts[-len(name.split("/")) :] == name.split("/")]
        if len(matches) != 1 or matches[0] in held_out:
            value = f"held-out prefix {mention.prefix}" + (", a second one" if len(matches) == 1 else "")
            rule = "one held-out prefix for each train prefix, with the same name except for train and valid: "
            rule += ", ".join(names)
            faults.append(Fault(subject, value, rule, "rename the pair, or leave it out of 'valid'"))
        else:
            held_out[matches[0]] = mention.prefix
    raise_if_any(faults)
    domains = [
        ListedDomain(name, mention.prefix, held_out.get(name), mention.weight)
        for name, mention in zip(names, merged, strict=True)
    ]
    ignored = [f"{subject}: the list 'test' is ignored"] if lists.test else []
    return domains, warnings + valid_warnings + ignored


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
    """The words as weights and prefixes, and warnings: prefixes of weight 0 are dropped with a warning."""
    numbers = [_number(word) for word in words]
    paired = len(words) % 2 == 0 and any(number is not None for number in numbers[::2])
    if not empty and not words:
        faults.append(Fault(subject, "0 words", _RULE, _REMEDY))
    if not paired and any(number is not None for number in numbers):
        # Megatron-LM would take the number for a prefix.
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
            warnings.append(f"{subject}: {word} has weight 0 and is ignored")
        else:
            mentions.append(_Mention(_located(word, folder, subject, faults), weight))
    if not mentions and not faults and not empty:
        faults.append(Fault(subject, "weight 0 for every prefix", "at least one positive weight", _REMEDY))
    return mentions, warnings


def _located(word: str, folder: Path, subject: str, faults: list[Fault]) -> Path:
    """The path of a pair: relative to the working directory, else relative to the list's folder."""
    if "\0" in word:
        faults.append(Fault(subject, repr(word[:60]), "prefixes without a NUL character", _REMEDY))
        return folder
    in_working_directory, in_folder = Path(word), folder / word
    candidates = (in_working_directory, in_folder)
    existing = [prefix for prefix in candidates if any(os.path.exists(path) for path in paths_of(prefix))]
    if len(existing) == 2 and pair_identity(in_working_directory) != pair_identity(in_folder):
        value = f"{word} is a pair in the working directory and a different pair in {folder}"
        faults.append(Fault(subject, value, "an unambiguous prefix", "give the absolute path"))
    return existing[0] if existing else in_working_directory


def _merged(mentions: Sequence[_Mention]) -> list[_Mention]:
    """One mention per pair, with the sum of its weights. Megatron-LM reads such a pair once per mention."""
    merged: dict[Hashable, _Mention] = {}
    for mention in mentions:
        key, weight = pair_identity(mention.prefix), mention.weight
        earlier = merged.get(key)
        if earlier is not None and weight is not None:
            weight += earlier.weight or 0.0
        merged[key] = _Mention(earlier.prefix if earlier else mention.prefix, weight)
    return list(merged.values())


def _without_split(prefix: Path) -> list[str]:
    parts = os.path.abspath(prefix).split(os.sep)
    without = [_SPLIT_WORD.sub("", part).strip("-_.") for part in parts]
    return [part for part in without if part] or parts[-1:]


def _shortest_names(paths: Sequence[Sequence[str]]) -> list[str]:
    """The shortest unique suffix of each path; the full path if there is none."""
    names = []
    for path in paths:
        other_paths = [other for other in paths if other is not path]
        size = next(
            (n for n in range(1, len(path)) if all(list(other[-n:]) != list(path[-n:]) for other in other_paths)),
            len(path),
        )
        names.append("/".join(path[-size:]))
    return names
