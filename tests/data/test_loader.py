"""Windows and slices: what a rank reads of a global batch.

Run alone: python -m pytest tests/data/test_loader.py
"""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_doremi.data.blend import Blend, BlendState, GlobalBatch, too_short, window_count
from megatron_doremi.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter, dtype_for
from megatron_doremi.data.loader import DeviceCopies, MicroBatch, StepReader, rank_slice, read_windows, steps
from megatron_doremi.errors import ConfigError
from megatron_doremi.parallel.topology import Topology


@pytest.fixture
def datasets(tmp_path):
    result = []
    for number, size in enumerate((41, 30)):
        with IndexedDatasetWriter(tmp_path / str(number), dtype_for(5000)) as writer:
            writer.add_document(np.arange(1000 * number, 1000 * number + size))
        result.append(IndexedDataset(tmp_path / str(number)))
    return result


def test_windows_share_one_token_and_drop_none_but_the_tail(datasets):
    assert window_count(41, 10) == 4
    assert window_count(40, 10) == 3
    assert [window_count(n, 10) for n in (0, 1, 10, 11)] == [0, 0, 0, 1]
    batch = read_windows(datasets, GlobalBatch(np.array([0, 0, 1]), np.array([0, 3, 1])), 10)
    assert batch.tokens.tolist() == [list(range(10)), list(range(30, 40)), list(range(1010, 1020))]
    assert batch.targets.tolist() == [list(range(1, 11)), list(range(31, 41)), list(range(1011, 1021))]
    assert batch.domains.tolist() == [0, 0, 1]


def test_padding_reads_nothing(datasets):
    batch = read_windows([None, datasets[1]], GlobalBatch(np.array([-1, 1]), np.array([0, 0])), 10)
    assert batch.tokens[0].tolist() == [0] * 10
    assert batch.domains.tolist() == [-1, 1]


@pytest.mark.parametrize(("micro", "data_size"), [(1, 1), (2, 1), (1, 3), (2, 3), (4, 3), (12, 1)])
def test_slices_are_disjoint_and_together_the_batch(micro, data_size):
    batch = GlobalBatch(np.arange(12), np.arange(12) * 7)
    ranks = [rank_slice(batch, micro, rank, data_size) for rank in range(data_size)]
    # Micro-batch after micro-batch over the ranks gives the global batch in its order.
    order = [part for parts in zip(*ranks, strict=True) for part in parts]
    assert np.concatenate([part.domains for part in order]).tolist() == list(range(12))
    assert np.concatenate([part.windows for part in order]).tolist() == (np.arange(12) * 7).tolist()
    assert all(len(part.domains) == micro for part in order)


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=6),
    st.integers(1, 4),
    st.sampled_from([1, 2, 3, 4]),
    st.sampled_from([1, 2, 3]),
    st.integers(0, 2**31),
    st.data(),
)
@settings(max_examples=60, deadline=None)
def test_any_layout_reads_the_same_batches_and_resumes_at_any_step(counts, micro, ranks, accumulation, seed, data):
    """Weights change at every step; windows are named, not read, so that sizes can be any."""
    size = micro * ranks * accumulation
    blend = Blend(tuple(f"domain {n}" for n in range(len(counts))), tuple(counts), size, seed)
    names = st.lists(st.floats(0.01, 1.0), min_size=len(counts), max_size=len(counts))
    mixes = [np.array(mix) / sum(mix) for mix in data.draw(st.lists(names, min_size=1, max_size=6))]
    state, states, batches = BlendState.start(len(counts)), [], []
    for mix in mixes:
        states.append(state)
        batch, state = blend.next_batch(state, mix)
        batches.append(list(zip(batch.domains.tolist(), batch.windows.tolist(), strict=True)))
        # Every rank computes the batch by itself, in micro-batches of any size that fits.
        parts = [rank_slice(batch, micro, rank, ranks) for rank in range(ranks)]
        assert all(len(part) == accumulation for part in parts)
        read = [
            window
            for turn in zip(*parts, strict=True)
            for part in turn
            for window in zip(part.domains.tolist(), part.windows.tolist(), strict=True)
        ]
        assert read == batches[-1]
        one = rank_slice(batch, size, 0, 1)
        assert [len(part.domains) for part in one] == [size]
        assert one[0].domains.tolist() == batch.domains.tolist()
    # Each window once an epoch, however the weights moved.
    for domain, count in enumerate(counts):
        taken = [window for batch in batches for where, window in batch if where == domain]
        times = np.bincount(taken, minlength=count) if taken else np.zeros(count)
        assert times.max() - times.min() <= 1
    at = data.draw(st.integers(0, len(mixes) - 1))
    state = BlendState.from_dict(json.loads(json.dumps(states[at].to_dict(blend.names))), blend.names)
    for mix, expected in zip(mixes[at:], batches[at:], strict=True):
        batch, state = blend.next_batch(state, mix)
        assert list(zip(batch.domains.tolist(), batch.windows.tolist(), strict=True)) == expected


