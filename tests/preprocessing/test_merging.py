"""Array jobs and output folders: only shards of one run are merged, and one run at a time writes to a folder.

Run alone: python -m pytest tests/preprocessing/test_merging.py
"""

from __future__ import annotations

import json
import shutil
import socket

import numpy as np
import pytest
from test_preprocess import contents, documents_of, fails, jsonl_of, put, run

from megatron_doremi.data.document_bytes import document_bytes
from megatron_doremi.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from megatron_doremi.data.manifest import ManifestEntry, TokenizerInfo, load_manifest
from megatron_doremi.errors import ConfigError
from megatron_doremi.preprocessing.documents import share_of
from megatron_doremi.preprocessing.encoding import Chunk, EncodedBlock
from megatron_doremi.preprocessing.outputs import Outputs, describe_without_sizes, manifest_after, publish
from megatron_doremi.preprocessing.shards import (
    Pair,
    Shard,
    ShardData,
    load_shard,
    load_shards,
    merge,
    save_shard,
    shard_folder,
)
from megatron_doremi.preprocessing.sources import Progress
from megatron_doremi.preprocessing.workspace import Workspace
from megatron_doremi.storage.files import temporary_beside
from megatron_doremi.storage.folder_lock import LOCK, FolderLock, fcntl
from megatron_doremi.storage.formats import check_entry, sealed

UINT16 = np.dtype("<u2")
MODEL = b"a model"


def chunk(value, documents=1):
    ids, lengths = np.array([value] * 3 * documents, dtype=UINT16), np.full(documents, 3, dtype=np.int32)
    return Chunk(ids, lengths, lengths.astype(np.int64), lengths)


def encoded(*keys, blocks=1):
    return EncodedBlock({key: chunk(value) for value, key in enumerate(keys, 1)}, [], 0, Progress(blocks, 0))


def info(folder, name="tokenizer.model", sha256="a" * 64):
    return TokenizerInfo("SentencePieceTokenizer", folder / name, sha256, 100, 1)


def make_shard(out, index, count, keys, split="train", sha256="a" * 64):
    """Makes the folder of a task, with one document per key, using the code of the tool."""
    folder = shard_folder(out, split, Shard(index, count))
    folder.mkdir(parents=True)
    outputs = Outputs(folder, folder, UINT16)
    outputs.add(encoded(*keys))
    outputs.publish()
    (folder / "tokenizer.model").write_bytes(MODEL)
    pairs = {key: Pair(output.prefix, output.documents, output.bytes, True) for key, output in outputs.by_key.items()}
    save_shard(ShardData(folder, Shard(index, count), split, "b" * 64, info(folder, sha256=sha256), pairs, ()))
    return folder


@pytest.fixture
def out(tmp_path):
    """An output folder with both shards of an array job of two tasks."""
    for index in range(2):
        make_shard(tmp_path / "out", index, 2, [("Books", "train"), ("Web", "train")])
    return tmp_path / "out"


def refused(out, split="train"):
    with pytest.raises(ConfigError) as error:
        load_shards(out, split)
    return str(error.value)


# --- which folders are shards


@pytest.mark.parametrize("name", ["train-00001-of-00002.bak", "train-00001-of-00002~", "old-train-00001-of-00002"])
def test_a_copy_of_a_shard_folder_is_ignored(out, name):
    """Version 0.1 merged it and so duplicated every document of the task."""
    shutil.copytree(out / "shards" / "train-00001-of-00002", out / "shards" / name)
    assert [data.shard.index for data in load_shards(out, "train")] == [0, 1]


def test_the_tool_warns_of_folders_that_it_ignores(out):
    shutil.copytree(out / "shards" / "train-00001-of-00002", out / "shards" / "train-00001-of-00002.bak")
    done = run("merge_datasets.py", "--output-dir", out)
    assert "train-00001-of-00002.bak, which is not the folder of a task" in done.stderr


def test_a_folder_with_the_name_of_another_task_is_refused(out):
    shards = out / "shards"
    shutil.copytree(shards / "train-00001-of-00002", shards / "train-00007-of-00002")
    assert "train-00001-of-00002" in refused(out)
    shutil.rmtree(shards / "train-00007-of-00002")
    shutil.rmtree(shards / "train-00000-of-00002")
    shutil.copytree(shards / "train-00001-of-00002", shards / "train-00000-of-00002")
    assert "shard 1 of 2" in refused(out)
    shutil.rmtree(shards / "train-00000-of-00002")
    shutil.copytree(shards / "train-00001-of-00002", shards / "valid-00001-of-00002")
    assert "of the train split" in refused(out, "valid")
    assert "no shard 0" in refused(out)


