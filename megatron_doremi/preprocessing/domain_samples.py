"""Samples of equal size from every domain, in one pass and bounded memory.

The number of domains and their sizes are known only at the end of the pass.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

# The smallest size that a document counts as, so that many tiny documents also use bounded memory.
_MIN_DOCUMENT_BYTES = 32
# All samples shrink to their current limit when together they exceed this multiple of the requested bytes.
_SLACK = 3
_ORDER_BYTES = 8
_MAX_ORDER = (1 << 8 * _ORDER_BYTES) - 1


class Sample:
    """The documents of one domain with the lowest order, up to a limit in bytes.

    Lowering the limit later gives the same sample as using the lower limit from the start.

    Attributes:
        size: bytes held, counting each document as at least `_MIN_DOCUMENT_BYTES`.
    """

    def __init__(self) -> None:
        self.size = 0
        # A min-heap of reversed order + text, so that the document of highest order is at index 0. One bytes object per
        # document takes less memory than a tuple.
        self._heap: list[bytes] = []

    def offer(self, order: int, text: bytes, limit: int) -> None:
        """Adds a document if it belongs to the sample; bytes of the text beyond the limit are dropped."""
        item = (_MAX_ORDER - order).to_bytes(_ORDER_BYTES, "big") + text[:limit]
        if self.size >= limit and item < self._heap[0]:
            return
        heapq.heappush(self._heap, item)
        self.size += _item_size(item)
        self.shrink(limit)

    def shrink(self, limit: int) -> None:
        """Drops documents of the highest order as long as the others still fill the limit."""
        while self._heap and self.size - _item_size(self._heap[0]) >= limit:
            self.size -= _item_size(heapq.heappop(self._heap))

    def documents(self, limit: int) -> Iterator[bytes]:
        """Yields the texts by ascending order; the last one is truncated at the limit."""
        self.shrink(limit)
        left = limit
        for item in sorted(self._heap, reverse=True):
            text = item[_ORDER_BYTES : _ORDER_BYTES + left]
            left -= len(text)
            yield text


def _item_size(item: bytes) -> int:
    return max(len(item) - _ORDER_BYTES, _MIN_DOCUMENT_BYTES)


class DomainSamples:
    """One sample per domain, all of the same size, with a fixed number of bytes in total.

    Memory is bounded by a small multiple of that number, regardless of the number of domains and the lengths of
    documents.
    """

    def __init__(self, total_bytes: int):
        self._total_bytes = total_bytes
        self._samples: dict[str, Sample] = {}
        self._held_bytes = 0

    @property
    def limit(self) -> int:
        """Bytes per domain, given the number of domains so far."""
        return max(1, self._total_bytes // max(1, len(self._samples)))

    @property
    def names(self) -> list[str]:
        """The domains, sorted."""
        return sorted(self._samples)

    def offer(self, domain: str, order: int, text: bytes) -> None:
        """Adds a document if it belongs to the sample of its domain.

        Args:
            order: from 0 to 2^64 - 1; the documents of lowest order are kept.
        """
        if domain not in self._samples:
            self._samples[domain] = Sample()
        if not text:
            return
        sample = self._samples[domain]
        before = sample.size
        sample.offer(order, text, self.limit)
        self._held_bytes += sample.size - before
        if self._held_bytes > _SLACK * max(self._total_bytes, _MIN_DOCUMENT_BYTES * len(self._samples)):
            for sample in self._samples.values():
                sample.shrink(self.limit)
            self._held_bytes = sum(sample.size for sample in self._samples.values())

    def documents(self) -> Iterator[bytes]:
        """Yields the documents of all samples, domains sorted by name."""
        for name in self.names:
            yield from self._samples[name].documents(self.limit)
