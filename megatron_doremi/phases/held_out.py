"""The held-out text of an evaluation: which windows are read, and what their losses sum to by document."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from megatron_doremi.data.blend import GlobalBatch, window_count
from megatron_doremi.data.token_stream import TokenStream
from megatron_doremi.phases.bootstrap import MAX_GROUPS, group_of


@dataclass(frozen=True)
class HeldOut:
    """The held-out text of an evaluation.

    Attributes:
        names: of the k domains.
        datasets: [k] held-out stream of each domain, or None.
        text_bytes: [k] for each domain [documents] UTF-8 bytes of each held-out document, or None if unknown.
        shares: [k] natural shares of the domains, for the token mean; of train tokens.
        seq_length: targets of a window.
        max_windows: maximum number of windows per domain, spread evenly over its stream; 0: all.
    """

    names: Sequence[str]
    datasets: Sequence[TokenStream | None]
    text_bytes: Sequence[NDArray[np.uint32] | None]
    shares: NDArray[np.float64]
    seq_length: int
    max_windows: int

    def windows(self) -> GlobalBatch:
        """The windows to read, domain by domain."""
        counts = [0 if each is None else window_count(each.num_tokens, self.seq_length) for each in self.datasets]
        return evaluation_windows(counts, self.max_windows)


def evaluation_windows(counts: Sequence[int], max_windows: int) -> GlobalBatch:
    """The windows that an evaluation reads, domain by domain, at any batch size and layout.

    Args:
        counts: [k] windows in each domain's held-out stream.
        max_windows: maximum number of windows per domain, spread evenly over its stream; 0: all.
    """
    domains, windows = [], []
    for number, count in enumerate(counts):
        taken = min(count, max_windows) if max_windows else count
        windows.append(np.arange(taken, dtype=np.int64) * count // max(1, taken))
        domains.append(np.full(taken, number, dtype=np.int64))
    return GlobalBatch(np.concatenate(domains), np.concatenate(windows))


def pad_to(batch: GlobalBatch, multiple: int) -> GlobalBatch:
    """Pads a batch (with domain -1) to a multiple of `multiple` windows."""
    missing = -len(batch.domains) % multiple
    return GlobalBatch(
        np.concatenate([batch.domains, np.full(missing, -1, dtype=np.int64)]),
        np.concatenate([batch.windows, np.zeros(missing, dtype=np.int64)]),
    )


def windows_before(batch: GlobalBatch) -> GlobalBatch:
    """For each window of an evaluation the window of its domain that is read before it; -1 for a domain's first."""
    previous = np.full_like(batch.windows, -1)
    same = np.flatnonzero(batch.domains[1:] == batch.domains[:-1])
    previous[same + 1] = batch.windows[same]
    return GlobalBatch(batch.domains, previous)


@dataclass(frozen=True)
class DocumentParts:
    """The documents of consecutive windows of one domain.

    Attributes:
        rows: the windows' rows in their micro-batch.
        domain: index of the domain.
        offsets: [r] the first target of each document among the targets of these windows.
        groups: [r] group of each document.
        targets: [r] targets of each document in these windows.
        text_bytes: [r] bytes of these targets: those of the document times its targets here over its tokens; NaN if
            unknown. The end-of-document token counts as a token, so that all targets together have all the bytes.
        first: [r] whether the document has no target in an earlier window that is read.
    """

    rows: slice
    domain: int
    offsets: NDArray[np.int64]
    groups: NDArray[np.int64]
    targets: NDArray[np.int64]
    text_bytes: NDArray[np.float64]
    first: NDArray[np.bool_]


def document_parts(text: HeldOut, part: GlobalBatch, before: GlobalBatch) -> list[DocumentParts]:
    """The documents of a micro-batch; padding has none.

    Args:
        part: the windows of the micro-batch.
        before: `windows_before` of the same windows.

    Raises:
        ConfigError: the index of a pair contradicts itself.
    """
    parts, length = [], text.seq_length
    for rows in _consecutive(part):
        domain, window = int(part.domains[rows.start]), int(part.windows[rows.start])
        dataset, sizes = text.datasets[domain], text.text_bytes[domain]
        assert dataset is not None, "a window of a domain without data"
        # The target of position t is token t + 1.
        start = window * length + 1
        spans = dataset.documents_at(start, start + (rows.stop - rows.start) * length)
        targets = np.diff(spans.bounds)
        if sizes is None:
            text_bytes = np.full(len(targets), np.nan)
        else:
            text_bytes = targets / spans.lengths * sizes[spans.documents]
        first = np.ones(len(targets), dtype=np.bool_)
        last_window = int(before.windows[rows.start])
        # A document with a target in a window before this one reaches from there to here.
        first[0] = last_window < 0 or spans.starts[0] > (last_window + 1) * length
        groups = group_of(spans.documents, dataset.num_documents)
        parts.append(DocumentParts(rows, domain, spans.bounds[:-1] - start, groups, targets, text_bytes, first))
    return parts


def _consecutive(part: GlobalBatch) -> Iterator[slice]:
    """The ranges of rows that hold consecutive windows of one domain."""
    breaks = (np.diff(part.domains) != 0) | (np.diff(part.windows) != 1)
    edges = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(part.domains)]
    for start, stop in pairwise(edges):
        if part.domains[start] >= 0:
            yield slice(start, stop)


class DocumentSums:
    """Sums over the windows that were read, by group of documents.

    Attributes:
        sums: [4, k, g] float64: losses in nats, targets, bytes of text (NaN where unknown), documents.
    """

    def __init__(self, text: HeldOut):
        sizes = [0 if each is None else each.num_documents for each in text.datasets]
        self.sums = np.zeros((4, len(sizes), max(1, min(MAX_GROUPS, max(sizes, default=0)))))

    def add(self, parts: Sequence[DocumentParts], losses: NDArray[np.float64]) -> None:
        """Adds a micro-batch; `losses`: [batch, seq] in nats."""
        for part in parts:
            loss = np.add.reduceat(losses[part.rows].reshape(-1), part.offsets)
            for sums, values in zip(self.sums, (loss, part.targets, part.text_bytes, part.first), strict=True):
                np.add.at(sums[part.domain], part.groups, values)
