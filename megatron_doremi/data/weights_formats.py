"""Files of weights that other programs write, read as weights by the names in the file:

    DoReMi  JSON {"train_domain_weights": {NAME: w}, ...}, of the authors' repository
    RegMix  YAML {train: {NAME: w}, valid: ..., model_name: ...}; CSV with a row for each run: index, NAME, NAME, ...
    Olmix   YAML {..., mix: {SOURCE: {weight: w, TOPIC: {weight: w}}}}; CSV with a row for each run: run or run_id,
            name, index, NAME, NAME, ...; JSON [{"domain": NAME, "weight": w}, ...], its proposed mixture

A bare mapping of names and weights may be JSON or YAML, and a CSV may have the columns domain and weight.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_doremi.data.given_weights import did_you_mean, file_and_row
from megatron_doremi.errors import ConfigError, Fault
from megatron_doremi.storage.files import json_object, read_json, read_text_file, unreadable
from megatron_doremi.storage.yaml_file import number_or_text, read_yaml_mapping

# Columns that are no domains: they identify runs, or, without a name, hold the row numbers that pandas writes.
_ROW_COLUMNS = ("run", "run_id", "name", "index", "")
_RECORD = {"domain", "weight"}
_MIX_PROPERTIES = ("weight", "repetition_factor")


def read_weights_file(setting: str, subject: str, remedy: str, domains: Collection[str]) -> dict[str, Any]:
    """The object that a file of weights holds; of a table its weights by column.

    Args:
        setting: the path of a JSON, YAML or CSV file, or FILE.csv@RUN.
        subject: the file's name in messages.
        remedy: what the user should do if the file cannot be read.
        domains: names that columns of domains may have, even if other tables identify runs by them.

    Raises:
        ConfigError: the file cannot be read, a name occurs twice, or the run is missing or ambiguous.
    """
    name, row = file_and_row(setting)
    path, suffix = Path(name), Path(name).suffix.lower()
    if suffix == ".csv":
        return _read_table(path, row, subject, remedy, domains)
    if suffix in (".yaml", ".yml"):
        return read_yaml_mapping(path, subject, remedy)
    content = read_json(path, subject, remedy)
    if isinstance(content, list) and content and all(isinstance(e, dict) and set(e) == _RECORD for e in content):
        return _by_name([(str(entry["domain"]), entry["weight"]) for entry in content], subject)
    return json_object(content, subject, remedy)


def weights_within(entry: Mapping[str, Any], subject: str, domains: Collection[str]) -> Any:
    """The weights by name in a file without a format of its own: see the module's docstring.

    Raises:
        ConfigError: the file holds settings, but no weights.
    """
    authors = "train_domain_weights"
    mappings = [authors] if authors in entry and authors not in domains else []
    mappings += [name for name in ("mix", "train") if isinstance(entry.get(name), dict)]
    direct = [name for name in entry if name in domains and isinstance(entry[name], int | float)]
    if mappings and len(mappings) + bool(direct) > 1:
        listed = " and ".join(map(repr, [*mappings, *direct[:1]]))
        raise ConfigError(Fault(subject, f"weights in {listed}", "one set of weights", "remove the others"))
    if mappings:
        return flattened_mix(entry["mix"], subject) if mappings == ["mix"] else entry[mappings[0]]
    if entry and not any(name in domains or isinstance(value, int | float) for name, value in entry.items()):
        listed = ", ".join(repr(name) for name in list(entry)[:5]) + (", ..." if len(entry) > 5 else "")
        rule = "weights by name, in the file itself or in a mapping 'train' (RegMix) or 'mix' (Olmix)"
        raise ConfigError(Fault(subject, f"no weights, but {listed}", rule, "give a file of weights"))
    return entry


def flattened_mix(mix: Mapping[str, Any], subject: str) -> dict[str, Any]:
    """The leaves of Olmix's nested `mix` as {"source:topic:quality": weight}.

    A leaf's weight is the product of the weights on its path; a level above leaves without one counts as 1.
    `repetition_factor` says how often Olmix may repeat a source and has no effect here. A weight that is not a number
    of 0 or more is returned as it is, under the name of its level, for the caller to refuse; so is None for a leaf
    without one.

    Args:
        subject: the file's name in messages.

    Raises:
        ConfigError: two leaves have one name.
    """
    leaves: list[tuple[str, Any]] = []

    def add(name: str, node: Any, share: float) -> None:
        children, weight = dict[str, Any](), node
        if isinstance(node, dict):
            children = {key: value for key, value in node.items() if key not in _MIX_PROPERTIES}
            weight = node.get("weight", 1.0 if children else None)
        elif isinstance(node, list) and len(node) == 2:
            # Earlier versions of Olmix write [weight, repetition factor].
            weight = node[0]
        valid = isinstance(weight, int | float) and not isinstance(weight, bool) and weight >= 0.0
        if not valid or not children:
            leaves.append((name, _product(share, weight) if valid else weight))
            return
        for child, value in children.items():
            add(f"{name}:{child}", value, _product(share, weight))

    for name, node in mix.items():
        add(name, node, 1.0)
    return _by_name(leaves, subject)


def _product(share: float, weight: float) -> float:
    """The product, and where it vanishes the smallest number: only a weight of 0 leaves a domain out."""
    return share * weight or (math.ulp(0.0) if share and weight else 0.0)


def _read_table(path: Path, row: str | None, subject: str, remedy: str, domains: Collection[str]) -> dict[str, Any]:
    """The weights in one row of a table with a column for each domain, or in a table of columns domain and weight."""
    try:
        reader = csv.reader(io.StringIO(read_text_file(path), newline=""), strict=True, skipinitialspace=True)
        lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader if cells]
        if not lines:
            raise ValueError("an empty file")
        header, rows = lines[0][1], lines[1:]
        if len(header) == 1 and len(parts := re.split(r"[;\t]", header[0])) > 1:
            raise ValueError(f"one column, {header[0][:60]!r}: is it separated by {header[0][len(parts[0])]!r}?")
        for line, cells in rows:
            if len(cells) != len(header):
                raise ValueError(f"line {line}: {len(cells)} cells, and {len(header)} columns")
    except (OSError, ValueError, csv.Error) as error:
        rule = "a readable CSV file with a header, and as many cells in each row"
        value, remedy = unreadable(path, error, remedy)
        raise ConfigError(Fault(subject, value, rule, remedy)) from error
    if set(header) - {""} == _RECORD and not _RECORD & set(domains) and row is None:
        if header.count("domain") + header.count("weight") > len(_RECORD):
            raise ConfigError(Fault(subject, "a column twice", "one column domain and one weight", "remove the others"))
        pairs = [(cells[header.index("domain")], cells[header.index("weight")]) for _, cells in rows]
        return _by_name([(name, number_or_text(text)) for name, text in pairs], subject)
    others = [i for i, name in enumerate(header) if name in _ROW_COLUMNS and name not in domains]
    identifying = [i for i in others if header[i]] or others
    chosen = _chosen_row(path, header, [cells for _, cells in rows], identifying, row, subject)
    weights = [(name, number_or_text(chosen[i])) for i, name in enumerate(header) if i not in others]
    return _by_name(weights, subject)


def _chosen_row(
    path: Path,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    identifying: Sequence[int],
    row: str | None,
    subject: str,
) -> Sequence[str]:
    """The row of the run `row`; without it, the only one.

    Args:
        identifying: columns that identify runs.
    """
    rule = "one row, since each is the mixture of a run"
    if row is None:
        if len(rows) == 1:
            return rows[0]
        example = rows[0][identifying[0]] if rows and identifying else "RUN"
        columns = " or ".join(repr(header[i]) for i in identifying if header[i]) or "a column 'run' of the table"
        remedy = f"name the run by its value in {columns}, as in --domain-weights {path}@{example}"
        raise ConfigError(Fault(subject, f"{len(rows):,} rows", rule, remedy))
    matches = [cells for cells in rows if any(cells[i] == row for i in identifying)]
    if len(matches) == 1:
        return matches[0]
    runs = [cells[i] for i in identifying for cells in rows]
    value = f"{len(matches):,} rows of run {row!r}" if matches else f"no run {row!r}"
    guess = "" if matches else did_you_mean(row, runs)
    names = ", ".join(repr(header[i]) for i in identifying) or "none (run, run_id, name or index)"
    raise ConfigError(Fault(subject, value, rule, guess or f"give a value that one row has in its columns {names}"))


def _by_name(pairs: Sequence[tuple[str, Any]], subject: str) -> dict[str, Any]:
    """Weights by name; a name that occurs twice is a fault."""
    weights = dict(pairs)
    if len(weights) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        faults = [
            Fault(subject, f"{name!r} twice", "one weight for each domain", "remove one of the two")
            for name in weights
            if counts[name] > 1
        ]
        raise ConfigError(faults)
    return weights
