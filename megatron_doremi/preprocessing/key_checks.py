"""Checks, before a long input is read, that the first records of JSON files hold the fields of text and domain."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from megatron_doremi.errors import Fault
from megatron_doremi.preprocessing.documents import DocumentReader, DomainKey, NoDomain, NoText
from megatron_doremi.preprocessing.inputs import LINES, InputFile
from megatron_doremi.preprocessing.sources import BadLine, parse_block, read_blocks

# The first records of at most this many files are checked.
_PROBED_FILES, _PROBED_RECORDS = 8, 100
# Keys that a message names.
_SHOWN_KEYS = 12


def key_faults(files: Sequence[InputFile], reader: DocumentReader, on_error: str) -> list[Fault]:
    """A fault for each of a sample of JSON files in which no record of the first ones holds the text, or none a domain.
    With --on-error skip only if no file of the sample does."""
    lines = [file for file in files if file.kind == LINES]
    sample = lines[:: max(1, -(-len(lines) // _PROBED_FILES))]
    faults = [fault for fault in (_fault_of(file, reader) for file in sample) if fault is not None]
    none_left = len(faults) == len(sample) and len(lines) == len(files)
    return faults if on_error == "fail" or none_left else []


def _fault_of(file: InputFile, reader: DocumentReader) -> Fault | None:
    records = [
        record
        for block in itertools.islice(read_blocks(file, reader.columns, reader.needed_of), 1)
        for _, record in itertools.islice(parse_block(block), _PROBED_RECORDS)
        if not isinstance(record, BadLine)
    ]
    # Rules may match later records; only a key is checked.
    domain = file.domain if isinstance(reader.domains, DomainKey) else "any"
    missing = [_missing(record, reader, domain) for record in records]
    subject, first = f"--input {file.path}", f"in its first {len(records):,} record{'' if len(records) == 1 else 's'}"
    keys = ", ".join(map(repr, _keys(records[0]))) if records else ""
    rule = f"a field of each record; the first one holds {keys}" if keys else "an object with fields as each record"
    if missing and all(isinstance(fault, NoText) for fault in missing):
        return Fault(subject, f"{missing[0]} {first}", rule, "name the field of the text: --text-key KEY")
    if missing and all(isinstance(fault, NoDomain) for fault in missing):
        remedy = "name the field: --domain-key KEY; or give --domain-from-file, or --default-domain NAME"
        return Fault(subject, f"{missing[0]} {first}", rule, remedy)
    return None


def _missing(record: Any, reader: DocumentReader, domain: str | None) -> BadLine | None:
    """Why a record holds no document; None if it holds one."""
    try:
        reader.read(record, "", domain)
    except BadLine as fault:
        return fault
    return None


def _keys(record: Any) -> list[str]:
    """The keys of a record, with dots for nested ones."""
    keys: list[str] = []
    for key, value in record.items() if isinstance(record, dict) else ():
        keys += [f"{key}.{nested}" for nested in value] if isinstance(value, dict) and value else [key]
    return keys[:_SHOWN_KEYS] + (["..."] if len(keys) > _SHOWN_KEYS else [])
