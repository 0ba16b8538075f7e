"""Files of recorded losses: the grid, rows by slice, formats old and new, and everything that is refused.

Run alone: python -m pytest tests/data/test_reference_losses.py
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading

import numpy as np
import pytest
from data.loss_folders import FINGERPRINT, OF, SEQ, write_old
from safetensors.numpy import load_file, save, save_file

from megatron_doremi.data import reference_loss_file, reference_losses
from megatron_doremi.data.reference_loss_file import (
    CHUNK_WINDOWS,
    LARGEST_LOSS,
    LossFile,
    add_windows,
    all_chunks,
    chunk_path,
    chunks_of,
    clipped,
    from_codes,
    to_codes,
    unpack,
)
from megatron_doremi.data.reference_losses import ReferenceLosses, ReferenceLossFolder
from megatron_doremi.errors import ConfigError


def row_of(domain, window):
    """Losses of a window on the grid, different for each."""
    return from_codes((np.arange(SEQ) * 97 + domain * 1009 + window * 13).astype(np.uint16))


def rows_of(domain, windows):
    return np.stack([row_of(domain, int(window)) for window in windows])


def write(folder, windows=((5, 9), (4099,))):
    """A folder with windows 5 and 9 of the first domain, 4099 of the second."""
    target = ReferenceLossFolder(folder, {**FINGERPRINT, **OF})
    for domain, numbers in enumerate(windows):
        for window in numbers:
            target.add(domain, window // CHUNK_WINDOWS, np.array([window]), row_of(domain, window)[None])
    return target


def opened(folder, **expected):
    return ReferenceLosses(folder, FINGERPRINT["domains"], {**FINGERPRINT, **expected})


def refused(folder, *words, domain=0, window=5):
    """Reads a row; everything that is wrong with it is said in one ConfigError that holds these words."""
    with pytest.raises(ConfigError) as caught:
        opened(folder).losses(np.array([domain]), np.array([window]))
    for word in words:
        assert word in str(caught.value)


def edit(path, **changes):
    """Writes a file of losses with some of its tensors changed."""
    save_file({**load_file(path), **changes}, path)


def test_the_grid_is_finer_than_float16_where_losses_lie():
    """Largest errors: the grid's is half a step; float16's is 4, 8 and 16 times that from 2, 4 and 8 nats on."""
    assert np.array_equal(to_codes(from_codes(np.arange(65536, dtype=np.uint16))), np.arange(65536))
    assert from_codes(np.array([65535], np.uint16))[0] == np.float32(LARGEST_LOSS) == 65535 / 2048
    for low, times in ((2, 4), (4, 8), (8, 16)):
        losses = np.linspace(low, 2 * low, 100_001).astype(np.float32)
        ours = np.abs(from_codes(to_codes(losses)).astype(float) - losses).max()
        theirs = np.abs(losses.astype(np.float16).astype(float) - losses).max()
        assert ours <= 2**-12
        assert theirs / ours == pytest.approx(times, rel=0.05)
    assert to_codes(np.array([-1e-6, 0.0, 31.99, 32.0, 40.0])).tolist() == [0, 0, 65516, 65535, 65535]
    assert clipped(np.array([31.0, LARGEST_LOSS, 32.0, 40.0])) == 2


def test_rows_come_back_whatever_was_added_when(tmp_path):
    """In the order that is asked for, more files than may be open, over the bounds of chunks."""
    windows = np.array([0, 1, 4095, 4096, 4097, 3 * 4096 + 17, 9 * 4096])
    target = ReferenceLossFolder(tmp_path, {**FINGERPRINT, **OF})
    for part in (windows[[2, 5]], windows[[0, 3, 6]], windows[[1, 4]]):
        for window in part:
            target.add(1, int(window) // CHUNK_WINDOWS, np.array([window]), row_of(1, window)[None])
    on_disk = opened(tmp_path)
    order = np.random.default_rng(0).permutation(len(windows))
    read = on_disk.losses(np.full(len(windows), 1), windows[order])
    assert np.array_equal(read.numpy(), rows_of(1, windows[order]))
    with LossFile.open(tmp_path, 1, 0, SEQ) as file:
        assert file.windows().tolist() == [0, 1, 4095]


def test_windows_that_are_recorded_stay_as_they_are(tmp_path):
    """A job that overlaps scores them once more, and rounds otherwise."""
    write(tmp_path, ((5, 9), ()))
    windows = np.array([4, 5, 9])
    add_windows(tmp_path, 0, 0, windows, np.stack([row_of(0, 4), row_of(0, 0), row_of(0, 0)]))
    path = chunk_path(tmp_path, 0, 0)
    before = path.stat().st_mtime_ns
    add_windows(tmp_path, 0, 0, windows, rows_of(1, windows))
    assert path.stat().st_mtime_ns == before
    assert np.array_equal(opened(tmp_path).losses(np.zeros(3, int), windows).numpy(), rows_of(0, windows))
    assert [path.name for path in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("locks", [True, False])
def test_of_writers_that_meet_none_loses_a_row(locks, tmp_path, monkeypatch):
    """A second writer comes after the first has read the file and before it writes."""
    write(tmp_path, ((5, 9), ()))
    others = []

    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    def meet(tensors, metadata):
        if not others:
            others.append(threading.Thread(target=add_windows, args=(tmp_path, 0, 0, np.array([7]), rows_of(0, [7]))))
            others[0].start()
            others[0].join(0.3 if locks else None)
            assert others[0].is_alive() == locks
        return save(tensors, metadata=metadata)

    monkeypatch.setattr(reference_loss_file, "save", meet)
    if not locks:
        monkeypatch.setattr(fcntl, "flock", unsupported)
    add_windows(tmp_path, 0, 0, np.array([6]), rows_of(0, [6]))
    others[0].join()
    windows = np.array([5, 6, 7, 9])
    assert np.array_equal(opened(tmp_path).losses(np.zeros(4, int), windows).numpy(), rows_of(0, windows))


def test_few_files_are_open(tmp_path, monkeypatch):
    monkeypatch.setattr(reference_losses, "_OPEN_FILES", 3)
    before = len(os.listdir("/proc/self/fd"))
    write(tmp_path, [[chunk * CHUNK_WINDOWS for chunk in range(8)], ()])
    on_disk = opened(tmp_path)
    for _ in range(2):
        for chunk in range(8):
            losses = on_disk.losses(np.array([0]), np.array([chunk * CHUNK_WINDOWS]))[0]
            assert np.array_equal(losses.numpy(), row_of(0, chunk * CHUNK_WINDOWS))
    assert len(os.listdir("/proc/self/fd")) - before <= 3


def test_a_row_is_read_and_not_its_chunk(tmp_path):
    """Version 0.1 read 8.4 MB for the 2 KB of a row; here header, bits, checksum and row are read."""
    seq = 1024
    add_windows(tmp_path, 0, 0, np.arange(CHUNK_WINDOWS), np.zeros((CHUNK_WINDOWS, seq)))
    size = chunk_path(tmp_path, 0, 0).stat().st_size
    assert size > 8e6

    def bytes_read():
        return int(dict(line.split(": ") for line in open("/proc/self/io").read().splitlines())["rchar"])

    before = bytes_read()
    with LossFile.open(tmp_path, 0, 0, seq) as file:
        assert file.losses(4095).tolist() == [0.0] * seq
    assert bytes_read() - before < 10_000


def test_windows_are_split_into_chunks_as_by_hand():
    """Against version 0.1's way, a comparison of all windows with each chunk."""
    generator = np.random.default_rng(4)
    for size in (1, 4095, 4096, 4097, 20_000):
        windows = generator.permutation(size)[: max(1, size // 3)]
        expected = {c: np.sort(windows[windows // CHUNK_WINDOWS == c]) for c in np.unique(windows // CHUNK_WINDOWS)}
        by_chunk = {
            c: c * CHUNK_WINDOWS + np.flatnonzero(unpack(b)) for c, b in chunks_of(np.array_split(windows, 3), size)
        }
        assert list(by_chunk) == list(expected)
        assert all(np.array_equal(by_chunk[chunk], expected[chunk]) for chunk in expected)
        every = [c * CHUNK_WINDOWS + np.flatnonzero(unpack(bits)) for c, bits in all_chunks(size)]
        assert np.array_equal(np.concatenate(every), np.arange(size))


def test_what_is_missing_is_said_of_every_domain_at_once(tmp_path):
    write(tmp_path)
    needed = [chunks_of([np.array([9, 5, 7, 5000])], 6000), chunks_of([np.array([4099, 1, 2])], 5000)]
    looked = []
    faults = opened(tmp_path).check(needed, lambda domain, files: looked.append((domain, files)))
    assert looked == [(0, 2), (1, 2)]
    assert [fault.value for fault in faults] == [
        "2 windows of domain 'code' are missing, the first is window 7",
        "2 windows of domain 'books' are missing, the first is window 1",
    ]
    assert opened(tmp_path).check([chunks_of([np.array([5])], 6000), chunks_of([np.array([4099])], 5000)]) == []
    refused(tmp_path, "window 6 of domain 'code' is missing", window=6)
    refused(tmp_path, "window 8,000 of domain 'code' is missing", window=8000)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"losses": np.zeros((2, 1), np.uint16)}, "losses of type U16 and shape [2, 1]"),
        ({"losses": np.zeros((2, SEQ - 1), np.uint16)}, "shape [2, 4]"),
        ({"losses": np.zeros((2, SEQ + 1), np.uint16)}, "shape [2, 6]"),
        ({"losses": np.zeros((3, SEQ), np.uint16)}, "checksums of type U32, [2]"),
        ({"losses": np.full((2, SEQ), np.inf, np.float16)}, "losses of type F16"),
        ({"losses": np.full((2, SEQ), -3.0, np.float32)}, "losses of type F32"),
        ({"losses": np.zeros((2, SEQ), np.uint16)}, "the checksum"),
        ({"recorded": np.zeros(64, np.uint64)}, "0 windows and 2 rows"),
        # Bits of windows 5 and 10: the row of window 9 under another number.
        ({"recorded": np.array([1 << 5 | 1 << 10] + [0] * 63, np.uint64)}, "the checksum"),
        ({"recorded": np.zeros(32, np.uint64)}, "recorded of type U64, [32]"),
        ({"more": np.zeros(3, np.uint8)}, "bytes of data"),
    ],
)
def test_files_that_are_refused(change, words, tmp_path):
    write(tmp_path)
    edit(path := chunk_path(tmp_path, 0, 0), **change)
    refused(tmp_path, words, str(path), window=10 if "recorded" in change else 5)


def test_a_file_of_another_chunk_or_domain_is_refused(tmp_path):
    """Copied where it does not belong, with all its checks in order but for the rows' own."""
    write(tmp_path, [(5, 9), (4096 + 5,)])
    here = chunk_path(tmp_path, 0, 0).read_bytes()
    for domain, chunk, window in ((0, 1, 4096 + 5), (1, 0, 5)):
        path = chunk_path(tmp_path, domain, chunk)
        path.write_bytes(here)
        refused(tmp_path, "the checksum", str(path), domain=domain, window=window)


@pytest.mark.parametrize("size", [0, 3, 8, 200, 600, -1])
def test_a_file_that_is_cut_off_is_refused(size, tmp_path):
    write(tmp_path)
    path = chunk_path(tmp_path, 0, 0)
    path.write_bytes(path.read_bytes()[:size])
    refused(tmp_path, str(path), "delete it and run --phase score again")
    assert len(opened(tmp_path).check([chunks_of([np.array([5])], 50)])) == 1


def test_a_folder_in_place_of_a_file(tmp_path):
    write(tmp_path)
    path = chunk_path(tmp_path, 0, 0)
    path.unlink()
    path.mkdir()
    refused(tmp_path, str(path), "directory")


def test_folders_of_version_0_1_are_read(tmp_path):
    losses = np.array([[0.0, 0.25, 4.0, 11.5, 40.0], [1, 2, 3, 4, 5], [6, 7, 8, 9, 10]], np.float16)
    write_old(tmp_path, [3, 70, 4095], losses)
    on_disk = opened(tmp_path)
    read = on_disk.losses(np.array([0, 0, 0]), np.array([4095, 3, 70]))
    assert read.tolist() == losses[[2, 0, 1]].tolist()
    assert on_disk.check([chunks_of([np.array([3, 4095])], 5000)]) == []
    assert on_disk.check([chunks_of([np.array([3, 4])], 5000)])[0].value == "window 4 of domain 'code' is missing"
    # Nothing is added to it.
    with pytest.raises(ConfigError, match="which is read only"):
        ReferenceLossFolder(tmp_path, {**FINGERPRINT, **OF})


@pytest.mark.parametrize(
    ("windows", "losses", "words"),
    [
        ([5, 9], np.full((2, SEQ), np.inf, np.float16), "window 5 with a loss of inf"),
        ([5, 9], np.full((2, SEQ), -3.0, np.float16), "window 5 with a loss of -3.0"),
        ([5, 9], np.full((2, SEQ), np.nan, np.float16), "window 5 with a loss of nan"),
        ([5, 9], np.ones((2, 1), np.float16), "shape [2, 1]"),
        ([5, 9], np.ones((2, SEQ - 1), np.float16), "shape [2, 4]"),
        ([5, 9], np.ones((2, SEQ), np.float32), "type F32"),
        ([5, 9], np.ones((2, SEQ), np.uint16), "type U16"),
        ([5, 9], np.ones((1, SEQ), np.float16), "windows of type I64, [2]"),
        ([9, 5], np.ones((2, SEQ), np.float16), "windows out of order"),
        ([5, 5], np.ones((2, SEQ), np.float16), "windows out of order"),
        ([-1, 5], np.ones((2, SEQ), np.float16), "windows out of order or of another chunk"),
        ([5, 4096], np.ones((2, SEQ), np.float16), "windows out of order or of another chunk"),
    ],
)
def test_old_files_that_are_refused(windows, losses, words, tmp_path):
    path = write_old(tmp_path, windows, losses)
    refused(tmp_path, words, str(path))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seq_length": 32}, "seq_length 32"),
        ({"tokenizer_sha256": "f" * 64}, "tokenizer_sha256 ffff"),
        ({"data_fingerprint": "e" * 64}, "data_fingerprint eeee"),
        ({"data_content": "e" * 64}, "data_content eeee"),
        ({"domains": ["books", "code"]}, "domains ['books', 'code']"),
        ({"precision": "bfloat16"}, "precision bfloat16"),
        ({"precision": None}, "precision is missing"),
        ({"precision": "int8"}, "precision: 'int8'"),
        ({"seq_length": 0}, "seq_length: 0"),
        ({"seq_length": 16.0}, "seq_length: 16.0"),
        ({"reference": "0"}, "reference: '0'"),
        ({"reference_iteration": -1}, "reference_iteration: -1"),
        ({"format": "other"}, "format 'other'"),
        ({"format": "megatron-doremi-scores/3"}, "written by a newer version"),
        ({"format": None}, "format None"),
        ({"domains": []}, "domains: []"),
    ],
)
def test_a_scores_json_of_something_else_is_refused(change, words, tmp_path):
    write(tmp_path)
    path = tmp_path / "scores.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    refused(tmp_path, words, str(tmp_path))


