"""Windows and slices: what a rank reads of a global batch.

Run alone: python -m pytest tests/data/test_loader.py
"""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_doremi.data.blend import Blend, BlendState, GlobalBatch, too_short, window_count
from megatron_doremi.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter, dtype_for
from megatron_doremi.data.loader import StepReader, rank_slice, read_windows, steps
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