# --- the content of shard.json


def rewritten(folder, change, seal=True):
    path = folder / "shard.json"
    content = json.loads(path.read_text())
    del content["sha256"]
    change(content)
    path.write_text(json.dumps(sealed(content) if seal else content))


@pytest.mark.parametrize("name", ["/etc/hostname", "../train-00000-of-00002/Books_train", "a/b", "..", ".", "", "a\0b"])
def test_names_that_point_outside_the_folder_are_refused(out, tmp_path, name):
    """Version 0.1 copied the tokenizer and the pairs from any path."""
    folder = out / "shards" / "train-00001-of-00002"
    rewritten(folder, lambda content: content["tokenizer"].update(file=name))
    assert "tokenizer.file" in refused(out)
    rewritten(folder, lambda content: [content["tokenizer"].update(file="t"), content["pairs"][0].update(prefix=name)])
    assert "pairs.0.prefix" in refused(out)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content.update(format="megatron-doremi-shard/3"), "written by a newer version"),
        (lambda content: content.update(shard=2), "shard should be below num_shards"),
        (lambda content: content.update(shard=-1), "shard: -1"),
        (lambda content: content["pairs"].append(content["pairs"][0]), "listed once"),
        (lambda content: content["pairs"][0].update(documents=1.0), "pairs.0.documents: 1.0"),
        (lambda content: content.pop("tokenizer"), "tokenizer is missing"),
    ],
)
def test_an_invalid_shard_json_is_refused(out, change, words):
    rewritten(out / "shards" / "train-00001-of-00002", change)
    assert words in refused(out)


def test_an_edited_shard_is_refused_and_one_from_version_0_1_is_read(out):
    folder = out / "shards" / "train-00001-of-00002"
    before = load_shard(folder)
    rewritten(folder, lambda content: content.update(format="megatron-doremi-shard/1"), seal=False)
    assert load_shard(folder) == before
    text = (out / "shards" / "train-00000-of-00002" / "shard.json").read_text()
    (out / "shards" / "train-00000-of-00002" / "shard.json").write_text(text.replace('"Books"', '"Bocks"'))
    assert "damaged or edited" in refused(out)


# --- sizes of documents (PREFIX.bytes)


def without_sizes(folder):
    """Makes a task's folder one of version 0.1."""
    for path in folder.glob("*.bytes"):
        path.unlink()

    def older(content):
        content["format"] = "megatron-doremi-shard/1"
        for pair in content["pairs"]:
            del pair["document_bytes"]

    rewritten(folder, older, seal=False)


def merged(out):
    outputs = Outputs(out, out, UINT16)
    shards = load_shards(out, "train")
    assert sum(merge(shards, outputs)) == sum(6 * pair.documents for data in shards for pair in data.pairs.values())
    outputs.publish()
    return outputs


def test_shards_without_sizes_are_merged_and_no_stale_sizes_stay(out):
    """A domain has sizes only if all of its shards have them."""
    merged(out)
    assert document_bytes(out / "Books_train").tolist() == [3, 3]
    shutil.rmtree(out / "shards" / "train-00001-of-00002")
    without_sizes(make_shard(out, 1, 2, [("Books", "train")]))
    outputs = merged(out)
    assert document_bytes(out / "Books_train") is None
    assert document_bytes(out / "Web_train").tolist() == [3]
    (note,) = describe_without_sizes(outputs)
    assert "1 of 2 pairs (Books_train)" in note


@pytest.mark.parametrize("content", [None, bytes(3), bytes([4, 0, 0, 0])])
def test_lost_or_damaged_sizes_are_not_merged(out, content):
    path = out / "shards" / "train-00001-of-00002" / "Web_train.bytes"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"Web_train\.bytes"):
        merged(out)


# --- the journal


def workspace(folder, split="train", resume=False, settings=None):
    partial = folder / f".partial-{split}"
    return Workspace(partial, Outputs(folder, partial, UINT16), settings or {"a": 1}, resume, seconds=0.0)


def interrupted(folder):
    with workspace(folder) as unfinished:
        unfinished.outputs.add(encoded(("Books", "train"), blocks=3))
        unfinished.save_journal(now=True)
    return folder / ".partial-train" / "journal.json"


