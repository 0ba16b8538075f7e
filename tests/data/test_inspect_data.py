"""tools/inspect_data.py: what it shows is what was put in and what training reads; damage is found and named.

Run alone: python -m pytest tests/data/test_inspect_data.py
"""

from __future__ import annotations

import json
import shutil
from itertools import islice

import pytest
from data.test_preprocess import documents_of, jsonl_of, run

from megatron_doremi.data.blend import Blend, BlendState, window_count
from megatron_doremi.data.indexed_dataset import IndexedDataset
from megatron_doremi.data.loader import steps
from megatron_doremi.data.manifest import load_manifest
from megatron_doremi.data.tokenizer import SentencePieceTokenizer

TRAIN = documents_of(2, 90)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data set made by the tools."""
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
    said = inspect("documents", data, "--domain", "Books", "--first", 3, "--count", 2)
    books = [text for text, name in TRAIN if name == "Books"]
    for number in (3, 4):
        assert f"== Books, train, document {number}: " in said
        assert books[number].strip() in said
    assert "document 5" not in said
    assert "'Books'" in refused("documents", data, "--domain", "books")
    assert "--first, --count" in refused("documents", data, "--domain", "Books", "--first", 1_000)


@pytest.mark.parametrize("number", [0, 5, 1_234])
def test_window(number, data):
    """The sample that training reads, found here by training's own loader."""
    manifest = load_manifest(data)
    datasets = [IndexedDataset(domain.train) for domain in manifest.domains]
    sizes = tuple(window_count(dataset.num_tokens, 16) for dataset in datasets)
    weights = manifest.natural_weights()
    blend = Blend(manifest.names, sizes, 6, 77)
    reader = steps(blend, datasets, lambda: weights, BlendState.start(len(sizes)), 16, 6, 0, 1, True, ahead=False)
    step = next(islice(reader, number // 6, None))
    row, place = step.micro_batches[0], number % 6
    ids = [*row.tokens[place].tolist(), row.targets[place, -1].item()]
    flags = ["--seq-length", 16, "--global-batch-size", 6, "--seed", 77, "--domain-weights", "natural"]
    first, text = inspect("window", data, "--number", number, *flags).split("\n", 1)
    assert f"sample {number:,}: step {number // 6 + 1:,}, place {place}; " in first
    assert f"{manifest.names[row.domains[place]]}, window {row.windows[place].item():,} of " in first
    assert text.removesuffix("\n") == SentencePieceTokenizer(data.parent.parent / "one.model").decode(ids)


def test_window_refuses_what_training_refuses(data):
    assert "--number" in refused("window", data, "--number", -1, "--seq-length", 16, "--global-batch-size", 6)
    said = refused("window", data, "--number", 1, "--seq-length", 100_000, "--global-batch-size", 6)
    assert "lower --seq-length" in said


@pytest.fixture
def copy(data, tmp_path):
    return shutil.copytree(data.parent, tmp_path / "copy") / "domains.json"


def test_verify_a_whole_set(copy):
    listing = copy.parent / "SHA256SUMS"
    said = inspect("verify", copy, "--write-checksums", listing)
    assert said.startswith("whole: 12 files of 3 domains, ")
    assert len(listing.read_text().splitlines()) == 12
    inspect("verify", copy, "--checksums", listing)


def damage_id(copy):
    path = copy.parent / "Books_train.bin"
    path.write_bytes(path.read_bytes()[:-2] + (999).to_bytes(2, "little"))


def damage_counts(copy):
    entry = json.loads(copy.read_text())
    entry["domains"][0]["documents"] += 1
    copy.write_text(json.dumps(entry))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_id, ["Books_train.bin", "id 999 at token"]),
        (damage_counts, ["Books_train", "the manifest's"]),
        (lambda copy: (copy.parent / "Books_valid.idx").unlink(), ["Books_valid.idx", "no such file"]),
    ],
)
def test_verify_names_the_damage(damage, words, copy):
    damage(copy)
    said = refused("verify", copy)
    assert all(word in said for word in words)


def test_verify_sees_another_id_by_its_checksum_alone(copy):
    listing = copy.parent / "SHA256SUMS"
    inspect("verify", copy, "--write-checksums", listing)
    path = copy.parent / "Books_train.bin"
    path.write_bytes(b"\x05\x00" + path.read_bytes()[2:])
    inspect("verify", copy)
    said = refused("verify", copy, "--checksums", listing)
    assert "1 fault" in said
    assert "Books_train.bin" in said


def test_another_tokenizer_is_refused(copy):
    model = next(copy.parent.glob("tokenizer-*.model"))
    text = copy.read_text()
    sha256 = json.loads(text)["tokenizer"]["sha256"]
    copy.write_text(text.replace(sha256, "0" * 64))
    assert model.name in refused("verify", copy)
    assert "the one that made the ids" in refused("documents", copy, "--domain", "Books")
