"""Which windows an evaluation reads, and sums of their losses by document, against a walk over all tokens.

Run alone: python -m pytest tests/phases/test_held_out.py
"""

from __future__ import annotations

import numpy as np
import pytest

from megatron_doremi.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from megatron_doremi.data.loader import rank_slice
from megatron_doremi.phases import bootstrap
from megatron_doremi.phases.held_out import (
    DocumentSums,
    HeldOut,
    document_parts,
    evaluation_windows,
    pad_to,
    windows_before,
)

LENGTH = 4
# Tokens of each document: empty ones, some shorter than a window, one of several windows, and a tail that is not read.
DOCUMENTS = [[1, 0, 2, 1, 9, 0, 3, 23, 1, 1, 4], [30], [0, 2, 0, 5, 6, 1, 1, 1, 1, 1, 1, 1, 1, 1]]


def test_windows_are_spread_evenly():
    batch = evaluation_windows([10, 0, 3], 4)
    assert batch.domains.tolist() == [0, 0, 0, 0, 2, 2, 2]
    assert batch.windows.tolist() == [0, 2, 5, 7, 0, 1, 2]
    assert len(evaluation_windows([10, 0, 3], 0).windows) == 13


@pytest.fixture
def texts(tmp_path):
    """The datasets, one domain without a stream, and the bytes of their documents, unknown in one domain."""
    datasets, text_bytes = [], []
    for number, sizes in enumerate(DOCUMENTS):
        with IndexedDatasetWriter(tmp_path / str(number), np.dtype("<u2")) as writer:
            for size in sizes:
                writer.add_document([7] * size)
        datasets.append(IndexedDataset(tmp_path / str(number)))
        text_bytes.append(None if number == 1 else np.arange(10, 10 + len(sizes), dtype=np.uint32))
    return [datasets[0], None, *datasets[1:]], [text_bytes[0], None, *text_bytes[1:]]


def by_walk(datasets, text_bytes, batch, losses):
    """{(domain, document): [loss, targets, bytes]}, token by token."""
    sums = {}
    for domain, window in zip(batch.domains.tolist(), batch.windows.tolist(), strict=True):
        sizes = DOCUMENTS[domain - (domain > 1)]
        owner = [number for number, size in enumerate(sizes) for _ in range(size)]
        for place in range(LENGTH):
            document = owner[window * LENGTH + 1 + place]
            size = np.nan if text_bytes[domain] is None else text_bytes[domain][document] / sizes[document]
            entry = sums.setdefault((domain, document), np.zeros(3))
            entry += [losses[domain, window, place], 1, size]
    return sums


@pytest.mark.parametrize("max_windows", [0, 1, 2, 3, 5])
@pytest.mark.parametrize(("micro_batch", "data_size"), [(1, 1), (1, 3), (4, 2), (64, 1)])
def test_sums_by_document_against_a_walk_over_the_tokens(texts, max_windows, micro_batch, data_size):
    datasets, text_bytes = texts
    text = HeldOut("abcd", datasets, text_bytes, np.full(4, 0.25), LENGTH, max_windows)
    losses = np.random.default_rng(1).random((4, 12, LENGTH))
    read = text.windows()
    batch = pad_to(read, micro_batch * data_size)
    total = np.zeros_like(DocumentSums(text).sums)
    for rank in range(data_size):
        sums = DocumentSums(text)
        slices = (rank_slice(each, micro_batch, rank, data_size) for each in (batch, windows_before(batch)))
        for part, before in zip(*slices, strict=True):
            # The losses of padding are not finite, and must not matter.
            rows = np.where(part.domains[:, None] < 0, np.nan, losses[part.domains, part.windows])
            sums.add(document_parts(text, part, before), rows)
        total += sums.sums
    expected = by_walk(datasets, text_bytes, read, losses)
    assert {(int(d), int(n)) for d, n in np.argwhere(total[1])} == expected.keys()
    for (domain, document), values in expected.items():
        assert total[:, domain, document] == pytest.approx([*values, 1], rel=1e-12, nan_ok=True)


def test_all_windows_together_have_the_bytes_of_their_documents(texts):
    """But for those of the first token, which is no target, and of the tail, which fills no window."""
    datasets, text_bytes = texts
    text = HeldOut("abcd", datasets, text_bytes, np.full(4, 0.25), LENGTH, 0)
    read, sums = text.windows(), DocumentSums(text)
    sums.add(document_parts(text, read, windows_before(read)), np.ones((len(read.windows), LENGTH)))
    # 45 tokens are targets 1 to 44: all documents but the first token, which is all of document 0, of 10 bytes.
    assert sums.sums[1, 0].sum() == 44
    assert sums.sums[2, 0].sum() == pytest.approx(sum(10 + n for n, size in enumerate(DOCUMENTS[0]) if size) - 10)


def test_many_documents_share_groups(texts, monkeypatch):
    monkeypatch.setattr(bootstrap, "MAX_GROUPS", 4)
    monkeypatch.setattr("megatron_doremi.phases.held_out.MAX_GROUPS", 4)
    datasets, text_bytes = texts
    text = HeldOut("abcd", datasets, text_bytes, np.full(4, 0.25), LENGTH, 0)
    read, sums = text.windows(), DocumentSums(text)
    losses = np.random.default_rng(1).random((4, 12, LENGTH))
    sums.add(document_parts(text, read, windows_before(read)), losses[read.domains, read.windows])
    assert sums.sums.shape == (4, 4, 4)
    expected = by_walk(datasets, text_bytes, read, losses)
    for domain in (0, 2, 3):
        values = np.array([value for (owner, _), value in expected.items() if owner == domain])
        assert sums.sums[:3, domain].sum(axis=1) == pytest.approx(values.sum(axis=0), nan_ok=True)
        assert sums.sums[3, domain].sum() == len(values)
        assert (sums.sums[1, domain] > 0).sum() > 1 or domain == 2
