"""Publishing data sets: all pairs appear together or not at all, and every domain name gives valid file names.

Run alone: python -m pytest tests/preprocessing/test_publishing.py
"""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest

from megatron_doremi.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter, paths_of
from megatron_doremi.data.manifest import TokenizerInfo, load_manifest
from megatron_doremi.errors import ConfigError
from megatron_doremi.mixture.static import resolve_weights
from megatron_doremi.preprocessing.encoding import Chunk, EncodedBlock
from megatron_doremi.preprocessing.inputs import find_inputs
from megatron_doremi.preprocessing.outputs import Outputs, manifest_after, publish
from megatron_doremi.preprocessing.sources import Progress

UINT16 = np.dtype("<u2")


def encoded(*documents):
    """An encoded block with one document of three ids per given domain."""
    chunks = {}
    for domain in documents:
        count = documents.count(domain)
        ids, lengths = np.array([1, 2, 3] * count, dtype=UINT16), np.full(count, 3, dtype=np.int32)
        chunks[domain, "train"] = Chunk(ids, lengths, lengths.astype(np.int64), lengths)
    return EncodedBlock(chunks, [], 0, Progress(1, 0))


# --- the writer


def test_prepared_pair_is_complete_but_not_published(tmp_path):
    writer = IndexedDatasetWriter(tmp_path / "set", UINT16)
    writer.add_document([1, 2], [3])
    writer.prepare()
    assert not (tmp_path / "set.bin").exists()
    assert not (tmp_path / "set.idx").exists()
    writer.publish()
    data = IndexedDataset(tmp_path / "set")
    assert data.document(0).tolist() == [1, 2, 3]
    assert data.sequence_lengths.tolist() == [2, 1]
    assert len(list(tmp_path.iterdir())) == 2


def test_prepared_pair_can_be_aborted(tmp_path):
    writer = IndexedDatasetWriter(tmp_path / "set", UINT16)
    writer.add_document([1, 2])
    writer.prepare()
    writer.abort()
    assert list(tmp_path.iterdir()) == []


def test_failed_writer_leaves_no_files(tmp_path, monkeypatch):
    """The disk is full when the ids are synced."""

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("megatron_doremi.data.indexed_dataset.os.fsync", full)
    with (
        pytest.raises(OSError, match="No space"),
        IndexedDatasetWriter(tmp_path / "set", UINT16) as writer,
    ):
        writer.add_document([1, 2])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("prefix", ["/", ".", "..", "a.b/c.d"])
def test_any_prefix_has_two_paths_and_a_missing_pair_is_reported(prefix):
    assert [str(path) for path in paths_of(Path(prefix))] == [f"{prefix}.bin", f"{prefix}.idx"]
    with pytest.raises(ConfigError, match="no such file"):
        IndexedDataset(Path(prefix))


def test_pair_without_read_permission_is_a_fault(tmp_path, monkeypatch):
    """Simulated, because root is never denied permission."""
    with IndexedDatasetWriter(tmp_path / "set", UINT16) as writer:
        writer.add_document([1])

    def denied(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "set.bin"))

    monkeypatch.setattr("megatron_doremi.data.indexed_dataset.np.memmap", denied)
    with pytest.raises(ConfigError, match=r"set\.bin: Permission denied"):
        IndexedDataset(tmp_path / "set")


# --- several pairs


def new_outputs(folder, *domains):
    """Outputs with one document per given domain."""
    (folder / "partial").mkdir(exist_ok=True)
    outputs = Outputs(folder, folder / "partial", UINT16)
    outputs.add(encoded(*domains))
    return outputs


def publish_to(folder, outputs):
    info = TokenizerInfo("SentencePieceTokenizer", folder / "tokenizer-0.model", "0" * 64, 100, 1)
    publish(outputs, manifest_after(folder / "domains.json", "train", outputs.by_key, info), "train")
    return outputs


def published(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_full_disk_leaves_all_earlier_pairs_and_their_manifest(tmp_path, monkeypatch):
    """If the second of three pairs cannot be completed, none of the three is replaced."""
    publish_to(tmp_path, new_outputs(tmp_path, "a", "b", "c"))
    before = published(tmp_path)
    outputs = new_outputs(tmp_path, "a", "a", "b", "b", "c")
    real, calls = IndexedDatasetWriter.prepare, []

    def full(writer):
        calls.append(writer)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(writer)

    monkeypatch.setattr(IndexedDatasetWriter, "prepare", full)
    with pytest.raises(OSError, match="No space"):
        publish_to(tmp_path, outputs)
    assert published(tmp_path) == before


def test_no_manifest_exists_if_publishing_is_interrupted_between_two_pairs(tmp_path, monkeypatch):
    """Otherwise the earlier manifest would describe the new pairs with old sizes and an old fingerprint."""
    publish_to(tmp_path, new_outputs(tmp_path, "a", "b"))
    assert load_manifest(tmp_path / "domains.json").names == ("a", "b")
    outputs = new_outputs(tmp_path, "a", "a", "b")
    real, calls = IndexedDatasetWriter.publish, []

    def stopped(writer):
        calls.append(writer)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(writer)

    monkeypatch.setattr(IndexedDatasetWriter, "publish", stopped)
    with pytest.raises(KeyboardInterrupt):
        publish_to(tmp_path, outputs)
    assert not (tmp_path / "domains.json").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


# --- domain names


def test_long_names_and_names_that_differ_only_by_case_get_separate_files(tmp_path):
    long = "a name / " * 100
    outputs = publish_to(tmp_path, new_outputs(tmp_path, "GitHub", "Github", "github", long, long + "!"))
    prefixes = [output.prefix.name for output in outputs.by_key.values()]
    assert prefixes[:3] == ["GitHub_train", "Github_2_train", "github_3_train"]
    assert len({prefix.casefold() for prefix in prefixes}) == 5
    assert max(map(len, prefixes)) < 120
    for domain in load_manifest(tmp_path / "domains.json").domains:
        assert IndexedDataset(domain.train).num_tokens == domain.tokens == 3


def test_too_many_domains_are_a_fault_of_the_key(tmp_path, monkeypatch):
    def exhausted(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    outputs = new_outputs(tmp_path, "a")
    monkeypatch.setattr("megatron_doremi.preprocessing.outputs.IndexedDatasetWriter", exhausted)
    with pytest.raises(ConfigError, match=r"domains: domain number 2, 'b': Too many open files"):
        outputs.add(encoded("b"))
    assert published(tmp_path) == {}


# --- other files


def test_natural_weights_without_tokens_are_a_fault_and_not_nan(tmp_path):
    """Empty pairs in a list in Megatron-LM's format; a domains.json with them is refused when it is read."""
    for name in ("a", "b"):
        IndexedDatasetWriter(tmp_path / name, UINT16).finalize()
    (tmp_path / "blend.txt").write_text("0.3 a 0.7 b")
    manifest = load_manifest(tmp_path / "blend.txt")
    with pytest.raises(ConfigError, match=r"natural.*blend\.txt"):
        resolve_weights("natural", manifest, False)
    assert resolve_weights("uniform", manifest, False).tolist() == [0.5, 0.5]


def test_files_with_other_suffixes_are_refused(tmp_path):
    (tmp_path / "data.parquet").write_bytes(b"PAR1")
    (tmp_path / "data.txt").write_bytes(b"text")
    (fault,) = find_inputs([tmp_path / "data.parquet", tmp_path / "data.txt"]).faults
    assert "data.txt" in fault.value
