"""tools/inspect_data.py shows the data that went in and that training reads, and detects damage.

Run alone: python -m pytest tests/data/test_inspect_data.py
"""

from __future__ import annotations

import json
import shutil
from itertools import islice

import numpy as np
import pytest
from preprocessing.test_preprocess import documents_of, jsonl_of, run

from megatron_doremi.data.blend import Blend, BlendState, window_count
from megatron_doremi.data.indexed_dataset import IndexedDataset
from megatron_doremi.data.loader import StepReader, steps
from megatron_doremi.data.manifest import load_manifest
from megatron_doremi.mixture.static import Budget, resolve_weights
from megatron_doremi.parallel.topology import Topology
from megatron_doremi.tokenization.tokenizer import SentencePieceTokenizer

TRAIN = documents_of(2, 90)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The manifest of a data set made by the tools."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "train.jsonl").write_bytes(jsonl_of(TRAIN))
    (folder / "valid.jsonl").write_bytes(jsonl_of(documents_of(3, 20)))
    done = run(
        "train_tokenizer.py", "--input", folder / "train.jsonl", "--output", folder / "one.model", "--vocab-size", 320
    )
    assert done.returncode == 0, done.stderr
    for split in ("train", "valid"):
        flags = ["--input", folder / f"{split}.jsonl", "--split", split, "--output-dir", folder / "set"]
        done = run("preprocess_data.py", *flags, "--tokenizer-model", folder / "one.model", "--append-eod")
        assert done.returncode == 0, done.stderr
    return folder / "set" / "domains.json"


