"""Indexed pairs: Megatron-LM's bytes, written and read, and what is said of damaged ones.

Run alone: python -m pytest tests/data/test_indexed_dataset.py
"""

from __future__ import annotations

import random
import struct

import numpy as np
import pytest

from megatron_doremi.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter, dtype_for
from megatron_doremi.errors import ConfigError

MAGIC = b"MMIDIDX\x00\x00"
UINT16, INT32 = 8, 4


def index_of(lengths, bounds, code=UINT16, size=2, version=1, pointers=None, magic=MAGIC):
    """The bytes of an .idx, put together here from Megatron-LM's layout and not with the code under test."""
    if pointers is None:
        pointers = [size * sum(lengths[:n]) for n in range(len(lengths))]
    return b"".join(
        [
            magic,
            struct.pack("<Q", version),
            struct.pack("<B", code),
            struct.pack("<Q", len(lengths)),
            struct.pack("<Q", len(bounds)),
            struct.pack(f"<{len(lengths)}i", *lengths),
            struct.pack(f"<{len(pointers)}q", *pointers),
            struct.pack(f"<{len(bounds)}q", *bounds),
        ]
    )


def put(folder, idx, data, name="set"):
    (folder / f"{name}.bin").write_bytes(data)
    (folder / f"{name}.idx").write_bytes(idx)
    return folder / name


def small_pair(folder):
    """Documents 10 11 12 | 13 | 14 15, one sequence each."""
    return put(folder, index_of([3, 1, 2], [0, 1, 2, 3]), struct.pack("<6H", *range(10, 16)))


def refused(prefix, file, word):
    """Opening the pair gives one ConfigError that names `file` and says `word`."""
    with pytest.raises(ConfigError) as caught:
        IndexedDataset(prefix)
    assert str(file) in str(caught.value)
    assert word in str(caught.value)
    assert "remedy" in str(caught.value)


