"""Mutated files: whatever stands in an .idx, a .bin, a manifest or a weights file, a ConfigError or a right answer.

Run alone: python -m pytest tests/data/test_fuzz.py
"""

from __future__ import annotations

import copy
import json
import random

import numpy as np
import pytest

from megatron_doremi.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from megatron_doremi.data.manifest import (
    Domain,
    Manifest,
    TokenizerInfo,
    load_manifest,
    save_manifest,
)
from megatron_doremi.data.weights_file import load_weights, resolve_weights, save_weights
from megatron_doremi.errors import ConfigError

CASES = 2_500
VOCAB = 300
NAMES = ("a", "b", "c")
NUMBERS = [0, 1, -1, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1, 10**400, 0.5, -0.0, 1e-320, 1e308, 1e999]
ODD = [*NUMBERS, float("nan"), None, True, "", "a", "../x", "a\x00b", "\ud800", [], {}, [[]], {"a": 1}]


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
        domains.append(Domain(name, folder / f"{name}_train", folder / f"{name}_valid", 92, 5, 400))
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
    whole = dataset.tokens(0, dataset.num_tokens)
    assert len(whole) == dataset.num_tokens == int(dataset.sequence_lengths.sum(dtype=np.int64))
    assert len(whole) == 0 or (whole.min() >= 0 and whole.max() < VOCAB)
    parts = [dataset.document(number) for number in range(dataset.num_documents)]
    assert np.array_equal(np.concatenate(parts) if parts else np.empty(0), whole)
    return whole


@pytest.mark.parametrize("dtype", ["<u2", "<i4"])
@pytest.mark.parametrize("suffix", ["idx", "bin"])
def test_pairs(suffix, dtype, tmp_path):
    dice = random.Random(f"{suffix} {dtype}")
    prefix = write_pair(tmp_path / "set", dtype)
    path = tmp_path / f"set.{suffix}"
    original, right = path.read_bytes(), read_all(prefix)
    bin_size = (tmp_path / "set.bin").stat().st_size
    refused = 0
    for _ in range(CASES):
        data = mutated_bytes(original, dice)
        # Another file: a mapping of the last one may still be open.
        path.unlink()
        path.write_bytes(data)
        try:
            found = read_all(prefix)
        except ConfigError:
            refused += 1
            continue
        # What is accepted is all of the .bin, whose ids may have changed but not their number; a changed index may give
        # them another width or cut them into other documents.
        assert suffix == "idx" or len(found) == len(right)
        assert suffix == "bin" or len(found) * IndexedDataset(prefix).dtype.itemsize == bin_size
    print(f"{suffix} {dtype}: {refused} of {CASES} refused")
    assert refused > CASES // 4


@pytest.mark.parametrize("way", ["bytes", "values"])
def test_manifests(way, tmp_path):
    dice = random.Random(f"manifest {way}")
    path = write_manifest(tmp_path).path
    text = path.read_text()
    refused = 0
    for _ in range(CASES):
        path.write_bytes(mutated(text, way, dice))
        try:
            manifest = load_manifest(path)
            for domain in manifest.domains:
                read_all(domain.train)
                if domain.valid is not None:
                    read_all(domain.valid)
        except ConfigError:
            refused += 1
            continue
        assert len(set(manifest.names)) == len(manifest.domains) > 0
        assert manifest.natural_weights().sum() == pytest.approx(1.0)
        assert len(manifest.fingerprint()) == 64
    assert refused > CASES // 4


def test_prefix_lists(tmp_path):
    """Megatron-LM's 'weight prefix weight prefix' form, and the weights that it gives."""
    dice = random.Random("prefix list")
    write_manifest(tmp_path)
    path, text = tmp_path / "list.txt", "0.25 a_train 1e-2 b_train\n0.5 c_train"
    refused = 0
    for _ in range(CASES):
        path.write_bytes(mutated(text, "bytes", dice))
        try:
            vector = resolve_weights("given", load_manifest(path), allow_tokenizer_mismatch=False)
        except ConfigError:
            refused += 1
            continue
        assert (vector > 0).all()
        assert vector.sum() == pytest.approx(1.0)
    assert refused > CASES // 4


@pytest.mark.parametrize("form", ["ours", "bare", "authors'"])
@pytest.mark.parametrize("way", ["bytes", "values"])
def test_weights(way, form, tmp_path):
    dice = random.Random(f"weights {way} {form}")
    manifest = write_manifest(tmp_path)
    path, weights = tmp_path / "weights.json", {"a": 0.25, "b": 0.25, "c": 0.5}
    save_weights(path, weights, "0" * 64, {"steps": 3})
    if form != "ours":
        path.write_text(json.dumps(weights if form == "bare" else {"train_domain_weights": weights}))
    text = path.read_text()
    refused = 0
    for _ in range(CASES):
        path.write_bytes(mutated(text, way, dice))
        try:
            vector = load_weights(path, manifest, allow_tokenizer_mismatch=False)
        except ConfigError:
            refused += 1
            continue
        assert vector.shape == (3,)
        assert (vector > 0).all()
        assert vector.sum() == pytest.approx(1.0)
    assert refused > CASES // 4