def test_steps_read_ahead_without_moving_the_state(datasets):
    blend = Blend(("a", "b"), (4, 2), 6, 1)
    weights = np.array([0.5, 0.5])
    state = BlendState.start(2)
    stream = steps(StepReader(blend, datasets, (2, 10), Topology()), state, lambda step: weights)
    for step in itertools.islice(stream, 5):
        expected, state = blend.next_batch(state, weights)
        assert step.state_after.cursors.tolist() == state.cursors.tolist()
        domains = np.concatenate([batch.domains.numpy() for batch in step.micro_batches])
        assert domains.tolist() == expected.domains.tolist()
        starts = np.concatenate([batch.tokens[:, 0].numpy() for batch in step.micro_batches])
        assert starts.tolist() == (expected.windows * 10 + expected.domains * 1000).tolist()


class Streams:
    """In the place of torch.cuda: notes what is done, and on which stream of which thread."""

    def __init__(self):
        self.notes, self.inside = [], []

    def Stream(self, device):
        return SimpleNamespace(record_event=lambda: self.note("event") or len(self.notes))

    def note(self, what):
        self.notes.append((what, threading.current_thread().name.split("_")[0], bool(self.inside)))

    @contextlib.contextmanager
    def stream(self, stream):
        self.inside.append(stream)
        yield
        self.inside.pop()

    def current_stream(self, device):
        return SimpleNamespace(wait_event=lambda event: self.note(f"wait {event}"))


def test_copies_of_the_next_step_are_issued_while_it_is_read(datasets, monkeypatch):
    """On a stream of their own by the thread that reads; the stream of the computation waits, and keeps the memory."""
    blend, weights, streams = Blend(("a", "b"), (4, 2), 4, 1), np.array([0.5, 0.5]), Streams()
    reader = StepReader(blend, datasets, (2, 10), Topology(), drops=True, eod=4000)
    expected = list(itertools.islice(steps(reader, BlendState.start(2), lambda step: weights, total=3), 3))
    kept = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: kept.append(tensor), raising=False)
    move = MicroBatch.to
    monkeypatch.setattr(MicroBatch, "to", lambda batch, device: streams.note("copy") or move(batch, device))
    copies = DeviceCopies(torch.device("cpu"), streams)
    found = []
    for step in steps(reader, BlendState.start(2), lambda step: weights, total=3, copies=copies):
        found.append(step)
        assert len(kept) == 2 * 5 * len(found)
        assert all(any(each is tensor for each in kept) for batch in step.micro_batches for tensor in batch.copied())
    read = [note for note in streams.notes if note[1] == "loader"]
    # Two micro-batches a step, then its event.
    assert [note[0] for note in read] == ["copy", "copy", "event"] * 3
    assert all(inside for _, _, inside in read)
    waits = [note for note in streams.notes if note[0].startswith("wait")]
    assert len(waits) == 3
    assert all(thread == "MainThread" for _, thread, _ in waits)
    for step, other in zip(found, expected, strict=True):
        assert step.state_after.to_dict(blend.names) == other.state_after.to_dict(blend.names)
        for batch, same in zip(step.micro_batches, other.micro_batches, strict=True):
            pairs = zip([*batch.copied(), batch.windows], [*same.copied(), same.windows], strict=True)
            assert all(torch.equal(*pair) for pair in pairs)


def test_nothing_is_copied_ahead_where_nothing_is_read_ahead(datasets):
    """The weights of the next step are not known yet; the engine copies."""
    reader = StepReader(Blend(("a", "b"), (4, 2), 4, 1), datasets, (2, 10), Topology())
    streams = Streams()
    copies = DeviceCopies(torch.device("cpu"), streams)
    weights = np.array([0.5, 0.5])
    assert len(list(steps(reader, BlendState.start(2), lambda step: weights, False, 2, copies))) == 2
    assert streams.notes == []


def test_middle_stages_read_nothing(datasets):
    blend = Blend(("a", "b"), (4, 2), 6, 1)
    reader = StepReader(blend, datasets, (2, 10), Topology(pipe_size=3, rank=1))
    stream = steps(reader, BlendState.start(2), lambda step: np.array([0.5, 0.5]))
    step = next(iter(stream))
    assert step.micro_batches == ()
    assert step.state_after.step == 1


def test_a_short_domain_is_said(tmp_path):
    assert too_short("a", tmp_path, 11, 10) is None
    assert "10 tokens" in too_short("a", tmp_path, 10, 10).value
    assert "empty" in too_short("a", tmp_path, 0, 10).value


@pytest.mark.parametrize("wrong", [50, 2**31 - 1, -1])
def test_an_id_outside_the_vocabulary_is_named_when_it_is_read(wrong, tmp_path):
    with IndexedDatasetWriter(tmp_path / "d", dtype_for(10**6)) as writer:
        writer.add_document([*range(30), wrong, 49])
    part = GlobalBatch(np.array([0]), np.array([2]))
    assert read_windows([IndexedDataset(tmp_path / "d")], part, 10).targets[0, -1].item() == wrong
    with pytest.raises(ConfigError, match=rf"id {wrong} at token 30"):
        read_windows([IndexedDataset(tmp_path / "d", vocab_size=50)], part, 10)