def test_a_journal_resumes(tmp_path):
    interrupted(tmp_path)
    with workspace(tmp_path, resume=True) as again:
        assert again.resumed
        assert again.outputs.blocks == 3
        assert again.outputs.by_key["Books", "train"].writer.num_tokens == 3


def test_a_journal_without_sizes_resumes_without_them(tmp_path):
    """Version 0.1 recorded none; sizes that a journal records must be there."""
    journal = interrupted(tmp_path)
    (tmp_path / ".partial-train" / "Books_train.bytes.tmp").unlink()
    with pytest.raises(ConfigError, match=r"Books_train\.bytes\.tmp"):
        workspace(tmp_path, resume=True)
    content = json.loads(journal.read_text())
    del content["sha256"], content["pairs"][0]["document_bytes"]
    journal.write_text(json.dumps(sealed(content)))
    with workspace(tmp_path, resume=True) as again:
        again.outputs.add(encoded(("Books", "train"), ("Web", "train"), blocks=4))
        again.outputs.publish()
    assert document_bytes(tmp_path / "Books_train") is None
    assert IndexedDataset(tmp_path / "Books_train").num_documents == 2
    assert document_bytes(tmp_path / "Web_train").tolist() == [3]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content["pairs"][0].update(prefix="../../Books_train"), "pairs.0.prefix"),
        (lambda content: content["pairs"][0].update(prefix="/tmp/Books_train"), "pairs.0.prefix"),
        (lambda content: content["pairs"][0].update(tokens=-3), "pairs.0.tokens"),
        (lambda content: content["pairs"][0].update(tokens=30_000), "shorter than"),
        (lambda content: content.update(pairs=content["pairs"] * 2), "listed once"),
        (lambda content: content.update(format="megatron-doremi-journal/3"), "written by a newer version"),
        (lambda content: content.pop("blocks"), "blocks is missing"),
    ],
)
def test_an_invalid_journal_is_refused_and_nothing_is_written_elsewhere(tmp_path, change, words):
    """With ../ in a prefix, version 0.1 created files outside the output folder."""
    (tmp_path / "out").mkdir()
    journal = interrupted(tmp_path / "out")
    content = json.loads(journal.read_text())
    del content["sha256"]
    change(content)
    journal.write_text(json.dumps(sealed(content)))
    with pytest.raises(ConfigError) as error:
        workspace(tmp_path / "out", resume=True)
    assert words in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_edited_journal_is_refused(tmp_path):
    """A wrong number of blocks would lose or duplicate text."""
    journal = interrupted(tmp_path)
    journal.write_text(journal.read_text().replace('"blocks": 3', '"blocks": 4'))
    with pytest.raises(ConfigError, match="damaged or edited"):
        workspace(tmp_path, resume=True)


# --- one run per folder


def test_two_runs_cannot_write_to_one_folder_even_for_two_splits(tmp_path):
    """Otherwise a manifest could name the tokenizer of one run and the data of the other."""
    with workspace(tmp_path) as first:
        with pytest.raises(ConfigError, match=f"another run is writing.*on {socket.gethostname()}"):
            workspace(tmp_path, "valid")
        first.remove()
    workspace(tmp_path, "valid").__exit__()
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path, monkeypatch):
    (tmp_path / LOCK).write_text(json.dumps({"host": socket.gethostname(), "process": 2**22 + 1, "job": "7"}))
    FolderLock(tmp_path, "--output-dir").release()
    assert not (tmp_path / LOCK).exists()

    # On a file system without flock the file itself is the lock.
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    held = FolderLock(tmp_path, "--output-dir")
    with pytest.raises(ConfigError, match="another run is writing"):
        FolderLock(tmp_path, "--output-dir")
    held.release()
    (tmp_path / LOCK).write_text(json.dumps({"host": "elsewhere", "process": 5, "job": "77"}))
    with pytest.raises(ConfigError, match="process 5 on elsewhere, SLURM job 77"):
        FolderLock(tmp_path, "--output-dir")
    (tmp_path / LOCK).write_text(json.dumps({"host": socket.gethostname(), "process": 2**22 + 1}))
    FolderLock(tmp_path, "--output-dir").release()


