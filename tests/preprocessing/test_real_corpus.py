"""The tools on a real corpus, if one is available: tokenization loses nothing.

MEGATRON_DOREMI_CORPUS names a folder with valid.jsonl.zst in The Pile's format. Without it these tests are skipped.

Run alone: python -m pytest tests/preprocessing/test_real_corpus.py
"""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import zstandard

from megatron_doremi.data.indexed_dataset import IndexedDataset
from megatron_doremi.data.manifest import load_manifest
from megatron_doremi.tokenization.tokenizer import SentencePieceTokenizer

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = 1000


def corpus_file():
    """Returns the valid file of the corpus, a few megabytes, or None if there is no corpus."""
    folder = os.environ.get("MEGATRON_DOREMI_CORPUS")
    file = Path(folder or "") / "valid.jsonl.zst"
    return file if folder and file.is_file() else None


pytestmark = pytest.mark.skipif(
    corpus_file() is None, reason="no corpus: set MEGATRON_DOREMI_CORPUS to a folder with valid.jsonl.zst"
)


def run(tool, *words):
    command = [sys.executable, str(ROOT / "tools" / tool), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def texts():
    """The texts of each domain in the order of the file, read without the code under test."""
    by_domain = defaultdict(list)
    with corpus_file().open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as plain:
        for line in io.TextIOWrapper(plain, encoding="utf-8", newline="\n"):
            record = json.loads(line)
            by_domain[record["meta"]["pile_set_name"]].append(record["text"])
    return by_domain


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The manifest and the tokenizer that the tools make from the file."""
    folder = tmp_path_factory.mktemp("real")
    model = folder / "tokenizer.model"
    sizes = ["--vocab-size", VOCABULARY, "--sample-bytes", 500_000]
    run("train_tokenizer.py", "--input", corpus_file(), "--output", model, *sizes)
    words = ["--tokenizer-model", model, "--append-eod", "--workers", 2, "--split", "train"]
    run("preprocess_data.py", "--input", corpus_file(), "--output-dir", folder / "data", *words)
    return load_manifest(folder / "data" / "domains.json"), SentencePieceTokenizer(model)


def test_domains_documents_and_bytes_are_those_of_the_file(made, texts):
    manifest, _ = made
    assert list(manifest.names) == sorted(texts)
    for domain in manifest.domains:
        assert domain.documents == len(texts[domain.name])
        assert domain.bytes == sum(len(text.encode()) for text in texts[domain.name])


def test_pairs_hold_the_tokens_of_the_manifest(made, texts):
    manifest, tokenizer = made
    for domain in manifest.domains:
        data = IndexedDataset(domain.train)
        assert data.num_tokens == domain.tokens > 0
        assert data.num_documents == domain.documents
        stream = data.tokens(0, data.num_tokens)
        assert stream.min() >= 0
        assert stream.max() < tokenizer.vocab_size == VOCABULARY
        # The end-of-document id is at the end of each document and nowhere else.
        ends = np.cumsum(data.sequence_lengths, dtype=np.int64) - 1
        assert np.array_equal(np.flatnonzero(stream == tokenizer.eod), ends)


def test_ids_are_the_tokenizers_own_and_decode_to_the_text(made, texts):
    manifest, tokenizer = made
    generator = random.Random(1)
    for domain in manifest.domains:
        data = IndexedDataset(domain.train)
        count = data.num_documents
        for number in {0, count - 1, *generator.sample(range(count), min(6, count))}:
            ids, text = data.document(number), texts[domain.name][number]
            assert ids.tolist() == [*tokenizer.encode(text).tolist(), tokenizer.eod]
            # SentencePiece cannot tell this one character from a space.
            assert tokenizer.decode(ids[:-1]) == text.replace("\u2581", " ")


def test_unknown_piece_never_occurs(made):
    manifest, _ = made
    for domain in manifest.domains:
        data = IndexedDataset(domain.train)
        assert not (data.tokens(0, data.num_tokens) == 0).any()


def test_text_is_compressed(made):
    """A vocabulary of 1,000 pieces reaches at least 1.8 bytes per token; less would mean that nothing was learned."""
    manifest, _ = made
    assert sum(d.bytes for d in manifest.domains) / sum(d.tokens for d in manifest.domains) > 1.8
