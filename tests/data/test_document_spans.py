"""Which documents a range of tokens belongs to, against a list of every token's document.

Run alone: python -m pytest tests/data/test_document_spans.py
"""

from __future__ import annotations

from itertools import groupby

import numpy as np
import pytest

from megatron_doremi.data.document_spans import document_spans
from megatron_doremi.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter, dtype_for
from megatron_doremi.errors import ConfigError

# Sequence lengths by document: none, empty and several sequences, at the ends and in between.
DOCUMENTS = [[], [0], [3], [2, 4], [], [0, 0], [1, 0, 2], [5], [0, 1], [], [0]]


@pytest.mark.parametrize("vocab_size", [100, 100_000])
def test_every_range_against_a_list_of_the_tokens(tmp_path, vocab_size):
    with IndexedDatasetWriter(tmp_path / "set", dtype_for(vocab_size)) as writer:
        for document in DOCUMENTS:
            writer.add_document(*(np.zeros(length, dtype=np.int64) for length in document))
    dataset = IndexedDataset(tmp_path / "set")
    sizes = [sum(document) for document in DOCUMENTS]
    of_token = [number for number, size in enumerate(sizes) for _ in range(size)]
    assert len(of_token) == dataset.num_tokens == 18
    for start in range(19):
        for stop in range(start, 19):
            spans = dataset.documents_at(start, stop)
            expected = [(number, len(list(group))) for number, group in groupby(of_token[start:stop])]
            assert spans.documents.tolist() == [number for number, _ in expected]
            assert spans.bounds[[0, -1]].tolist() == [start, stop]
            assert np.diff(spans.bounds).tolist() == [count for _, count in expected]
            assert spans.starts.tolist() == [of_token.index(number) for number, _ in expected]
            assert spans.lengths.tolist() == [sizes[number] for number, _ in expected]


class Counted:
    """An array that counts how many of its entries are read."""

    def __init__(self, values):
        self.values, self.reads = values, 0

    def __len__(self):
        return len(self.values)

    def __getitem__(self, key):
        entries = self.values[key]
        self.reads += np.size(entries)
        return entries


def test_a_long_index_is_not_read_through():
    n = 1 << 16
    pointers, indices = Counted(np.arange(n) * 2), Counted(np.arange(n + 1))
    spans = document_spans(pointers, indices, 2, n, n // 2, n // 2 + 3)
    assert spans.documents.tolist() == [n // 2, n // 2 + 1, n // 2 + 2]
    assert pointers.reads + indices.reads <= 4 * 17 + 8


@pytest.mark.parametrize(
    ("pointers", "indices"),
    [
        ([0, 600, 8], [0, 1, 2, 3]),  # a sequence far outside the stream
        ([4, 6, 8], [0, 1, 2, 3]),  # the first tokens belong to no sequence
        ([0, 6, 2], [0, 1, 2, 3]),
        ([0, 6, 8], [0, 7, 2, 3]),
        ([0, 6, 8], [0, -7, 2, 3]),
        ([0, 6, 8], [0, 3, 1, 3]),
        ([0, 6, 8], [1, 1, 2, 3]),
    ],
)
def test_a_damaged_index_gives_the_true_documents_or_an_error(tmp_path, pointers, indices):
    """A long index is not checked on opening. No range gives spans that do not tile it."""
    failed = 0
    for start in range(6):
        for stop in range(start + 1, 7):
            try:
                spans = document_spans(np.array(pointers), np.array(indices), 2, 6, start, stop)
            except ValueError:
                failed += 1
                continue
            assert spans.bounds[[0, -1]].tolist() == [start, stop]
            assert (np.diff(spans.bounds) > 0).all()
            assert (spans.lengths >= np.diff(spans.bounds)).all()
    assert failed


def test_a_damaged_index_is_an_error_that_names_the_file(tmp_path):
    with IndexedDatasetWriter(tmp_path / "set", dtype_for(100)) as writer:
        writer.add_document([1, 2, 3])
        writer.add_document([4])
    dataset = IndexedDataset(tmp_path / "set")
    dataset.document_indices = np.array([0, 5, 2])
    with pytest.raises(ConfigError, match=r"set\.idx"):
        dataset.documents_at(0, 4)
