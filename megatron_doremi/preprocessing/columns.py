"""Checks of the columns of tables (CSV, Parquet, Arrow): the required ones exist once, and the text column is text."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import pyarrow.types

from megatron_doremi.errors import ConfigError, Fault
from megatron_doremi.preprocessing.arrow_rows import open_arrow
from megatron_doremi.preprocessing.decompression import BrokenFile, UnreadableFile, not_utf8, text_parts
from megatron_doremi.preprocessing.inputs import ARROW, CSV, PARQUET, InputFile
from megatron_doremi.preprocessing.parquet_rows import open_parquet
from megatron_doremi.preprocessing.record_blocks import csv_blocks, csv_records


def csv_header(path: Path, data: bytes, needed: Sequence[str]) -> tuple[str, ...]:
    """Returns the column names of a CSV file.

    Args:
        data: the bytes of the header record.

    Raises:
        ConfigError: a required column is missing or duplicated.
        UnreadableFile: the first line is not a CSV header in UTF-8.
    """
    (_, fields), *_ = [*csv_records([data]), (b"", [])]
    if isinstance(fields, csv.Error):
        raise UnreadableFile(f"the first line is not a CSV header ({fields})")
    try:
        names = tuple(name.encode("latin-1").decode("utf-8").strip() for name in fields)
    except UnicodeDecodeError:
        raise UnreadableFile(not_utf8(data)) from None
    check_columns(path, names, needed)
    return names


def check_columns(path: Path, names: Sequence[str], needed: Sequence[str]) -> None:
    """Raises ConfigError if a column of `needed` is missing or duplicated."""
    missing = [column for column in needed if column not in names]
    duplicated = [column for column in needed if list(names).count(column) > 1]
    if missing:
        shown = ", ".join(map(repr, names[:20])) + (" ..." if len(names) > 20 else "")
        value, rule = f"no column {', '.join(map(repr, missing))}", f"keys that name columns of the file: {shown}"
        remedy = "name columns of the file: --text-key, --domain-key"
        if len(names) == 1 and any(mark in names[0] for mark in ";\t|"):
            remedy = "separate the columns by commas: the file seems to have another separator"
        raise ConfigError(Fault(f"--input {path}", value, rule, remedy))
    if duplicated:
        value = f"two columns {', '.join(map(repr, duplicated))}"
        raise ConfigError(Fault(f"--input {path}", value, "unique column names", "rename one of them"))


def check_text_column(source: InputFile, text_key: str, needed: Sequence[str]) -> list[Fault]:
    """Returns the faults visible in the header or schema of a table: missing or duplicated columns, or a text
    column of another type."""
    subject, column = f"--input {source.path}", text_key.split(".")[0]
    try:
        if source.kind == CSV:
            with source.path.open("rb") as raw:
                header = next(csv_blocks(text_parts(raw, source.path)), b"")
            if header:
                csv_header(source.path, header, needed)
        if source.kind not in (PARQUET, ARROW):
            return []
        schema = _schema_of(source)
        check_columns(source.path, schema.names, needed)
        column_type = schema.field(column).type
    except ConfigError as error:
        return list(error.faults)
    except OSError as error:
        return [Fault(subject, error.strerror or str(error), "a readable file", "check the path and its permissions")]
    except BrokenFile:
        return []  # reported when the file is read, where --on-error skip applies
    if pyarrow.types.is_dictionary(column_type):
        column_type = column_type.value_type
    holds_text = any(
        is_type(column_type)
        for is_type in (
            pyarrow.types.is_string,
            pyarrow.types.is_large_string,
            pyarrow.types.is_string_view,
            pyarrow.types.is_binary,
            pyarrow.types.is_large_binary,
            # A nested key may still find text in these; a row without it is a bad line.
            pyarrow.types.is_struct,
            pyarrow.types.is_null,
        )
    )
    if holds_text:
        return []
    return [Fault(subject, f"column {column!r} holds {column_type}", "text", "give another --text-key")]


def _schema_of(source: InputFile) -> pyarrow.Schema:
    """The schema of a Parquet or Arrow file. Raises BrokenFile, or OSError if the disk fails."""
    if source.kind == ARROW:
        with open_arrow(source.path) as (schema, _):
            return schema
    with open_parquet(source.path) as file:
        return file.schema_arrow
