"""--split holds out the documents that Megatron-LM holds out, and a part reads as a pair of its own.

Run alone: python -m pytest tests/data/test_token_stream.py
"""

from __future__ import annotations

import json

import numpy as np
import pytest

from megatron_doremi.arguments import parse_config
from megatron_doremi.data.content_hash import sample_hash
from megatron_doremi.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from megatron_doremi.data.manifest import load_manifest, manifest_of_words
from megatron_doremi.data.token_stream import DatasetPart, split_bounds
from megatron_doremi.errors import ConfigError
from megatron_doremi.phases.held_out import DocumentSums, document_parts, windows_before
from megatron_doremi.phases.run_data import held_out, open_data


@pytest.mark.parametrize(
    ("shares", "count", "expected"),
    [
        # 969 / 1000 of 100 is 96.9, 999 / 1000 is 99.9.
        ((969, 30, 1), 100, [(0, 97), (97, 100), (100, 100)]),
        ((969, 30, 1), 1000, [(0, 969), (969, 999), (999, 1000)]),
        ((969, 30, 1), 7, [(0, 7), (7, 7), (7, 7)]),
        ((99, 1, 0), 50, [(0, 50), (50, 50), (50, 50)]),
        ((98, 2, 0), 100, [(0, 98), (98, 100), (100, 100)]),
        # Halves go to the even number: 2.5 to 2, 3.5 to 4.
        ((1, 1, 0), 5, [(0, 2), (2, 5), (5, 5)]),
        ((1, 1, 0), 7, [(0, 4), (4, 7), (7, 7)]),
        ((1, 0, 0), 3, [(0, 3), (3, 3), (3, 3)]),
    ],
)
def test_bounds_by_hand(shares, count, expected):
    assert split_bounds(shares, count) == expected


def write(prefix, documents):
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with IndexedDatasetWriter(prefix, np.dtype("<u2")) as writer:
        for sequences in documents:
            writer.add_document(*sequences)


def ids(*lengths):
    """One document of a sequence each length; ids tell their place."""
    return [np.arange(100 * i, 100 * i + length) for i, length in enumerate(lengths)]


@pytest.mark.parametrize(("first", "last"), [(0, 6), (0, 3), (2, 5), (3, 6), (4, 4), (6, 6), (1, 2)])
def test_a_part_reads_as_the_same_documents_in_a_pair_of_their_own(tmp_path, first, last):
    sequences = ids(4, 0, 3, 7, 0, 5)
    write(tmp_path / "all", [[each] for each in sequences])
    write(tmp_path / "some", [[each] for each in sequences[first:last]])
    part, alone = DatasetPart(IndexedDataset(tmp_path / "all"), first, last), IndexedDataset(tmp_path / "some")
    total = alone.num_tokens
    assert (part.num_tokens, part.num_documents, part.dtype) == (total, alone.num_documents, alone.dtype)
    assert part.first_document == (first if first < last else 0)
    assert sample_hash(part) == sample_hash(alone)
    for start in range(total + 1):
        for stop in range(start, total + 1):
            assert part.tokens(start, stop - start).tolist() == alone.tokens(start, stop - start).tolist()
            ours, theirs = part.documents_at(start, stop), alone.documents_at(start, stop)
            for name in ("documents", "bounds", "starts", "lengths"):
                assert getattr(ours, name).tolist() == getattr(theirs, name).tolist(), name


def test_a_split_within_a_document_of_several_sequences_keeps_its_length(tmp_path):
    first, second = ids(4, 3, 7)[:2], ids(4, 3, 7)[2:]
    write(tmp_path / "all", [first, second])
    dataset = IndexedDataset(tmp_path / "all")
    head, tail = DatasetPart(dataset, 0, 1), DatasetPart(dataset, 1, 3)
    assert (head.num_documents, tail.num_documents) == (1, 2)
    spans = tail.documents_at(0, tail.num_tokens)
    assert (spans.documents.tolist(), spans.starts.tolist(), spans.lengths.tolist()) == ([0, 1], [-4, 3], [7, 7])


