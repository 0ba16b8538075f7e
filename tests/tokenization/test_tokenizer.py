"""Tokenizers from tools/train_tokenizer.py are lossless; wrong input is refused.

Run alone: python -m pytest tests/tokenization/test_tokenizer.py
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import unwrapped

from megatron_doremi.errors import ConfigError
from megatron_doremi.preprocessing.domain_samples import DomainSamples
from megatron_doremi.storage.files import sha256_of
from megatron_doremi.tokenization.tokenizer import SentencePieceTokenizer, load_tokenizer

TOOL = Path(__file__).resolve().parents[2] / "tools" / "train_tokenizer.py"
VOCABULARY = 400


def sample_lines():
    """Documents of two domains: words of random syllables, with newlines and numbers between them."""
    generator = random.Random(5)
    syllables = ["ta", "ri", "mon", "el", "shu", "pra", "ke", "dor", "in", "os", "ly", "ber"]
    lines = []
    for number in range(120):
        words = ["".join(generator.choices(syllables, k=generator.randint(1, 3))) for _ in range(150)]
        text = " ".join(words).replace("los ", "los.\n\n").replace("ber ", f"ber {number}, ")
        lines.append(json.dumps({"text": text, "meta": {"pile_set_name": ("Tales", "Letters")[number % 2]}}))
    return "\n".join(lines) + "\n"


def train(folder, *options, name="tokenizer.model", vocabulary=VOCABULARY, source="sample.jsonl"):
    command = [sys.executable, TOOL, "--input", folder / source, "--output", folder / name]
    command += ["--vocab-size", vocabulary, *options]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=120)
    done.stderr = unwrapped(done.stderr)
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a text sample and the tokenizer trained on it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "sample.jsonl").write_text(sample_lines())
    done = train(folder)
    assert done.returncode == 0, done.stderr
    assert "2 domains" in done.stdout
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return SentencePieceTokenizer(folder / "tokenizer.model")


AWKWARD = [
    "",
    " ",
    "   ",
    "\n",
    "\n\n\n",
    "\t",
    "\ttabs\t\there\t",
    "\r\n",
    "line one\r\nline two\r\n",
    "old mac\rline",
    " leading",
    "trailing ",
    "  two leading and two trailing  ",
    "double  spaces   inside",
    "newline\n indented\n\n  more \n",
    "ends with a newline\n",
    "\u00a0no-break\u2003em space\u200bzero width\ufeff",
    "emoji \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
    "caf\u00e9 cafe\u0301 \ufb01 \u2460 \uff21",
    "\u4f60\u597d \u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd",
    "digits 1234567890 3.14 1,000",
    "</s>",
    "<unk>",
    "<s><pad>",
    "<0x0A>",
    "a</s>b <unk> c<0x0A>d<0xFF>",
    "control \x01\x02\x7f\x1b[0m",
    "\U0010ffff\ud7ff\ue000",
    "x" * 5000,
    ("long line " * 3000) + "\n",
]


@pytest.mark.parametrize("text", AWKWARD, ids=range(len(AWKWARD)))
def test_decoding_inverts_encoding(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_nul_is_kept(tokenizer):
    """NUL ends a C string; it must not end a document."""
    assert tokenizer.decode(tokenizer.encode("before\0after\0")) == "before\0after\0"


def test_u2581_is_the_only_exception(tokenizer):
    """SentencePiece stores spaces as U+2581, so it cannot distinguish the two."""
    assert tokenizer.decode(tokenizer.encode("a\u2581b")) == "a b"


@given(st.text(st.characters(codec="utf-8", exclude_characters="\u2581"), max_size=80))
@settings(max_examples=300, deadline=None)
def test_decoding_inverts_encoding_of_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_is_never_encoded_as_the_end_of_document(tokenizer):
    """Nor as the unknown piece: bytes stand in for unknown characters."""
    for text in [*AWKWARD, "</s>" * 50, "before</s>after", " </s> ", "\u2581</s>"]:
        ids = tokenizer.encode(text)
        assert tokenizer.eod not in ids
        assert 0 not in ids
        assert ((ids >= 0) & (ids < tokenizer.vocab_size)).all()


def test_batch_equals_one_by_one(tokenizer):
    assert tokenizer.encode_batch([]) == []
    for text, ids in zip(AWKWARD, tokenizer.encode_batch(AWKWARD), strict=True):
        assert ids.dtype == np.int32
        assert np.array_equal(ids, tokenizer.encode(text))


def test_ids_of_a_document_do_not_depend_on_its_neighbors(tokenizer):
    together = tokenizer.encode_batch(["one text", "another"])
    assert np.array_equal(together[1], tokenizer.encode_batch(["another"])[0])


def test_attributes_of_the_tokenizer(folder, tokenizer):
    assert tokenizer.vocab_size == VOCABULARY
    assert tokenizer.eod == 1
    assert tokenizer.sha256 == sha256_of(folder / "tokenizer.model")
    assert load_tokenizer("SentencePieceTokenizer", folder / "tokenizer.model").sha256 == tokenizer.sha256


def test_text_like_the_sample_takes_fewer_ids_than_bytes(tokenizer):
    text = "tarimon elshupra kedor inos lyber " * 20
    assert len(tokenizer.encode(text)) < len(text) / 1.8


def test_training_twice_gives_the_same_bytes(folder):
    assert train(folder, name="again.model").returncode == 0
    assert (folder / "again.model").read_bytes() == (folder / "tokenizer.model").read_bytes()


def test_bpe_model_is_lossless_too(folder):
    done = train(folder, "--model-type", "bpe", name="bpe.model")
    assert done.returncode == 0, done.stderr
    bpe = SentencePieceTokenizer(folder / "bpe.model")
    for text in AWKWARD:
        assert bpe.decode(bpe.encode(text)) == text
        assert bpe.eod not in bpe.encode(text)


def fails(done, *words):
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def test_unknown_file_type_is_refused(folder, tmp_path):
    (tmp_path / "sample.txt").write_text(sample_lines())
    fails(train(tmp_path, source="sample.txt"), "sample.txt", ".jsonl.zst")


def test_missing_input_is_refused(tmp_path):
    fails(train(tmp_path), "sample.jsonl", "an existing file")


@pytest.mark.parametrize("vocabulary", [100_000, 100, 0, -5])
def test_vocabulary_that_cannot_be_filled_is_refused(folder, vocabulary):
    fails(train(folder, name="never.model", vocabulary=vocabulary), "--vocab-size", str(vocabulary))
    assert not (folder / "never.model").exists()


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("{not json}", "not JSON"),
        ('{"text": 5, "meta": {"pile_set_name": "Tales"}}', "'text' is not text"),
        ('{"meta": {"pile_set_name": "Tales"}}', "no key 'text'"),
        ('{"text": "x", "meta": {}}', "no key 'meta.pile_set_name'"),
        ('{"text": "\\ud800", "meta": {"pile_set_name": "Tales"}}', "surrogate"),
    ],
)
def test_bad_line_is_reported(tmp_path, line, word):
    (tmp_path / "sample.jsonl").write_text(sample_lines().split("\n")[0] + "\n" + line + "\n")
    fails(train(tmp_path), "sample.jsonl, line 2", word)
    assert [path.name for path in tmp_path.iterdir()] == ["sample.jsonl"]


def test_input_without_documents_is_refused(tmp_path):
    (tmp_path / "sample.jsonl").write_text("\n\n")
    fails(train(tmp_path), "no documents")


def test_sample_too_small_to_learn_from_is_refused(tmp_path):
    """An empty document, and a sample of less than one byte per domain."""
    (tmp_path / "sample.jsonl").write_text('{"text": "", "meta": {"pile_set_name": "Tales"}}\n')
    fails(train(tmp_path), "--vocab-size")
    (tmp_path / "sample.jsonl").write_text(sample_lines())
    fails(train(tmp_path, "--sample-bytes", 1), "--vocab-size")


@pytest.mark.parametrize("name", ["t.model", "t.json"])
def test_text_that_is_too_small_for_the_vocabulary_reports_the_possible_size(tmp_path, name):
    """Version 0.1 silently made a smaller byte-level BPE, and passed on an internal error of SentencePiece."""
    line = json.dumps({"text": "abc def ghi abc abd " * 30, "meta": {"pile_set_name": "Tales"}})
    (tmp_path / "sample.jsonl").write_text(f"{line}\n")
    done = train(tmp_path, name=name, vocabulary=5000)
    fails(done, "--vocab-size: 5000", "--allow-smaller", "at most ")
    assert "trainer_interface" not in done.stderr
    reached = int(re.search(r"give --vocab-size (\d+),", done.stderr)[1])
    done = train(tmp_path, "--allow-smaller", name=name, vocabulary=5000)
    assert done.returncode == 0, done.stderr
    assert f"only {reached} pieces instead of 5,000" in done.stdout
    allowed = (tmp_path / name).read_bytes()
    done = train(tmp_path, name=name, vocabulary=reached)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / name).read_bytes() == allowed
    kind = "SentencePieceTokenizer" if name == "t.model" else "HuggingFaceTokenizer"
    assert load_tokenizer(kind, tmp_path / name).vocab_size == reached


def test_the_sample_does_not_depend_on_when_domains_first_appear():
    """Compares with an oracle that keeps all documents, as version 0.1 did."""
    generator = random.Random(3)
    offered = []
    samples = DomainSamples(20_000)
    for number in range(3000):
        # New domains keep appearing; some documents are longer than the entire sample.
        domain = str(int(number**0.5) if number % 2 else 0)
        text = generator.randbytes(generator.choice([40, 100, 700, 30_000 if number % 50 == 0 else 200]))
        offered.append((domain, generator.getrandbits(64), text))
        samples.offer(*offered[-1])
        assert sum(sample.size for sample in samples._samples.values()) <= 3 * 20_000
    names = sorted({domain for domain, _, _ in offered})
    expected = []
    for name in names:
        left = 20_000 // len(names)
        for _, text in sorted((order, text) for domain, order, text in offered if domain == name):
            expected += [text[:left]] if left else []
            left -= len(text[:left])
    assert samples.names == names
    assert list(samples.documents()) == expected


@pytest.mark.parametrize(("domains", "size"), [(1, 1), (20_000, 40), (1, 2_000_000), (3, 0)])
def test_the_sample_takes_bounded_memory(domains, size):
    """Many tiny documents, many domains, documents larger than the sample. Version 0.1 kept a sample per domain."""
    samples = DomainSamples(100_000)
    tracemalloc.start()
    for number in range(40 if size > 1000 else 60_000):
        samples.offer(str(number % domains), random.Random(number).getrandbits(64) if size else 0, b"x" * size)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000 * 12 + domains * 600 + 2 * size
    assert sum(map(len, samples.documents())) <= max(100_000, domains)


def test_numbers_out_of_range_are_refused(folder):
    done = train(folder, "--sample-bytes", 0, "--threads", -1, name="never.model", vocabulary=10**12)
    fails(done, "--sample-bytes: 0", "--threads: -1", f"--vocab-size: {10**12}", "3 faults")


def test_output_with_another_suffix_is_refused(folder):
    fails(train(folder, name="tokenizer.txt"), "tokenizer.txt", ".model or .json")


def test_output_below_a_file_is_refused(folder):
    fails(train(folder, name="sample.jsonl/below.model"), "--output", "sample.jsonl")


def test_file_that_is_not_a_model_is_refused(tmp_path):
    for path in (tmp_path / "no.model", tmp_path / "junk.model", tmp_path / "empty.model", tmp_path):
        if path.name == "junk.model":
            path.write_bytes(b"this is not a model")
        if path.name == "empty.model":
            path.write_bytes(b"")
        with pytest.raises(ConfigError, match="--tokenizer-model"):
            SentencePieceTokenizer(path)


def test_unknown_tokenizer_type_is_refused(folder):
    with pytest.raises(ConfigError, match="SentencePieceTokenizer, HuggingFaceTokenizer, GPT2BPETokenizer"):
        load_tokenizer("BertWordPiece", folder / "tokenizer.model")
