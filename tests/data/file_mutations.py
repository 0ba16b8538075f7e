"""Mutated files of a data set, and what reading them may give: a ConfigError, the same result, or another right one."""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import io
import json
import random
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from megatron_doremi.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from megatron_doremi.data.manifest import Domain, Manifest, TokenizerInfo, load_manifest, save_manifest
from megatron_doremi.data.weights_file import load_weights, save_weights
from megatron_doremi.errors import ConfigError
from megatron_doremi.mixture.static import resolve_weights
from megatron_doremi.preprocessing.encoding import Chunk, EncodedBlock
from megatron_doremi.preprocessing.outputs import Outputs
from megatron_doremi.preprocessing.shards import Pair, Shard, ShardData, load_shards, save_shard, shard_folder
from megatron_doremi.preprocessing.sources import Progress
from megatron_doremi.preprocessing.workspace import Workspace

VOCAB = 300
NAMES = ("a", "b", "c")
NUMBERS = [0, 1, -1, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1, 10**400, 0.5, -0.0, 1e-320, 1e308, 1e999]
ODD = [*NUMBERS, float("nan"), None, True, "", "a", "../x", "a\x00b", "\ud800", [], {}, [[]], {"a": 1}]
UINT16 = np.dtype("<u2")
REFUSED, SAME, OTHER = "refused", "the same", "another answer"