def inspect(command, data, *flags):
    done = run("inspect_data.py", command, "--domains", data, *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(command, data, *flags):
    done = run("inspect_data.py", command, "--domains", data, *flags)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_counts(data):
    rows = inspect("counts", data).splitlines()
    assert rows[0].split() == ["domain", "documents", "tokens", "bytes/token", "shortest", "median", "longest"]
    for row, domain in zip(rows[1:], load_manifest(data).domains, strict=True):
        texts = [text for text, name in TRAIN if name == domain.name]
        tokenizer = SentencePieceTokenizer(data.parent.parent / "one.model")
        lengths = sorted(len(tokenizer.encode(text)) + 1 for text in texts)
        ratio = sum(len(text.encode()) for text in texts) / sum(lengths)
        expected = [
            len(texts),
            sum(lengths),
            f"{ratio:.2f}",
            min(lengths),
            sorted(lengths)[(len(lengths) - 1) // 2],
            max(lengths),
        ]
        assert row.removeprefix(domain.name).replace(",", "").split() == [str(value) for value in expected]
    assert " - " in inspect("counts", data, "--split", "valid")


def test_documents(data):
    output = inspect("documents", data, "--domain", "Books", "--first", 3, "--count", 2)
    books = [text for text, name in TRAIN if name == "Books"]
    for number in (3, 4):
        assert f"== Books, train, document {number}: " in output
        assert books[number].strip() in output
    assert "document 5" not in output
    assert "'Books'" in refused("documents", data, "--domain", "books")
    assert "--first, --count" in refused("documents", data, "--domain", "Books", "--first", 1_000)


@pytest.mark.parametrize(("number", "setting"), [(0, "natural"), (5, "temperature:2"), (1_234, "unimax")])
def test_window(number, setting, data):
    """Compares with the sample that training's own loader reads."""
    manifest = load_manifest(data)
    datasets = [IndexedDataset(domain.train) for domain in manifest.domains]
    sizes = tuple(window_count(dataset.num_tokens, 16) for dataset in datasets)
    # Reads all text of three domains except a few windows of the largest.
    train_iters = sum(sizes) // 6
    budget = Budget(train_iters * 6 * 16, [16 * size for size in sizes], 1.0)
    weights = resolve_weights(setting, manifest, False, budget=budget)
    assert len({*weights}) > 1
    blend = Blend(manifest.names, sizes, 6, 77)
    reader = StepReader(blend, datasets, (6, 16), Topology())
    stream = steps(reader, BlendState.start(len(sizes)), lambda step: weights, ahead=False)
    step = next(islice(stream, number // 6, None))
    row, place = step.micro_batches[0], number % 6
    ids = [*row.tokens[place].tolist(), row.targets[place, -1].item()]
    flags = ["--seq-length", 16, "--global-batch-size", 6, "--seed", 77, "--domain-weights", setting]
    flags += ["--train-iters", train_iters, "--max-epochs-per-domain", 1]
    first, text = inspect("window", data, "--number", number, *flags).split("\n", 1)
    assert f"sample {number:,}: step {number // 6 + 1:,}, row {place}; " in first
    assert f"{manifest.names[row.domains[place]]}, window {row.windows[place].item():,} of " in first
    assert text.removesuffix("\n") == SentencePieceTokenizer(data.parent.parent / "one.model").decode(ids)


def test_window_refuses_what_training_refuses(data):
    assert "--number" in refused("window", data, "--number", -1, "--seq-length", 16, "--global-batch-size", 6)
    message = refused("window", data, "--number", 1, "--seq-length", 100_000, "--global-batch-size", 6)
    assert "lower --seq-length" in message


@pytest.fixture
def copy(data, tmp_path):
    return shutil.copytree(data.parent, tmp_path / "copy") / "domains.json"


def test_verify_accepts_an_intact_data_set(copy):
    listing = copy.parent / "SHA256SUMS"
    output = inspect("verify", copy, "--write-checksums", listing)
    assert output.startswith("verified: 18 files of 3 domains, ")
    assert len(listing.read_text().splitlines()) == 18
    inspect("verify", copy, "--checksums", listing)


def damage_id(copy):
    path = copy.parent / "Books_train.bin"
    path.write_bytes(path.read_bytes()[:-2] + (999).to_bytes(2, "little"))


def damage_counts(copy):
    entry = json.loads(copy.read_text())
    entry["domains"][0]["documents"] += 1
    copy.write_text(json.dumps(entry))


def damage_sizes(copy, split, sign):
    """Changes the size of the first document: one byte more, or none."""
    sizes = np.fromfile(copy.parent / f"Books_{split}.bytes", "<u4")
    sizes[0] = sizes[0] + 1 if sign > 0 else 0
    sizes.tofile(copy.parent / f"Books_{split}.bytes")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_id, ["Books_train.bin", "id 999 at token"]),
        (damage_counts, ["Books_train", "as in the manifest"]),
        (lambda copy: (copy.parent / "Books_valid.idx").unlink(), ["Books_valid.idx", "no such file"]),
        (lambda copy: damage_sizes(copy, "train", 1), ["Books_train.bytes", "as in the manifest"]),
        (lambda copy: damage_sizes(copy, "valid", -1), ["Books_valid.bytes", "document 0 has 0 bytes"]),
        (lambda copy: (copy.parent / "Books_valid.bytes").write_bytes(b"1"), ["Books_valid.bytes", "1 bytes"]),
    ],
)
def test_verify_reports_damage(damage, words, copy):
    damage(copy)
    message = refused("verify", copy)
    assert all(word in message for word in words)


def test_data_of_version_0_1_without_sizes_are_verified(copy):
    for path in copy.parent.glob("*.bytes"):
        path.unlink()
    assert "6 pairs have no PREFIX.bytes" in inspect("verify", copy)


def test_only_a_checksum_detects_another_valid_id(copy):
    listing = copy.parent / "SHA256SUMS"
    inspect("verify", copy, "--write-checksums", listing)
    path = copy.parent / "Books_train.bin"
    path.write_bytes(b"\x05\x00" + path.read_bytes()[2:])
    inspect("verify", copy)
    message = refused("verify", copy, "--checksums", listing)
    assert "1 fault" in message
    assert "Books_train.bin" in message


def test_another_tokenizer_is_refused(copy):
    model = next(copy.parent.glob("tokenizer-*.model"))
    text = copy.read_text()
    sha256 = json.loads(text)["tokenizer"]["sha256"]
    copy.write_text(text.replace(sha256, "0" * 64))
    assert model.name in refused("verify", copy)
    assert "the tokenizer that encoded the data" in refused("documents", copy, "--domain", "Books")


@pytest.mark.parametrize(
    "make",
    [
        lambda copy: copy,
        lambda copy: copy.parent / "Books_train.bin",
        lambda copy: copy.parent / ".." / copy.parent.name / "Books_valid.idx",
        lambda copy: next(copy.parent.glob("tokenizer-*.model")),
        lambda copy: copy.parent / "link",
        lambda copy: copy.parent / "notes.txt",
        lambda copy: copy.parent / "empty",
        lambda copy: copy.parent / "half",
        lambda copy: copy.parent / "elsewhere" / "SHA256SUMS",
        lambda copy: copy.parent,
    ],
)
def test_checksums_overwrite_no_other_file(make, copy):
    """Version 0.1 overwrote the manifest."""
    (copy.parent / "link").symlink_to(copy)
    (copy.parent / "notes.txt").write_text("mine\n")
    (copy.parent / "empty").write_text("")
    (copy.parent / "half").write_text("a" * 64 + "  Books_train.bin\nmine\n")
    before = {path.name: path.read_bytes() for path in copy.parent.iterdir()}
    message = refused("verify", copy, "--write-checksums", make(copy))
    assert "--write-checksums" in message
    assert "1 fault" in message
    assert {path.name: path.read_bytes() for path in copy.parent.iterdir()} == before


def test_an_earlier_checksum_file_is_overwritten_even_through_a_link(copy):
    listing = copy.parent / "SHA256SUMS"
    inspect("verify", copy, "--write-checksums", listing)
    first = listing.read_text()
    listing.write_text(first.splitlines()[0])
    (copy.parent / "link").symlink_to(listing)
    inspect("verify", copy, "--write-checksums", copy.parent / "link")
    assert listing.read_text() == first
    assert (copy.parent / "link").is_symlink()


def test_numbers_out_of_range_are_refused(data):
    flags = ["--number", 10**18, "--seq-length", 10**12, "--global-batch-size", 10**9, "--seed", -1]
    message = refused("window", data, *flags)
    for flag in flags[::2]:
        assert flag in message
    assert "4 faults" in message


def test_a_manifest_whose_vocabulary_differs_from_its_tokenizer_is_refused(copy):
    """Ids outside the tokenizer's vocabulary ended in a traceback."""
    entry = json.loads(copy.read_text())
    entry["tokenizer"]["vocab_size"] += 1
    copy.write_text(json.dumps(entry))
    damage_last = copy.parent / "Books_train.bin"
    damage_last.write_bytes(
        damage_last.read_bytes()[:-2] + (entry["tokenizer"]["vocab_size"] - 1).to_bytes(2, "little")
    )
    for command, *flags in (("documents", "--domain", "Books"), ("verify",)):
        assert "vocab_size 321" in refused(command, copy, *flags)


def test_warnings_of_the_manifest_are_printed(copy):
    entry = json.loads(copy.read_text())
    entry["domains"][0]["valid"] = entry["domains"][0]["train"]
    copy.write_text(json.dumps(entry))
    done = run("inspect_data.py", "counts", "--domains", copy)
    assert done.returncode == 0
    assert "warning: " in done.stderr
    assert "held-out loss is a training loss" in done.stderr


def test_tools_overwrite_no_file_of_another_kind(copy, tmp_path):
    """A tokenizer does not replace a manifest, and a manifest does not replace a list of domains."""
    before, source = copy.read_bytes(), tmp_path / "one.jsonl"
    source.write_bytes(jsonl_of(TRAIN[:3]))
    done = run("train_tokenizer.py", "--input", source, "--output", copy, "--vocab-size", 300)
    assert done.returncode == 2
    assert "already exists" in done.stderr
    assert copy.read_bytes() == before
    out = tmp_path / "out"
    out.mkdir()
    (out / "domains.json").write_text('{"format": "megatron-doremi-domain-list/1", "domains": ["Books"]}')
    model = next(copy.parent.glob("tokenizer-*.model"))
    flags = ["--input", source, "--output-dir", out, "--tokenizer-model", model]
    done = run("preprocess_data.py", *flags)
    assert done.returncode == 2
    assert "megatron-doremi-domain-list/1" in done.stderr
    assert [path.name for path in out.iterdir()] == ["domains.json"]