def test_the_tokenizer_is_compared_again_before_the_valid_split_is_published(tmp_path):
    """Another run may have published another train split in the meantime."""
    outputs = Outputs(tmp_path, tmp_path, UINT16)
    outputs.add(encoded(("Books", "train")))
    publish(outputs, manifest_after(tmp_path / "domains.json", "train", outputs.by_key, info(tmp_path)), "train")
    check_entry(json.loads((tmp_path / "domains.json").read_text()), "", ManifestEntry, "")
    valid = Outputs(tmp_path, tmp_path, UINT16)
    valid.add(encoded(("Books", "valid")))
    other = info(tmp_path, "other.model", "c" * 64)
    with pytest.raises(ConfigError, match="aaaaaaaaaaaa"):
        manifest_after(tmp_path / "domains.json", "valid", valid.by_key, other)
    assert manifest_after(tmp_path / "domains.json", "valid", valid.by_key, info(tmp_path)).domains[0].valid


def test_shards_of_another_tokenizer_are_not_merged_into_a_valid_split(out):
    from megatron_doremi.storage.files import sha256_of

    for index in range(2):
        folder = out / "shards" / f"train-{index:05d}-of-00002"
        sha256 = sha256_of(folder / "tokenizer.model")
        rewritten(folder, lambda content, sha256=sha256: content["tokenizer"].update(sha256=sha256))
    done = run("merge_datasets.py", "--output-dir", out)
    assert done.returncode == 0, done.stderr
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    folder = make_shard(out, 0, 1, [("Books", "valid")], "valid", sha256=sha256)
    (folder / "tokenizer.model").write_bytes(b"another")
    rewritten(folder, lambda content: content["tokenizer"].update(sha256=sha256_of(folder / "tokenizer.model")))
    fails(run("merge_datasets.py", "--output-dir", out, "--split", "valid"), "tokenizer of the valid split")
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before


def test_temporary_names_differ_between_hosts_processes_and_threads(tmp_path, monkeypatch):
    path = tmp_path / ("\u00e9" * 250)
    first, second = temporary_beside(path), temporary_beside(path)
    assert first != second
    monkeypatch.setattr(socket, "gethostname", lambda: "other/host")
    third = temporary_beside(path)
    assert "other-host" in third.name
    for temporary in (first, second, third):
        assert temporary.name.startswith(".")
        temporary.write_bytes(b"")
    assert IndexedDatasetWriter(tmp_path / "set", UINT16)._ids != IndexedDatasetWriter(tmp_path / "set", UINT16)._ids


# --- a domain whose documents are all selected for the valid split


def held_out_alone(size=0.5):
    """Returns a text that is held out, and the texts that are not."""
    texts = [f"ta ri {number}" for number in range(100)]
    return next(t for t in texts if share_of(t.encode()) < size), [t for t in texts if share_of(t.encode()) >= size]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    put(folder, jsonl_of(documents_of(1, 400)), "sample.jsonl")
    flags = ["--input", folder / "sample.jsonl", "--output", folder / "t.model", "--vocab-size", 320]
    done = run("train_tokenizer.py", *flags)
    assert done.returncode == 0, done.stderr
    return folder / "t.model"


def test_a_domain_with_one_held_out_document_stays_in_train(tmp_path, model):
    """Version 0.1 encoded everything and then refused it, even with --resume. Array jobs behave like single runs."""
    alone, others = held_out_alone()
    # Both domain names map to the same file name, so the final name of the pair matters too.
    documents = [(text, "a b") for text in others] + [(alone, "a/b")] + [(alone + " x", "a b")] * 2
    file = put(tmp_path, jsonl_of(documents))
    flags = ["--input", file, "--tokenizer-model", model, "--valid-fraction", 0.5, "--append-eod"]
    done = run("preprocess_data.py", *flags, "--output-dir", tmp_path / "one")
    assert done.returncode == 0, done.stderr
    assert "domain 'a/b': all of its documents would be held out; keeping them in the train split" in done.stdout
    manifest = load_manifest(tmp_path / "one" / "domains.json")
    assert manifest.names == ("a b", "a/b")
    assert [domain.documents for domain in manifest.domains][1] == 1
    assert manifest.domains[1].valid is None
    assert manifest.domains[1].train.name == "a_b_2_train"
    assert IndexedDataset(manifest.domains[1].train).num_documents == 1
    for index in range(2):
        task = ["--shard", index, "--num-shards", 2]
        done = run("preprocess_data.py", *flags, "--output-dir", tmp_path / "two", *task)
        assert done.returncode == 0, done.stderr
    done = run("merge_datasets.py", "--output-dir", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert "keeping them in the train split" in done.stdout
    shutil.rmtree(tmp_path / "two" / "shards")
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
