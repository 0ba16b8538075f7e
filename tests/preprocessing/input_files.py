"""Builders of small input files in every supported format, and readers that use the tools' options."""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json

import pyarrow
import pyarrow.parquet
import zstandard

from megatron_doremi.preprocessing.documents import Document, describe
from megatron_doremi.preprocessing.input_options import add_input_options, read_input_options
from megatron_doremi.preprocessing.sources import read_blocks

SENTENCE = 'The "quick" brown fox, \u00fcber the lazy dog;\nand a river \\ runs [to] the {sea}. '


def records(count=40, text="Document #. " + SENTENCE):
    """Records of two domains, with the text and the domain at the top level."""
    return [{"text": text.replace("#", str(i)), "domain": ("Web", "Code")[i % 2]} for i in range(count)]


def pile(rows):
    """The same records with the domain in meta.pile_set_name, as in The Pile."""
    return [{"text": row["text"], "meta": {"pile_set_name": row["domain"]}} for row in rows]


def lines(rows, ascii_only=True):
    return "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows).encode()


def table(rows):
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def parquet(path, rows, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


def long_window(data):
    """Compresses data to one zstd frame that requires a window of 1 GiB."""
    parameters = zstandard.ZstdCompressionParameters(window_log=30, write_content_size=False, enable_ldm=True)
    out = io.BytesIO()
    with zstandard.ZstdCompressor(compression_params=parameters).stream_writer(out, closefd=False) as writer:
        writer.write(data)
    return out.getvalue()


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def options(*words):
    """Resolves input options given as command-line arguments."""
    parser = argparse.ArgumentParser()
    add_input_options(parser)
    return read_input_options(parser.parse_args(["--input", *map(str, words)]))


def read(*words):
    """Reads all inputs. Returns ([(text, domain) of each document], [description of each bad line])."""
    inputs = options(*words)
    documents, bad = [], []
    for file in inputs.files:
        for block in read_blocks(file, inputs.reader.columns, inputs.reader.needed_of):
            for number, document in inputs.reader.documents(block):
                if isinstance(document, Document):
                    documents.append((document.text, document.domain))
                else:
                    bad.append(describe(block, number, document))
    return documents, bad


def compressed(data, name):
    """Compresses data as the suffix of the name indicates."""
    if name.endswith(".gz"):
        return gzip.compress(data, mtime=0)
    return zstandard.compress(data) if name.endswith((".zst", ".zstd")) else data
