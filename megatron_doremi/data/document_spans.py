"""Which documents a range of a token stream belongs to, found by bisection of a memory-mapped index."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class DocumentSpans:
    """The documents of a range of tokens, in stream order, each with its part of the range.

    Attributes:
        documents: [r] int64 indices of the documents that have tokens in the range, rising.
        bounds: [r + 1] int64, the range's tokens bounds[i] to bounds[i + 1] belong to documents[i].
        starts: [r] int64, the first token of each document, which may lie before the range.
        lengths: [r] int64 tokens of each document, also of those outside the range; positive.
    """

    documents: NDArray[np.int64]
    bounds: NDArray[np.int64]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]


def document_spans(
    pointers: NDArray[np.int64],
    document_indices: NDArray[np.int64],
    itemsize: int,
    num_tokens: int,
    start: int,
    stop: int,
) -> DocumentSpans:
    """The documents of tokens [start, stop) of a stream.

    Reads O(log n) entries of the index, and those of the documents in the range. Empty documents have no span.

    Args:
        pointers: [n] byte offset of each sequence.
        document_indices: [m] index of each document's first sequence; the last is n.
        itemsize: bytes of a token.
        num_tokens: tokens of the stream; 0 <= start <= stop <= num_tokens.

    Raises:
        ValueError: the index contradicts itself there; the message says which documents.
    """
    if start == stop:
        none = np.empty(0, dtype=np.int64)
        return DocumentSpans(none, np.array([start], dtype=np.int64), none, none)

    # Not np.searchsorted, which copies an unaligned array, as those of an .idx are, before it searches.
    def document_of(token: int) -> int:
        return bisect_right(document_indices, bisect_right(pointers, token * itemsize) - 1) - 1

    first, last = document_of(start), document_of(stop - 1)
    subject = f"documents {first:,} to {last:,} for tokens {start:,} to {stop:,}"
    if not 0 <= first <= last < len(document_indices) - 1:
        raise ValueError(subject)
    # [last - first + 2] the first sequence of each document, and the end of the last document.
    sequences = np.array(document_indices[first : last + 2], dtype=np.int64)
    if sequences.min() < 0 or sequences[:-1].max() >= len(pointers) or sequences[-1] > len(pointers):
        raise ValueError(f"{subject}, from sequence {sequences.min():,} to {sequences.max():,}")
    end = num_tokens if sequences[-1] == len(pointers) else int(pointers[sequences[-1]]) // itemsize
    edges = np.append(np.asarray(pointers[sequences[:-1]]) // itemsize, end)
    lengths = np.diff(edges)
    if lengths.min() < 0 or not 0 <= edges[0] <= start < stop <= edges[-1] <= num_tokens:
        raise ValueError(f"{subject}, from token {edges[0]:,} to {edges[-1]:,}")
    kept = np.flatnonzero(lengths)
    starts = edges[kept]
    return DocumentSpans(first + kept, np.append(np.maximum(starts, start), stop), starts, lengths[kept])