def write_pair(prefix, dtype="<u2"):
    generator = np.random.default_rng(1)
    with IndexedDatasetWriter(prefix, np.dtype(dtype)) as writer:
        for length in (5, 0, 17, 1, 40):
            writer.add_document(generator.integers(0, VOCAB, length), generator.integers(0, VOCAB, length // 2))
    return prefix


def write_manifest(folder):
    domains = []
    for name in NAMES:
        for split in ("train", "valid"):
            write_pair(folder / f"{name}_{split}")
        train = folder / f"{name}_train"
        domains.append(Domain(name, train, folder / f"{name}_valid", IndexedDataset(train).num_tokens, 5, 400))
    tokenizer = TokenizerInfo("SentencePieceTokenizer", folder / "tokenizer.model", "0" * 64, VOCAB, 0)
    manifest = Manifest(tuple(domains), tokenizer, folder / "domains.json")
    save_manifest(manifest)
    return manifest


def mutated_bytes(data, dice):
    """One to four changes: bytes flipped, set to extremes, taken out, put in, doubled, or the end cut off."""
    data = bytearray(data)
    # Most often the size stays, so that what is checked after the size is reached.
    kinds = (0, 1) if dice.random() < 0.7 else range(6)
    for _ in range(dice.randint(1, 4)):
        place = dice.randrange(len(data) + 1)
        span = dice.choice([1, 2, 4, 8, 30])
        kind = dice.choice(kinds)
        if kind == 0 and place < len(data):
            data[place] ^= 1 << dice.randrange(8)
        elif kind == 1:
            data[place : place + span] = bytes([dice.choice([0, 1, 127, 128, 255])]) * len(data[place : place + span])
        elif kind == 2:
            del data[place : place + span]
        elif kind == 3:
            data[place:place] = dice.randbytes(span)
        elif kind == 4:
            data[place:place] = data[place : place + span]
        else:
            del data[place:]
    return bytes(data)


def mutated_json(entry, dice):
    """The text of an object in which one or two values, at any depth, are something else, gone or there twice."""
    entry = copy.deepcopy(entry)
    for _ in range(dice.randint(1, 2)):
        node = entry
        while True:
            key = dice.choice(list(node) if isinstance(node, dict) else range(len(node)))
            if not isinstance(node[key], dict | list) or not node[key] or dice.random() < 0.3:
                break
            node = node[key]
        kind = dice.randrange(4)
        if kind == 0:
            del node[key]
        elif kind == 1 and isinstance(node, list):
            node.append(node[key])
        elif kind == 2 and isinstance(node, dict):
            node[dice.choice(["a", "format", "name", "x"])] = node.pop(key)
        else:
            node[key] = dice.choice(ODD)
        if not entry:
            break
    return json.dumps(entry)


def mutated(text, way, dice):
    return mutated_bytes(text.encode(), dice) if way == "bytes" else mutated_json(json.loads(text), dice).encode()


def read_all(prefix):
    """Everything that a pair holds, read in every way; ids outside the vocabulary may not come out."""
    dataset = IndexedDataset(prefix, VOCAB)
    ids = dataset.tokens(0, dataset.num_tokens)
    assert len(ids) == dataset.num_tokens == int(dataset.sequence_lengths.sum(dtype=np.int64))
    assert len(ids) == 0 or (ids.min() >= 0 and ids.max() < VOCAB)
    parts = [dataset.document(number) for number in range(dataset.num_documents)]
    assert np.array_equal(np.concatenate(parts) if parts else np.empty(0), ids)
    return ids


def replaced(path, data):
    """Another file: a mapping of the last one may still be open."""
    path.unlink()
    path.write_bytes(data)


def fuzz_pair(folder, cases, dice, suffix, dtype):
    prefix = write_pair(folder / "set", dtype)
    path = folder / f"set.{suffix}"
    original, right = path.read_bytes(), read_all(prefix)
    bin_size = (folder / "set.bin").stat().st_size
    for _ in range(cases):
        replaced(path, mutated_bytes(original, dice))
        try:
            ids = read_all(prefix)
        except ConfigError:
            yield REFUSED
            continue
        # What is accepted is all of the .bin, whose ids may have changed but not their number; a changed index may give
        # them another width or cut them into other documents.
        assert suffix == "idx" or len(ids) == len(right)
        assert suffix == "bin" or len(ids) * IndexedDataset(prefix).dtype.itemsize == bin_size
        yield SAME if np.array_equal(ids, right) else OTHER


def fuzz_manifest(folder, cases, dice, way):
    written = write_manifest(folder)
    path = written.path
    text = path.read_text()
    for _ in range(cases):
        path.write_bytes(mutated(text, way, dice))
        try:
            manifest = load_manifest(path)
            for domain in manifest.domains:
                read_all(domain.train)
                if domain.valid is not None:
                    read_all(domain.valid)
        except ConfigError:
            yield REFUSED
            continue
        assert len(set(manifest.names)) == len(manifest.domains) > 0
        assert abs(manifest.natural_weights().sum() - 1.0) < 1e-12
        assert len(manifest.fingerprint()) == 64
        yield SAME if manifest == written else OTHER


def fuzz_list(folder, cases, dice, way):
    """Megatron-LM's lists, and the weights that they give."""
    write_manifest(folder)
    path, text = folder / "list.txt", "0.25 a_train 1e-2 b_train\n0.5 c_train"
    if way == "values":
        lists = {"train": ["0.25", "a_train", 0.01, "b_train", "0.5", "c_train"], "valid": ["a_valid", "c_valid"]}
        text = json.dumps(lists)
    path.write_text(text)
    right = resolve_weights("given", load_manifest(path), allow_tokenizer_mismatch=False)
    for _ in range(cases):
        path.write_bytes(mutated(text, way, dice))
        try:
            manifest = load_manifest(path)
            setting = "natural" if manifest.given_weights is None else "given"
            vector = resolve_weights(setting, manifest, allow_tokenizer_mismatch=False)
        except ConfigError:
            yield REFUSED
            continue
        assert (vector > 0).all()
        assert abs(vector.sum() - 1.0) < 1e-12
        yield SAME if np.array_equal(vector, right) else OTHER


def fuzz_weights(folder, cases, dice, way, form):
    manifest = write_manifest(folder)
    suffix = {"YAML": "yaml", "table": "csv"}.get(form, "json")
    path, weights = folder / f"weights.{suffix}", {"a": 0.25, "b": 0.25, "c": 0.5}
    save_weights(path, weights, "0" * 64, {"steps": 3})
    texts = {
        "bare": json.dumps(weights),
        "authors": json.dumps({"train_domain_weights": weights}),
        "YAML": 'train:\n  "a": 0.25\n  b: 25.0e-2\n  c: .5\n' if way == "bytes" else json.dumps({"train": weights}),
        "table": "index,b,a,c\n7,0.25,0.25,0.5\n",
    }
    if form != "ours":
        path.write_text(texts[form])
    text = path.read_text()
    for _ in range(cases):
        path.write_bytes(mutated(text, way, dice))
        try:
            vector = load_weights(path, manifest, allow_tokenizer_mismatch=False)
        except ConfigError:
            yield REFUSED
            continue
        assert vector.shape == (3,)
        # By hand a weight of 0 is valid.
        assert (vector > 0).all() or (form != "ours" and (vector >= 0).all())
        assert abs(vector.sum() - 1.0) < 1e-12
        yield SAME if vector.tolist() == [0.25, 0.25, 0.5] else OTHER


def block_of(*keys):
    lengths = np.array([2, 1], dtype=np.int32)
    chunks = {key: Chunk(np.array([5, 6, 7], UINT16), lengths, lengths.astype(np.int64), lengths) for key in keys}
    return EncodedBlock(
        chunks, ["x.jsonl, line 3: not JSON"], 1, Progress(7, 0), ("y.gz breaks off",), 2, (), 9, Counter("q")
    )


def fuzz_journal(folder, cases, dice, way):
    """An unfinished run is resumed exactly where it stood, or not at all; nothing appears outside of its folder."""
    out = folder / "out"
    out.mkdir()

    def opened(resume):
        return Workspace(out / ".partial-train", Outputs(out, out / ".partial-train", UINT16), {"a": [1]}, resume)

    with opened(False) as workspace:
        workspace.outputs.add(block_of(("a", "train"), ("b", "train"), ("b", "valid")))
        workspace.save_journal(now=True)
    path = out / ".partial-train" / "journal.json"
    text = path.read_text()
    with opened(True) as workspace:
        right = workspace.outputs.snapshot()
    kept = {each.name: each.read_bytes() for each in path.parent.iterdir()}
    for _ in range(cases):
        path.write_bytes(mutated(text, way, dice))
        try:
            with opened(True) as workspace:
                assert workspace.outputs.snapshot() == right
        except ConfigError:
            yield REFUSED
        else:
            yield SAME
        assert {each.name for each in folder.iterdir()} == {"out"}
        assert {each.name for each in path.parent.iterdir()} == set(kept)
        for name, data in kept.items():
            assert name == path.name or (path.parent / name).read_bytes() == data


def fuzz_shard(folder, cases, dice, way):
    """A task's folder says what its task wrote, or is refused."""
    for index in range(2):
        task = shard_folder(folder, "train", Shard(index, 2))
        task.mkdir(parents=True)
        outputs = Outputs(task, task, UINT16)
        outputs.add(block_of(("a", "train"), ("b", "train"), ("b", "valid")))
        outputs.publish()
        pairs = {key: Pair(each.prefix, each.documents, each.bytes, True) for key, each in outputs.by_key.items()}
        tokenizer = TokenizerInfo("SentencePieceTokenizer", task / "t.model", "0" * 64, VOCAB, 0)
        save_shard(ShardData(task, Shard(index, 2), "train", "1" * 64, tokenizer, pairs, ("a", "b")))
    path = task / "shard.json"
    text, right = path.read_text(), load_shards(folder, "train")
    for _ in range(cases):
        path.write_bytes(mutated(text, way, dice))
        try:
            assert load_shards(folder, "train") == right
        except ConfigError:
            yield REFUSED
        else:
            yield SAME


def fuzz_inspect(folder, cases, dice):
    """tools/inspect_data.py on a data set of which one file is damaged."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    inspect_data = importlib.import_module("tools.inspect_data")
    manifest = write_manifest(folder)
    text = json.loads(manifest.path.read_text()) | {"tokenizer": None}
    manifest.path.write_text(json.dumps(text))
    flags = {"domains": manifest.path, "split": "train", "domain": "a", "first": 0, "count": 3}
    flags |= {"checksums": None, "write_checksums": None}
    flags |= {"tokens": 1000, "train_iters": 0, "global_batch_size": 0, "seq_length": 0, "max_epochs_per_domain": 0.0}
    flags |= {
        "domain_weights": None,
        "domain_names": None,
        "allow_tokenizer_mismatch": False,
        "all": False,
        "duplicates": "all",
    }
    args = argparse.Namespace(**flags)
    commands = (inspect_data.counts, inspect_data.documents, inspect_data.verify, inspect_data.overview)

    def answers():
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            for command in commands:
                try:
                    command(args)
                except ConfigError:
                    print(REFUSED)
        return printed.getvalue()

    right = answers()
    assert REFUSED not in right.splitlines()
    files = ["a_train.bin", "a_train.idx", "b_valid.idx", "domains.json"]
    for _ in range(cases):
        path = folder / dice.choice(files)
        before = path.read_bytes()
        replaced(path, mutated_bytes(before, dice))
        printed = answers()
        yield REFUSED if REFUSED in printed.splitlines() else SAME if printed == right else OTHER
        replaced(path, before)


FUZZERS = {
    **{f"{suffix} {dtype}": (fuzz_pair, (suffix, dtype)) for suffix in ("idx", "bin") for dtype in ("<u2", "<i4")},
    **{
        f"{name} {way}": (function, (way,))
        for name, function in (
            ("manifest", fuzz_manifest),
            ("list", fuzz_list),
            ("journal", fuzz_journal),
            ("shard", fuzz_shard),
        )
        for way in ("bytes", "values")
    },
    **{
        f"weights {way} {form}": (fuzz_weights, (way, form))
        for way in ("bytes", "values")
        for form in ("ours", "bare", "authors", "YAML")
    },
    "weights bytes table": (fuzz_weights, ("bytes", "table")),
    "inspect": (fuzz_inspect, ()),
}


def fuzz(folder, name, cases, seed=0):
    """Reads `cases` mutations of a kind of file; how often each answer came.

    An AssertionError or another exception is a fault; it carries the number of the mutation.
    """
    function, arguments = FUZZERS[name]
    shutil.rmtree(folder / "fuzz", ignore_errors=True)
    (folder / "fuzz").mkdir()
    answers: Counter[str] = Counter()
    try:
        for answer in function(folder / "fuzz", cases, random.Random(f"{name} {seed}"), *arguments):
            answers[answer] += 1
    except Exception as error:
        error.add_note(f"mutation {answers.total()} of {name!r}, seed {seed}")
        raise
    return answers
