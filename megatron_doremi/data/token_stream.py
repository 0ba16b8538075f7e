"""What a run reads of a domain: a pair on disk, or the part of it that --split gives to training or to evaluation."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_doremi.data.document_spans import DocumentSpans
from megatron_doremi.data.indexed_dataset import IndexedDataset


class TokenStream(Protocol):
    """A stream of tokens in documents; see `IndexedDataset` for what its methods raise.

    Attributes:
        prefix: path of the pair without .bin or .idx.
        dtype: dtype of the stored ids.
        num_tokens, num_documents: of the stream.
        first_document: number, in the pair, of the stream's first document.
    """

    prefix: Path
    dtype: np.dtype
    num_tokens: int
    first_document: int

    @property
    def num_documents(self) -> int:
        """Documents of which the stream has tokens, or that are empty and lie between such."""
        ...

    def tokens(self, start: int, count: int) -> NDArray[np.int64]:
        """[count] tokens of the stream, starting at token `start`."""
        ...

    def read_bytes(self, start: int, count: int) -> Iterator[bytes]:
        """`count` bytes of the stream's ids, starting at byte `start`, in parts."""
        ...

    def documents_at(self, start: int, stop: int) -> DocumentSpans:
        """The documents of tokens [start, stop), numbered from the stream's first."""
        ...


def split_bounds(shares: Sequence[float], count: int) -> list[tuple[int, int]]:
    """The ranges of `count` sequences that --split gives to train, valid and test, in this order.

    The arithmetic is that of Megatron-LM (megatron/core/datasets: shares normalized in float64, running sums times the
    number of sequences, rounded half to even), so that both programs hold out the same documents.

    Args:
        shares: non-negative, at least one positive.
    """
    weights = np.array(shares, dtype=np.float64)
    edges = accumulate((weights / np.sum(weights)).tolist(), initial=0.0)
    return [(round(low * count), round(high * count)) for low, high in pairwise(edges)]


class DatasetPart:
    """The sequences [first, last) of a pair, as a stream of their own.

    Megatron-LM splits by sequence. With one sequence per document, as for GPTs, these are documents; otherwise the
    first and the last document may belong to two parts. `documents_at` gives their start and length in full, so that
    the first one may start before the stream.
    """

    def __init__(self, dataset: IndexedDataset, first: int, last: int):
        assert 0 <= first <= last <= dataset.num_sequences, (dataset.prefix, first, last)
        self.prefix, self.dtype, self._dataset = dataset.prefix, dataset.dtype, dataset
        self._start, stop = self._token(first), self._token(last)
        self.num_tokens = stop - self._start
        bounds = dataset.document_indices
        # Of several documents that start at one sequence, all but the last are empty.
        self.first_document = bisect_right(bounds, first) - 1 if first < last else 0
        self._stop_document = bisect_right(bounds, last - 1) if first < last else 0

    def _token(self, sequence: int) -> int:
        """The first token of a sequence; after the last sequence, the number of tokens."""
        dataset = self._dataset
        if sequence == dataset.num_sequences:
            return dataset.num_tokens
        return int(dataset.pointers[sequence]) // dataset.dtype.itemsize

    @property
    def num_documents(self) -> int:
        return self._stop_document - self.first_document

    def tokens(self, start: int, count: int) -> NDArray[np.int64]:
        """[count] tokens of the part, starting at its token `start`."""
        assert 0 <= start <= start + count <= self.num_tokens, (self.prefix, start, count, self.num_tokens)
        return self._dataset.tokens(self._start + start, count)

    def read_bytes(self, start: int, count: int) -> Iterator[bytes]:
        """`count` bytes of the part's ids, starting at its byte `start`, in parts."""
        return self._dataset.read_bytes(self._start * self.dtype.itemsize + start, count)

    def documents_at(self, start: int, stop: int) -> DocumentSpans:
        """The documents of the part's tokens [start, stop), numbered from the part's first."""
        spans = self._dataset.documents_at(self._start + start, self._start + stop)
        return replace(
            spans,
            documents=spans.documents - self.first_document,
            bounds=spans.bounds - self._start,
            starts=spans.starts - self._start,
        )
