"""A hash of what a data set holds, from sampled blocks: tells data from other data of the same sizes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from megatron_doremi.data.indexed_dataset import IndexedDataset

# Of a .bin file so many blocks are read, spread evenly from the first to the last; small files whole.
_BLOCKS = 32
_BLOCK_BYTES = 1 << 14


def sample_hash(dataset: IndexedDataset) -> str:
    """SHA-256, in hex, of the ids' type, their number, and sampled blocks of them.

    Costs half a megabyte read, whatever the size. A change between the blocks goes unnoticed; `tools/inspect_data.py
    verify` reads all.
    """
    size = dataset.num_tokens * dataset.dtype.itemsize
    digest = hashlib.sha256(f"{dataset.dtype.str} {dataset.num_tokens} ".encode())
    starts: Sequence[int] = range(0, size, _BLOCK_BYTES)
    if len(starts) > _BLOCKS:
        starts = [(size - _BLOCK_BYTES) * block // (_BLOCKS - 1) for block in range(_BLOCKS)]
    for start in starts:
        for part in dataset.read_bytes(start, min(_BLOCK_BYTES, size - start)):
            digest.update(part)
    return digest.hexdigest()


def content_hash(names: Sequence[str], datasets: Sequence[IndexedDataset | None]) -> str:
    """Hash of domains' names and sampled content, in their order; a domain may lack data."""
    samples = [None if dataset is None else sample_hash(dataset) for dataset in datasets]
    return hashlib.sha256(json.dumps([list(names), samples]).encode()).hexdigest()
