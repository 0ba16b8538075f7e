"""Counts duplicate documents of a data set by a hash of their tokens: within and between domains, and held-out
documents that are also in the training data.

Memory is bounded for any number of documents: beyond a limit only documents whose hash falls into a fixed part of all
hashes are counted. All copies of a document have one hash, so they are counted together or not at all, and the
fractions stay unbiased.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_doremi.data.indexed_dataset import IndexedDataset

# Documents whose hashes are kept; with their sorting, about 50 bytes each.
MAX_HASHES = 1 << 23
# Ids that are read at once, in bytes, unless a document is longer.
_BYTES_AT_ONCE = 1 << 24
_DOCUMENTS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class Duplicates:
    """Duplicate documents by domain.

    Attributes:
        part: the fraction of all hashes that was counted.
        counted: [k] training documents that were counted, and of these:
        within: [k] copies of an earlier document of the same domain.
        across: [k] documents that another domain's training data holds as well.
        held_out: [k] held-out documents that were counted, and of these:
        leaked: [k] documents that the training data of any domain holds as well.
    """

    part: float
    counted: NDArray[np.int64]
    within: NDArray[np.int64]
    across: NDArray[np.int64]
    held_out: NDArray[np.int64]
    leaked: NDArray[np.int64]


class DuplicateCounter:
    """Collects the hashes of all documents, then counts.

    Every document is hashed with the domain and split it belongs to; documents without tokens are left out.
    """

    def __init__(self, domains: int, documents: int, max_hashes: int = MAX_HASHES):
        """
        Args:
            domains: k, number of domains.
            documents: of all domains and splits, to choose the part of them that is counted.
        """
        self._domains, self._shift = domains, 0
        while documents >> self._shift > max_hashes:
            self._shift += 1
        self._hashes: list[NDArray[np.uint64]] = []
        self._owners: list[NDArray[np.int32]] = []

    def add(self, domain: int, held_out: bool, dataset: IndexedDataset, eod: int | None) -> Iterator[int]:
        """Hashes the documents of a pair; yields the number of bytes read at each step.

        Args:
            eod: id of the end-of-document token, which is not part of the text; None if unknown.

        Raises:
            ConfigError: the pair is damaged.
        """
        dataset.check_index()
        end = b"" if eod is None else np.array([eod], dataset.dtype).tobytes()
        for hashes, size in _hashes(dataset, end):
            kept = hashes[hashes >> np.uint64(64 - self._shift) == 0] if self._shift else hashes
            self._hashes.append(kept)
            self._owners.append(np.full(len(kept), 2 * domain + held_out, dtype=np.int32))
            yield size

    def count(self) -> Duplicates:
        """The counts over everything that was added."""
        k = self._domains
        hashes = np.concatenate([np.empty(0, np.uint64), *self._hashes])
        owners = np.concatenate([np.empty(0, np.int32), *self._owners])
        self._hashes, self._owners = [], []
        _, group = np.unique(hashes, return_inverse=True)
        in_train, domain = owners % 2 == 0, owners // 2
        train_group, train_domain = group[in_train], domain[in_train]
        # Each (text, domain) once; a text of several domains has several.
        pairs = np.unique(train_group.astype(np.int64) * k + train_domain)
        domains_of_text = np.bincount(pairs // k, minlength=int(group.max(initial=-1)) + 1)
        counted = np.bincount(train_domain, minlength=k)
        held_group, held_domain = group[~in_train], domain[~in_train]
        return Duplicates(
            part=0.5**self._shift,
            counted=counted,
            within=counted - np.bincount(pairs % k, minlength=k),
            across=np.bincount(train_domain[domains_of_text[train_group] > 1], minlength=k),
            held_out=np.bincount(held_domain, minlength=k),
            leaked=np.bincount(held_domain[domains_of_text[held_group] > 0], minlength=k),
        )


def _hashes(dataset: IndexedDataset, end: bytes) -> Iterator[tuple[NDArray[np.uint64], int]]:
    """Yields 64-bit hashes of documents, and the bytes read for them."""
    first = 0
    while first < dataset.num_documents:
        bounds = dataset.document_indices[first : first + _DOCUMENTS_AT_ONCE + 1]
        starts = _offsets(dataset, bounds)
        count = max(1, int(np.searchsorted(starts, starts[0] + _BYTES_AT_ONCE, side="right")) - 1)
        count = min(count, len(starts) - 1)
        begin, size = int(starts[0]), int(starts[count] - starts[0])
        data = memoryview(b"".join(dataset.read_bytes(begin, size)))
        texts = [data[a - begin : b - begin] for a, b in _ranges(starts[: count + 1])]
        digests = [_digest(text, end) for text in texts if len(text)]
        yield np.frombuffer(b"".join(digests), dtype="<u8"), size
        first += count


def _offsets(dataset: IndexedDataset, bounds: NDArray[np.int64]) -> NDArray[np.int64]:
    """[n] byte of the pair at which each of n sequences starts; the end of the pair for the number of sequences."""
    end = dataset.num_tokens * dataset.dtype.itemsize
    inner = np.minimum(bounds, max(0, dataset.num_sequences - 1))
    starts = dataset.pointers[inner] if dataset.num_sequences else np.zeros(len(bounds), np.int64)
    return np.where(bounds == dataset.num_sequences, end, starts)


def _ranges(starts: Sequence[int] | NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    offsets = [int(start) for start in starts]
    yield from itertools.pairwise(offsets)


def _digest(text: memoryview, end: bytes) -> bytes:
    if end and text[-len(end) :] == end:
        text = text[: -len(end)]
    return hashlib.blake2b(text, digest_size=8).digest()