def test_writer_writes_megatrons_bytes(tmp_path):
    with IndexedDatasetWriter(tmp_path / "ours", np.dtype("<u2")) as writer:
        writer.add_document([1, 2, 65535])
        writer.add_document(np.array([7], dtype=np.int32))
        writer.add_document([500, 600])
        assert writer.num_tokens == 6
    assert (tmp_path / "ours.bin").read_bytes() == struct.pack("<6H", 1, 2, 65535, 7, 500, 600)
    assert (tmp_path / "ours.idx").read_bytes() == (
        b"MMIDIDX\x00\x00"
        + struct.pack("<QB", 1, 8)
        + struct.pack("<QQ", 3, 4)
        + struct.pack("<3i", 3, 1, 2)
        + struct.pack("<3q", 0, 6, 8)
        + struct.pack("<4q", 0, 1, 2, 3)
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours.bin", "ours.idx"]


def test_writer_writes_several_sequences_a_document_in_int32(tmp_path):
    with IndexedDatasetWriter(tmp_path / "ours", np.dtype("<i4")) as writer:
        writer.add_document([1, 2], [70000])
        writer.add_document([3])
    assert (tmp_path / "ours.bin").read_bytes() == struct.pack("<4i", 1, 2, 70000, 3)
    assert (tmp_path / "ours.idx").read_bytes() == index_of([2, 1, 1], [0, 2, 3], INT32, 4)


def test_hand_written_pair_is_read(tmp_path):
    data = IndexedDataset(small_pair(tmp_path))
    assert (data.num_tokens, data.num_sequences, data.num_documents) == (6, 3, 3)
    assert data.sequence_lengths.tolist() == [3, 1, 2]
    assert data.document_indices.tolist() == [0, 1, 2, 3]
    assert data.dtype == np.dtype("<u2")
    assert [data.document(n).tolist() for n in range(3)] == [[10, 11, 12], [13], [14, 15]]


def test_written_pair_is_read_back(tmp_path):
    generator = np.random.default_rng(3)
    documents = [generator.integers(0, 65000, size=size) for size in (5, 0, 1, 300, 17)]
    with IndexedDatasetWriter(tmp_path / "set", dtype_for(65000)) as writer:
        for document in documents:
            writer.add_document(document)
    data = IndexedDataset(tmp_path / "set")
    assert data.num_documents == len(documents)
    for number, document in enumerate(documents):
        assert np.array_equal(data.document(number), document)
    assert np.array_equal(data.tokens(0, data.num_tokens), np.concatenate(documents))


def test_int32_ids_and_several_sequences_a_document_are_read(tmp_path):
    """Documents of two, of no and of one sequence; ids that uint16 could not hold."""
    ids = [100000, 1, 2, 3, 2_000_000_000]
    prefix = put(tmp_path, index_of([2, 2, 1], [0, 2, 2, 3], INT32, 4), struct.pack("<5i", *ids))
    data = IndexedDataset(prefix)
    assert data.dtype == np.dtype("<i4")
    assert (data.num_documents, data.num_sequences) == (3, 3)
    assert [data.document(n).tolist() for n in range(3)] == [ids[:4], [], ids[4:]]


@pytest.mark.parametrize(("code", "letter"), [(1, "B"), (2, "b"), (3, "h"), (4, "i"), (5, "q"), (8, "H")])
def test_every_whole_number_type_of_megatron_is_read(tmp_path, code, letter):
    size = struct.calcsize(f"<{letter}")
    prefix = put(tmp_path, index_of([2, 1], [0, 1, 2], code, size), struct.pack(f"<3{letter}", 5, 6, 127))
    tokens = IndexedDataset(prefix).tokens(0, 3)
    assert tokens.tolist() == [5, 6, 127]
    assert tokens.dtype == np.int64


def test_tokens_run_across_sequences(tmp_path):
    data = IndexedDataset(small_pair(tmp_path))
    stream = list(range(10, 16))
    for start in range(7):
        for count in range(7 - start):
            assert data.tokens(start, count).tolist() == stream[start : start + count]
    with pytest.raises(AssertionError):
        data.tokens(5, 2)


def test_dataset_without_documents_is_written_and_read(tmp_path):
    with IndexedDatasetWriter(tmp_path / "set", np.dtype("<u2")):
        pass
    data = IndexedDataset(tmp_path / "set")
    assert (data.num_tokens, data.num_documents) == (0, 0)
    assert data.tokens(0, 0).tolist() == []


def test_type_of_ids_follows_megatrons_rule():
    """Megatron-LM stores uint16 below 65,500 and int32 from there on."""
    assert dtype_for(65499) == np.dtype("<u2")
    assert dtype_for(65500) == np.dtype("<i4")


def test_prefix_with_dots_keeps_its_name(tmp_path):
    with IndexedDatasetWriter(tmp_path / "v1.2_train", np.dtype("<u2")) as writer:
        writer.add_document([1])
    assert (tmp_path / "v1.2_train.bin").is_file()
    assert IndexedDataset(tmp_path / "v1.2_train").num_tokens == 1


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_file_is_named(tmp_path, suffix):
    prefix = small_pair(tmp_path)
    missing = tmp_path / f"set{suffix}"
    missing.unlink()
    refused(prefix, missing, "no such file")


@pytest.mark.parametrize("content", [b"", b"MMIDIDX", b"x" * 200, MAGIC + b"\x01"])
def test_file_that_is_no_index_is_refused(tmp_path, content):
    refused(put(tmp_path, content, b""), tmp_path / "set.idx", "not an index")


BROKEN_INDEXES = {
    "version 2": (index_of([3, 1, 2], [0, 1, 2, 3], version=2), "version 2"),
    "float32": (index_of([3, 1, 2], [0, 1, 2, 3], code=7), "type code 7"),
    "float64": (index_of([3, 1, 2], [0, 1, 2, 3], code=6), "type code 6"),
    "unknown type": (index_of([3, 1, 2], [0, 1, 2, 3], code=200), "type code 200"),
    "truncated": (index_of([3, 1, 2], [0, 1, 2, 3])[:-1], "bytes"),
    "header alone": (index_of([3, 1, 2], [0, 1, 2, 3])[:34], "bytes"),
    "oversized": (index_of([3, 1, 2], [0, 1, 2, 3]) + b"\0", "bytes"),
    "huge count": (MAGIC + struct.pack("<QBQQ", 1, 8, 2**63, 2**63), "bytes"),
    "gap": (index_of([3, 1, 2], [0, 1, 2, 3], pointers=[0, 6, 10]), "gaps"),
    "overlap": (index_of([3, 1, 2], [0, 1, 2, 3], pointers=[0, 4, 8]), "gaps"),
    "late start": (index_of([3, 1, 2], [0, 1, 2, 3], pointers=[2, 6, 8]), "gaps"),
    "bounds fall": (index_of([3, 1, 2], [0, 2, 1, 3]), "documents out of order"),
    "bounds start late": (index_of([3, 1, 2], [1, 2, 3]), "documents out of order"),
    "bounds end early": (index_of([3, 1, 2], [0, 1, 2]), "documents out of order"),
    "no bounds": (index_of([3, 1, 2], []), "documents out of order"),
    "negative length": (index_of([3, -1, 4], [0, 1, 2, 3]), "-1 tokens"),
}


@pytest.mark.parametrize("case", BROKEN_INDEXES)
def test_broken_index_is_refused(tmp_path, case):
    idx, word = BROKEN_INDEXES[case]
    refused(put(tmp_path, idx, struct.pack("<6H", *range(6))), tmp_path / "set.idx", word)


@pytest.mark.parametrize("size", [0, 10, 11, 13, 24])
def test_bin_of_another_size_is_refused(tmp_path, size):
    prefix = small_pair(tmp_path)
    (tmp_path / "set.bin").write_bytes(b"\0" * size)
    refused(prefix, tmp_path / "set.bin", f"{size} bytes")


def write_and_break(prefix):
    """Leaves the with block by an exception, after a document."""
    with IndexedDatasetWriter(prefix, np.dtype("<u2")) as writer:
        writer.add_document([1, 2, 3])
        raise KeyError("something else broke")


def test_nothing_is_published_after_an_exception(tmp_path):
    with pytest.raises(KeyError):
        write_and_break(tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


def test_earlier_pair_survives_an_exception(tmp_path):
    small_pair(tmp_path)
    with pytest.raises(KeyError):
        write_and_break(tmp_path / "set")
    assert IndexedDataset(tmp_path / "set").tokens(0, 6).tolist() == list(range(10, 16))
    assert len(list(tmp_path.iterdir())) == 2


def test_nothing_stands_under_a_final_name_before_the_end(tmp_path):
    with IndexedDatasetWriter(tmp_path / "set", np.dtype("<u2")) as writer:
        writer.add_document([1, 2, 3])
        assert not (tmp_path / "set.bin").exists()
        assert not (tmp_path / "set.idx").exists()
    assert IndexedDataset(tmp_path / "set").num_tokens == 3


@pytest.mark.parametrize("ids", [[65536], [-1]])
def test_ids_that_do_not_fit_are_never_wrapped(tmp_path, ids):
    prefix, uint16 = tmp_path / "set", np.dtype("<u2")
    with pytest.raises(AssertionError, match="do not fit"), IndexedDatasetWriter(prefix, uint16) as writer:
        writer.add_document(ids)
    assert list(tmp_path.iterdir()) == []


def test_damaged_index_is_refused_or_read_and_nothing_else(tmp_path):
    """Whatever bytes of an index are changed: a ConfigError, or a data set that gives its tokens."""
    generator = random.Random(20240)
    good = index_of([3, 1, 2], [0, 1, 1, 2, 3])
    bounds = len(good) - 8 * 5
    prefix = put(tmp_path, good, struct.pack("<6H", *range(6)))
    outcomes = {"read": 0, "refused": 0}
    for _ in range(600):
        bad = bytearray(good)
        for _ in range(generator.choice([1, 1, 1, 2, 4, 12])):
            place = generator.randrange(len(bad))
            kind = generator.randrange(5)
            if kind == 0:
                bad[place] = generator.randrange(256)
            elif kind == 1:
                bad[place] ^= 1 << generator.randrange(8)
            elif kind == 2:
                bad[place : place + 1] = b""
            elif kind == 3:
                bad[place:place] = bytes([generator.choice([0, 1, 255])])
            else:
                number = generator.choice([0, 1, 2, 3, 4, -1, 2**62, -(2**63)])
                struct.pack_into("<q", bad, min(bounds + 8 * generator.randrange(5), len(bad) - 8), number)
        (tmp_path / "set.idx").write_bytes(bytes(bad))
        try:
            data = IndexedDataset(prefix)
        except ConfigError:
            outcomes["refused"] += 1
            continue
        outcomes["read"] += 1
        assert len(data.tokens(0, data.num_tokens)) == data.num_tokens
        assert sum(len(data.document(n)) for n in range(data.num_documents)) == data.num_tokens
    assert outcomes["refused"] > 300
    assert outcomes["read"] > 5


def test_a_file_cut_off_after_it_was_opened(tmp_path):
    prefix = small_pair(tmp_path)
    dataset = IndexedDataset(prefix)
    (tmp_path / "set.bin").write_bytes(b"\x0a\x00\x0b\x00\x0c")
    assert dataset.tokens(0, 2).tolist() == [10, 11]
    with pytest.raises(ConfigError, match="ends at byte 5"):
        dataset.tokens(1, 3)


def test_a_long_index_is_checked_where_it_is_used(tmp_path, monkeypatch):
    """Only the ends of an index are read on opening where it is long; `check_index` reads all of it, in parts."""
    from megatron_doremi.data import indexed_dataset

    monkeypatch.setattr(indexed_dataset, "_CHECKED_ON_OPENING", 2)
    monkeypatch.setattr(indexed_dataset, "_PART", 2)
    good = small_pair(tmp_path)
    IndexedDataset(good).check_index()
    data = struct.pack("<6H", *range(10, 16))
    for name, idx, number in (
        ("lengths", index_of([2, 2, 2], [0, 1, 2, 3], pointers=[0, 6, 8]), None),
        ("negative", index_of([3, -1, 2], [0, 1, 2, 3], pointers=[0, 6, 8]), None),
        ("pointers", index_of([3, 1, 2], [0, 1, 2, 3], pointers=[0, 600, 8]), 1),
        ("bounds", index_of([3, 1, 2], [0, 2, 1, 3], pointers=[0, 6, 8]), 1),
        ("bounds", index_of([3, 1, 2], [0, 7, 2, 3], pointers=[0, 6, 8]), 0),
    ):
        dataset = IndexedDataset(put(tmp_path, idx, data, name))
        assert dataset.tokens(0, 6).tolist() == list(range(10, 16))
        with pytest.raises(ConfigError, match=name):
            dataset.check_index()
        if number is not None:
            with pytest.raises(ConfigError, match=f"document {number}"):
                dataset.document(number)
    with pytest.raises(ConfigError, match="bytes listed in"):
        IndexedDataset(put(tmp_path, index_of([3, 1, 3], [0, 1, 2, 3]), data, "end"))


def test_pairs_are_joined_with_their_sequences_and_documents(tmp_path):
    """Documents of several sequences, of none, and a pair without any."""
    documents = [[[1, 2], [3]], [], [[4]], [[], [5, 6, 7]]]
    with IndexedDatasetWriter(tmp_path / "expected", np.dtype("<u2")) as expected:
        for part in range(3):
            with IndexedDatasetWriter(tmp_path / f"part{part}", np.dtype("<u2")) as writer:
                for document in documents[: 4 - 4 * (part == 1)]:
                    writer.add_document(*document)
                    expected.add_document(*document)
    with IndexedDatasetWriter(tmp_path / "joined", np.dtype("<u2")) as joined:
        for part in range(3):
            assert sum(joined.add_dataset(IndexedDataset(tmp_path / f"part{part}"))) == (0 if part == 1 else 14)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"joined{suffix}").read_bytes() == (tmp_path / f"expected{suffix}").read_bytes()


def test_a_writer_resumes_where_an_earlier_one_stopped(tmp_path):
    """What that one wrote later is truncated; what is missing from it is named."""
    with IndexedDatasetWriter(tmp_path / "expected", np.dtype("<i4")) as expected:
        first = IndexedDatasetWriter(tmp_path / "set", np.dtype("<i4"), tmp_path / "partial")
        for writer in (first, expected):
            writer.add_documents(np.array([1, 70000, 3], dtype="<i4"), np.array([2, 1], dtype=np.int32))
        stood = first.flush()
        first.add_document([4, 5, 6])
        first.close()
        second = IndexedDatasetWriter(tmp_path / "set", np.dtype("<i4"), tmp_path / "partial", stood)
        for writer in (second, expected):
            writer.add_document([9], [8, 7])
        second.finalize()
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"set{suffix}").read_bytes() == (tmp_path / f"expected{suffix}").read_bytes()
    (tmp_path / "partial.bin.tmp").write_bytes(b"123")
    (tmp_path / "partial.lengths.tmp").write_bytes(b"")
    (tmp_path / "partial.bounds.tmp").write_bytes(b"")
    with pytest.raises(OSError, match="shorter than"):
        IndexedDatasetWriter(tmp_path / "set", np.dtype("<i4"), tmp_path / "partial", stood)
