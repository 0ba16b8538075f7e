"""tools/embedded_corpus.py: real text without a download, deterministic, with two planted domains.

Run alone: python -m pytest tests/preprocessing/test_embedded_corpus.py
"""

from __future__ import annotations

import json
import math
import re
import string
import subprocess
import sys
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import pytest

from megatron_doremi.preprocessing.documents import DocumentReader, DomainKey

TOOL = Path(__file__).resolve().parents[2] / "tools" / "embedded_corpus.py"
SIZE = 60_000
NATURAL = {"Python source", "C++ headers", "GPU kernels", "Docstrings", "Mathematics", "Type stubs"}
PLANTED = {"noise", "boilerplate"}

READER = DocumentReader("text", DomainKey("meta.pile_set_name"))


def gather(folder, *words):
    command = [sys.executable, TOOL, "--output-dir", folder, *words]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The folder of a corpus of which a fifth is held out."""
    folder = tmp_path_factory.mktemp("corpus")
    done = gather(folder / "one", "--domain-bytes", SIZE, "--valid-fraction", "0.2")
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    return folder


@pytest.fixture(scope="module")
def splits(corpus):
    """The texts of each domain in each split."""
    texts = {}
    for split in ("train", "valid"):
        texts[split] = defaultdict(list)
        for line in (corpus / "one" / f"{split}.jsonl").read_bytes().splitlines():
            document = READER.read(json.loads(line), "")
            texts[split][document.domain].append(document.text)
    return texts


def test_lines_have_the_format_of_the_pile(corpus):
    assert sorted(path.name for path in (corpus / "one").iterdir()) == ["train.jsonl", "valid.jsonl"]
    for split in ("train", "valid"):
        data = (corpus / "one" / f"{split}.jsonl").read_bytes()
        assert data.endswith(b"\n")
        for line in data.splitlines():
            record = json.loads(line)
            assert set(record) == {"text", "meta"}
            assert set(record["meta"]) == {"pile_set_name"}


def test_domains_are_the_six_natural_and_the_two_planted(splits):
    assert set(splits["train"]) == NATURAL | PLANTED
    assert set(splits["valid"]) <= NATURAL | PLANTED


def test_each_domain_has_about_the_requested_bytes(splits):
    """The last document may exceed them; none is longer than 4,000 characters."""
    for domain in NATURAL | PLANTED:
        texts = splits["train"][domain] + splits["valid"][domain]
        size = SIZE // 2 if domain in PLANTED else SIZE
        assert size <= sum(len(text.encode()) for text in texts) <= size + 4 * 4000
        assert all(200 <= len(text) <= 4000 for text in texts)


def test_the_printed_table_matches_the_files(corpus, splits):
    table = (corpus / "stdout").read_text()
    for domain in NATURAL | PLANTED:
        train, valid = splits["train"][domain], splits["valid"][domain]
        size = sum(len(text.encode()) for text in train + valid)
        row = re.search(rf"^{re.escape(domain)}\s+(\S+)\s+(\S+)\s+(\S+)$", table, re.MULTILINE)
        assert row.groups() == (f"{len(train) + len(valid):,}", f"{size:,}", f"{len(valid):,}")


def test_no_text_is_in_both_splits_or_duplicated(splits):
    held_out = [text for texts in splits["valid"].values() for text in texts]
    trained = [text for texts in splits["train"].values() for text in texts]
    assert held_out
    assert not set(held_out) & set(trained)
    for domain in NATURAL:
        texts = ["".join(text.split()) for text in splits["train"][domain] + splits["valid"][domain]]
        assert len(texts) == len(set(texts))


def test_about_the_requested_fraction_is_held_out(splits):
    trained, held_out = (sum(map(len, splits[split].values())) for split in ("train", "valid"))
    assert 0.08 < held_out / (trained + held_out) < 0.35


def test_domains_are_shuffled_together(splits, corpus):
    lines = (corpus / "one" / "train.jsonl").read_text().splitlines()
    domains = [json.loads(line)["meta"]["pile_set_name"] for line in lines]
    changes = sum(a != b for a, b in pairwise(domains))
    assert changes > len(domains) / 2


def test_a_second_run_gives_the_same_bytes(corpus):
    words = ["--domain-bytes", SIZE, "--valid-fraction", "0.2"]
    assert gather(corpus / "two", *words).returncode == 0
    for name in ("train.jsonl", "valid.jsonl"):
        assert (corpus / "two" / name).read_bytes() == (corpus / "one" / name).read_bytes()


def test_noise_is_uniform_over_its_symbols(splits):
    """Its entropy is within 1 % of the maximum for 95 symbols, and no pair of symbols is frequent."""
    text = "".join(splits["train"]["noise"] + splits["valid"]["noise"])
    symbols = string.ascii_letters + string.digits + string.punctuation + " "
    counts = Counter(text)
    assert set(counts) == set(symbols)
    entropy = -sum(n / len(text) * math.log2(n / len(text)) for n in counts.values())
    assert entropy > 0.99 * math.log2(len(symbols))
    pairs = Counter(pairwise(text))
    assert max(pairs.values()) < 10 * len(text) / len(symbols) ** 2


def test_boilerplate_is_one_sentence_with_a_counter(splits):
    sentence = r"Order (\d+) was received\. Thank you for your order; it will be sent within 3 working days\."
    for text in splits["train"]["boilerplate"] + splits["valid"]["boilerplate"]:
        lines = text.splitlines()
        numbers = [int(re.fullmatch(sentence, line).group(1)) for line in lines]
        assert numbers == list(range(numbers[0], numbers[0] + 20))


def test_natural_domains_contain_what_their_names_say(splits):
    marks = {
        "Python source": r"^\s*(def|class|import) ",
        "C++ headers": r"#include|namespace|#pragma once",
        "GPU kernels": r"#include|__global__|template|void",
        "Docstrings": r"Parameters|Args|Returns|Return",
        "Mathematics": r"sympy|>>> |\^|\*\*",
        "Type stubs": r"def \w+\(.*|: \.\.\.|import ",
    }
    for domain, mark in marks.items():
        texts = splits["train"][domain]
        assert sum(bool(re.search(mark, text, re.MULTILINE)) for text in texts) > len(texts) / 2, domain


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["--domain-bytes", "9999"], "--domain-bytes: 9999"),
        (["--valid-fraction", "0"], "--valid-fraction: 0.0"),
        (["--valid-fraction", "1"], "--valid-fraction: 1.0"),
        (["--valid-fraction", "nan"], "--valid-fraction: nan"),
    ],
)
def test_wrong_numbers_are_refused(tmp_path, words, flag):
    done = gather(tmp_path / "out", *words)
    assert done.returncode == 2
    assert flag in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
