"""A hash of a data set's content, from sampled blocks: it distinguishes data sets of the same size."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from megatron_doremi.data.token_stream import TokenStream

# Blocks read from a .bin file, evenly spaced from the first to the last; smaller files are read in full.
_BLOCKS = 32
_BLOCK_BYTES = 1 << 14


def sample_hash(dataset: TokenStream) -> str:
    """SHA-256, in hex, of the token ids' dtype, their count, and sampled blocks of them.

    Reads at most 512 KiB of any file. Changes between the sampled blocks are not detected; `tools/inspect_data.py
    verify` reads every id.
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


def content_hash(names: Sequence[str], datasets: Sequence[TokenStream | None]) -> str:
    """SHA-256, in hex, of the domains' names and sampled content, in order. None stands for a domain without data."""
    samples = [None if dataset is None else sample_hash(dataset) for dataset in datasets]
    return hashlib.sha256(json.dumps([list(names), samples]).encode()).hexdigest()
