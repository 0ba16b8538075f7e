"""The columns of CSV and Parquet files: that those which are read are there, and hold what they should."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import pyarrow.types

from megatron_doremi.errors import ConfigError, Fault
from megatron_doremi.preprocessing.decompression import BrokenFile, UnreadableFile, not_utf8, text_parts
from megatron_doremi.preprocessing.inputs import CSV, PARQUET, InputFile
from megatron_doremi.preprocessing.parquet_rows import open_parquet
from megatron_doremi.preprocessing.record_blocks import csv_blocks, csv_records


def csv_header(path: Path, data: bytes, needed: Sequence[str]) -> tuple[str, ...]:
    """The names of a CSV file's columns. Raises ConfigError or UnreadableFile."""
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
    """Raises ConfigError where a column is missing, or there twice."""
    missing = [column for column in needed if column not in names]
    twice = [column for column in needed if list(names).count(column) > 1]
    if missing:
        shown = ", ".join(map(repr, names[:20])) + (" ..." if len(names) > 20 else "")
        rule = f"the columns of the keys, among {shown}"
        raise ConfigError(
            Fault(f"--input {path}", f"no column {', '.join(map(repr, missing))}", rule, "give other keys")
        )
    if twice:
        value = f"two columns {', '.join(map(repr, twice))}"
        raise ConfigError(Fault(f"--input {path}", value, "one of each name", "rename one of them"))


def check_text_column(source: InputFile, text_key: str, needed: Sequence[str]) -> list[Fault]:
    """Faults of a CSV or Parquet file that its header or schema shows: missing columns, text that is another type."""
    what, column = f"--input {source.path}", text_key.split(".")[0]
    try:
        if source.kind == CSV:
            with source.path.open("rb") as raw:
                header = next(csv_blocks(text_parts(raw, source.path)), b"")
            if header:
                csv_header(source.path, header, needed)
        if source.kind != PARQUET:
            return []
        with open_parquet(source.path) as opened:
            check_columns(source.path, opened.schema_arrow.names, needed)
            kind = opened.schema_arrow.field(column).type
    except ConfigError as error:
        return list(error.faults)
    except OSError as error:
        return [Fault(what, error.strerror or str(error), "a readable file", "check path and permissions")]
    except BrokenFile:
        return []  # said when the file is read, which --on-error skip may pass over
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    holds_text = any(
        check(kind)
        for check in (
            pyarrow.types.is_string,
            pyarrow.types.is_large_string,
            pyarrow.types.is_string_view,
            pyarrow.types.is_binary,
            pyarrow.types.is_large_binary,
            # Within these a nested key may find text, or each row says that it does not.
            pyarrow.types.is_struct,
            pyarrow.types.is_null,
        )
    )
    if holds_text:
        return []
    return [Fault(what, f"column {column!r} holds {kind}", "text", "give another --text-key")]