@pytest.fixture
def pairs(tmp_path):
    """Two pairs of 20 documents with .bytes, and the same documents in pairs by split at 8 : 2."""
    dice = np.random.default_rng(5)
    for name in ("web", "books"):
        documents = [[dice.integers(0, 60, dice.integers(5, 30))] for _ in range(20)]
        sizes = dice.integers(10, 90, 20).astype("<u4")
        for part, chosen in (("", slice(0, 20)), ("_train", slice(0, 16)), ("_valid", slice(16, 20))):
            write(tmp_path / f"{name}{part}", documents[chosen])
            (tmp_path / f"{name}{part}.bytes").write_bytes(sizes[chosen].tobytes())
    lists = {split: [2, f"{tmp_path}/web_{split}", 1, f"{tmp_path}/books_{split}"] for split in ("train", "valid")}
    (tmp_path / "lists.json").write_text(json.dumps(lists))
    return tmp_path


def opened(*data):
    flags = [
        "--phase",
        "main",
        "--save",
        "out",
        "--train-iters",
        "5",
        "--num-layers",
        "2",
        "--hidden-size",
        "32",
        "--num-attention-heads",
        "4",
    ]
    config = parse_config([*flags, "--seq-length", "16", "--vocab-size", "61", *map(str, data)], 1)
    return open_data(config, training=True)


def test_a_run_on_a_split_is_the_run_on_pairs_by_split(pairs):
    """Sizes, identity, windows, held-out documents and their bytes."""
    words = ["--data-path", "2", pairs / "web", "1", pairs / "books", "--split", "8,2"]
    (split, weights), (apart, weights_apart) = opened(*words), opened("--domains", pairs / "lists.json")
    assert weights.tolist() == weights_apart.tolist() == [2 / 3, 1 / 3]
    assert split.names == apart.names == ("web", "books")
    assert split.manifest.fingerprint() == apart.manifest.fingerprint()
    assert (split.content, split.held_out_content) == (apart.content, apart.held_out_content)
    assert split.content != split.held_out_content
    assert split.window_counts(16) == apart.window_counts(16)
    assert split.manifest.warnings == apart.manifest.warnings == ()
    texts = [held_out(data, 16, 0) for data in (split, apart)]
    sums = [DocumentSums(text) for text in texts]
    for text, total in zip(texts, sums, strict=True):
        batch = text.windows()
        parts = document_parts(text, batch, windows_before(batch))
        total.add(parts, np.ones((len(batch.windows), 16)))
    assert sums[0].sums.tolist() == sums[1].sums.tolist()
    assert np.isfinite(sums[0].sums).all()


def test_a_list_file_is_split_too_and_without_held_out_text_a_line_says_so(pairs):
    words = f"{pairs}/web {pairs}/books"
    (pairs / "list.txt").write_text(words)
    by_file, by_words = (
        opened("--domains", pairs / "list.txt", "--split", "8,2"),
        opened("--data-path", *words.split(), "--split", " 80, 20,0"),
    )
    assert by_file[0].held_out_content == by_words[0].held_out_content
    for flags in ((), ("--split", "1"), ("--split", "1,0,1")):
        data, _ = opened("--data-path", *words.split(), *flags)
        assert data.valid == (None, None)
        assert "no held-out text, so the run is not evaluated" in data.manifest.warnings[-1]
    # A part that fills no window: the domain is not evaluated.
    data, _ = opened("--data-path", *words.split(), "--split", "1999,1")
    assert data.valid == (None, None)
    assert all("the domain is not evaluated" in line for line in data.manifest.warnings)


@pytest.mark.parametrize("split", ["0,1", "1,2,3,4", "a,b", "1,-1", "nan", "1;2", "inf,1"])
def test_a_malformed_split_is_a_fault(split):
    with pytest.raises(ConfigError, match="give for example 969,30,1"):
        opened("--data-path", "x", "--split", split)


def test_a_split_of_what_names_its_held_out_data_is_a_fault(pairs):
    with pytest.raises(ConfigError, match="leave --split out"):
        load_manifest(pairs / "lists.json", (8.0, 2.0, 0.0))
    with pytest.raises(ConfigError, match="one of the two"):
        opened("--data-path", "x", "--domains", "y")
    with pytest.raises(ConfigError, match="numbers among them"):
        manifest_of_words(["1", "a", "b"], None)
