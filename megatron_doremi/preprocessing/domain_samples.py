"""Equal samples of domains whose number and sizes are known at the end alone, in bounded memory."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

# A document counts as at least this many bytes, so that the memory of many small ones is bounded too.
_LEAST = 32
# Samples are cut down when they hold so many times the bytes that will be left of them.
_SLACK = 3
_ORDER_BYTES = 8
_LAST_ORDER = (1 << 8 * _ORDER_BYTES) - 1


class Sample:
    """A sample of one domain's documents: those of the lowest order, up to a number of bytes.

    A lower limit later gives the same sample as if it had been known from the start.
    """

    def __init__(self) -> None:
        self.size = 0
        # The document of the highest order first. One object a document: its order, from the top down, and its text.
        self._heap: list[bytes] = []

    def offer(self, order: int, text: bytes, limit: int) -> None:
        """Takes a document while there is room for it; what a limit cuts off a text is not kept."""
        entry = (_LAST_ORDER - order).to_bytes(_ORDER_BYTES, "big") + text[:limit]
        if self.size >= limit and entry < self._heap[0]:
            return
        heapq.heappush(self._heap, entry)
        self.size += _cost(entry)
        self.shrink(limit)

    def shrink(self, limit: int) -> None:
        """Leaves out documents of the highest order while the others reach the limit."""
        while self._heap and self.size - _cost(self._heap[0]) >= limit:
            self.size -= _cost(heapq.heappop(self._heap))

    def documents(self, limit: int) -> Iterator[bytes]:
        """The texts in their order, the last one cut at the limit."""
        self.shrink(limit)
        left = limit
        for entry in sorted(self._heap, reverse=True):
            text = entry[_ORDER_BYTES : _ORDER_BYTES + left]
            left -= len(text)
            yield text


def _cost(entry: bytes) -> int:
    return max(len(entry) - _ORDER_BYTES, _LEAST)


class DomainSamples:
    """Samples of all domains, each the same part of a number of bytes.

    Memory stays below some times that number, whatever the number of domains and the lengths of documents.
    """

    def __init__(self, total_bytes: int):
        self._total_bytes = total_bytes
        self._samples: dict[str, Sample] = {}
        self._held = 0

    @property
    def limit(self) -> int:
        """Bytes of each domain, by the number of domains so far."""
        return max(1, self._total_bytes // max(1, len(self._samples)))

    @property
    def names(self) -> list[str]:
        """The domains, sorted."""
        return sorted(self._samples)

    @property
    def held_bytes(self) -> int:
        """What all samples hold at the moment."""
        return self._held

    def offer(self, domain: str, order: int, text: bytes) -> None:
        """Takes a document, if it belongs to its domain's sample.

        Args:
            order: from 0 to 2^64 - 1; the lowest of a domain are kept.
        """
        if domain not in self._samples:
            self._samples[domain] = Sample()
        if not text:
            return
        sample = self._samples[domain]
        before = sample.size
        sample.offer(order, text, self.limit)
        self._held += sample.size - before
        if self._held > _SLACK * max(self._total_bytes, _LEAST * len(self._samples)):
            for each in self._samples.values():
                each.shrink(self.limit)
            self._held = sum(each.size for each in self._samples.values())

    def documents(self) -> Iterator[bytes]:
        """All samples, by name."""
        for name in self.names:
            yield from self._samples[name].documents(self.limit)