def test_every_difference_is_said_at_once(tmp_path):
    write(tmp_path)
    with pytest.raises(ConfigError) as caught:
        opened(tmp_path, seq_length=9, precision="bfloat16", data_content="9" * 64)
    assert len(caught.value.faults) == 3


def test_a_folder_belongs_to_the_first_that_recorded_in_it(tmp_path):
    """A start that recorded nothing leaves it free; who loses it is told before it writes."""
    first = ReferenceLossFolder(tmp_path, {**FINGERPRINT, **OF})
    second = ReferenceLossFolder(tmp_path, {**FINGERPRINT, **OF, "reference": "4" * 64})
    with pytest.raises(ConfigError, match=r"scores\.json has changed"):
        first.add(0, 0, np.array([5]), row_of(0, 5)[None])
    second.add(0, 0, np.array([5]), row_of(0, 5)[None])
    with pytest.raises(ConfigError, match="score this data with this reference into a separate folder"):
        ReferenceLossFolder(tmp_path, {**FINGERPRINT, **OF})
    assert json.loads((tmp_path / "scores.json").read_text())["reference"] == "4" * 64
    assert sorted(path.name for path in tmp_path.iterdir()) == ["losses", "scores.json"]


def test_clipped_losses_are_counted_in_the_file(tmp_path):
    target = ReferenceLossFolder(tmp_path, {**FINGERPRINT, **OF})
    losses = np.array([[1.0, 2.0, 33.0, 40.0, 31.0]])
    target.add(0, 0, np.array([1]), losses)
    target.add(0, 0, np.array([2]), losses)
    with LossFile.open(tmp_path, 0, 0, SEQ) as file:
        assert file.clipped == 4
        assert file.losses(2).tolist() == [1.0, 2.0, LARGEST_LOSS, LARGEST_LOSS, 31.0]
