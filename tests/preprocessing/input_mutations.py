"""Mutates input files and compares what we read with a reference reader that uses only the libraries."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import zlib

import pyarrow
import pyarrow.parquet
import zstandard
from data.file_mutations import mutated_bytes
from input_files import lines, read, records, table

from megatron_doremi.errors import ConfigError

ROWS = records(25)
TEXTS = [(row["text"], row["domain"]) for row in ROWS]


def _parquet():
    out = io.BytesIO()
    rows = pyarrow.Table.from_pylist(ROWS)
    pyarrow.parquet.write_table(rows, out, row_group_size=10, data_page_size=300, write_page_checksum=True)
    return out.getvalue()


FILES = {
    "jsonl": lines(ROWS, ascii_only=False),
    "json": json.dumps(ROWS, ensure_ascii=False, indent=1).encode(),
    "csv": table(ROWS),
    "jsonl.zst": zstandard.ZstdCompressor(write_checksum=True).compress(lines(ROWS)),
    "jsonl.gz": gzip.compress(lines(ROWS)[:900], mtime=0) + gzip.compress(lines(ROWS)[900:], mtime=0),
    "parquet": _parquet(),
}


class Unreadable(Exception):
    """The reference reader rejects the file."""


def _lines(data):
    documents = []
    for line in data.split(b"\n"):
        if line.strip():
            record = json.loads(line.decode("utf-8"))
            documents.append((record["text"], record["domain"]))
    return documents


def _reference(name, data):
    """Reads the documents of a file with the libraries alone, all at once."""
    if name == "json":
        return [(record["text"], record["domain"]) for record in json.loads(data.decode("utf-8"))]
    if name == "csv":
        # newline="": line breaks within quotes stay as they are.
        rows = list(csv.reader(io.StringIO(data.decode("utf-8"), newline=""), strict=True))
        header, rows = rows[0], [row for row in rows[1:] if row]
        if any(len(row) != len(header) for row in rows):
            raise Unreadable
        return [(record["text"], record["domain"]) for record in (dict(zip(header, row, strict=True)) for row in rows)]
    if name == "jsonl.zst" and data:
        frame = zstandard.ZstdDecompressor().decompressobj(read_across_frames=True)
        content = frame.decompress(data)
        if not data.startswith(b"\x28\xb5\x2f\xfd") or frame.unconsumed_tail:
            raise Unreadable
        return _lines(content)
    if name == "jsonl.gz":
        return _lines(gzip.decompress(data))
    if name == "parquet":
        rows = pyarrow.parquet.read_table(io.BytesIO(data), columns=["text", "domain"]).to_pylist()
        # Binary columns hold UTF-8.
        return [[x.decode() if isinstance(x, bytes) else x for x in (row["text"], row["domain"])] for row in rows]
    return _lines(data)


def reference(name, data):
    """Returns the documents, or None if the reference reader rejects the file or a record is not a document."""
    try:
        pairs = _reference(name, data)
    except (Unreadable, ValueError, KeyError, TypeError, IndexError, RecursionError, OSError, EOFError, csv.Error):
        return None
    except (zlib.error, zstandard.ZstdError, pyarrow.ArrowException):
        return None
    good = [
        (text, domain.strip())
        for text, domain in pairs
        if isinstance(text, str) and isinstance(domain, str) and domain.strip()
    ]
    return good if len(good) == len(pairs) else None


def one(name, path, data):
    """Reads one mutated file. Returns "same", "other", "lenient" or "refused"; fails if the reference disagrees."""
    path.write_bytes(data)
    expected = reference(name, data)
    try:
        documents, bad = read(path, "--domain-key", "domain")
    except ConfigError:
        documents, bad = [], ["refused"]
    if bad:
        # We may skip documents that the reference reads, but not invent any.
        assert expected is None or "refused" in bad or len(documents) <= len(expected), (bad, expected)
        return "refused"
    if expected is not None:
        assert documents == expected
    else:
        assert name in ("jsonl", "json", "csv"), f"{len(documents)} documents of a file that {name} does not read"
        return "lenient"
    return "same" if documents == TEXTS else "other"


def fuzz(folder, name, cases, seed=0):
    """Reads `cases` mutations of a file; returns the number of each outcome of `one`."""
    dice = random.Random(f"{name} {seed}")
    answers = {}
    for case in range(cases):
        data = mutated_bytes(FILES[name], dice)
        try:
            answer = one(name, folder / f"d.{name}", data)
        except BaseException as error:
            error.add_note(f"{name}, seed {seed}, case {case}: {data!r:.2000}")
            raise
        answers[answer] = answers.get(answer, 0) + 1
    return answers
