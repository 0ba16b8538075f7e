"""Data of the same sizes and other ids are told apart by a hash of sampled blocks.

Run alone: python -m pytest tests/data/test_content_hash.py
"""

from __future__ import annotations

import numpy as np

from megatron_doremi.data.content_hash import sample_hash
from megatron_doremi.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter


def test_the_sample_hash_tells_data_of_the_same_size_apart(tmp_path):
    """Small files are hashed completely; of large ones the first, the last and blocks between them."""

    def sample(name, ids):
        with IndexedDatasetWriter(tmp_path / name, np.dtype("<u2")) as writer:
            writer.add_document(ids)
        return sample_hash(IndexedDataset(tmp_path / name))

    small = np.arange(3000) % 500
    changed = small.copy()
    changed[1777] += 1
    assert sample("a", small) == sample("b", small)
    assert sample("a", small) != sample("c", changed)
    large = np.resize(np.arange(60000), 2_000_000)
    first = sample("d", large)
    for place in (0, len(large) - 1):
        other = large.copy()
        other[place] += 1
        assert sample("e", other) != first
    shuffled = np.random.default_rng(0).permutation(large)
    assert sample("f", shuffled) != first
