"""Byte-level BPE: both encoders give the ids of the tokenizers library, and special tokens in text stay text.

Run alone: python -m pytest tests/tokenization/test_byte_level.py
"""

from __future__ import annotations

import json
import os

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenization.test_tokenizer import AWKWARD, sample_lines, train
from tokenizers import Regex, Tokenizer

from megatron_doremi.errors import ConfigError
from megatron_doremi.tokenization import byte_level
from megatron_doremi.tokenization.tokenizer import GPT2, HUGGING_FACE, HuggingFaceTokenizer, load_tokenizer

SPECIAL = "<|endoftext|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a text sample and a tokenizer.json trained on it."""
    folder = tmp_path_factory.mktemp("byte-level")
    (folder / "sample.jsonl").write_text(sample_lines())
    done = train(folder, name="tokenizer.json", vocabulary=600)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def definition(folder):
    return json.loads((folder / "tokenizer.json").read_text())


@pytest.fixture(scope="module")
def fast(folder):
    tokenizer = load_tokenizer(HUGGING_FACE, folder / "tokenizer.json")
    tokenizer.choose_encoder(AWKWARD)
    assert tokenizer.encoder == "tiktoken"
    return tokenizer


@pytest.fixture(scope="module")
def oracle(folder):
    """The tokenizers library itself, which encodes special tokens as text."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def of(definition, folder, kind=HUGGING_FACE, **options):
    return HuggingFaceTokenizer(byte_level.as_bytes(definition), folder / "made.json", kind, **options)


@pytest.mark.parametrize("text", [*AWKWARD, f"a{SPECIAL}b", SPECIAL * 3], ids=range(len(AWKWARD) + 2))
def test_ids_of_awkward_text_equal_the_librarys(fast, oracle, text):
    assert fast.encode(text).tolist() == oracle(text)
    assert fast.decode(fast.encode(text)) == text
    assert fast.eod not in fast.encode(text)


@given(st.text(st.characters(codec="utf-8"), max_size=60))
@settings(max_examples=400, deadline=None)
def test_ids_of_any_text_equal_the_librarys(fast, oracle, text):
    assert fast.encode(text).tolist() == oracle(text)


@given(st.text("tarimonel shu'sdt \n\t12.", max_size=200))
@settings(max_examples=400, deadline=None)
def test_ids_of_text_like_the_sample_equal_the_librarys(fast, oracle, text):
    assert fast.encode(text).tolist() == oracle(text)


def test_both_encoders_give_the_same_ids_for_batches(fast, folder):
    slow = load_tokenizer(HUGGING_FACE, folder / "tokenizer.json", fast=False)
    assert slow.encoder == "tokenizers"
    for one, other in zip(fast.encode_batch(AWKWARD), slow.encode_batch(AWKWARD), strict=True):
        assert one.tolist() == other.tolist()


@pytest.mark.parametrize("run", [" ", "\n", "\t ", "\u3000"])
def test_runs_of_spaces_that_overflow_tiktokens_engine(fast, oracle, run):
    text = run * (1_200_000 // len(run)) + "end"
    assert fast.encode(text).tolist() == oracle(text)


def test_character_classes_are_compared_one_by_one(monkeypatch):
    assert byte_level.same_classes(byte_level.GPT2_PATTERN)
    assert byte_level.same_classes(r"\p{Lu}\d\S")
    # The engines really differ here: they disagree on which marks are word characters.
    assert not byte_level.same_classes(r"\w")
    other = {r"\p{L}": r"(?!\x{1e9e})\p{L}"}
    monkeypatch.setattr(byte_level, "Regex", lambda name: Regex(other.get(name, name)))
    assert byte_level.same_classes(r"\p{N}\s")
    assert not byte_level.same_classes(byte_level.GPT2_PATTERN)


# --- tokenizers for which tiktoken would give other ids


def changed(definition, **model):
    copy = json.loads(json.dumps(definition))
    copy["model"].update(model)
    return copy


def diverging(definition):
    """A BPE that encodes 'abc' as 'a' 'bc' by merges, but as 'abc' by ranks."""
    alphabet = sorted(byte_level.byte_alphabet())
    vocab = {character: number for number, character in enumerate(alphabet)}
    merges = [["b", "c"], ["a", "b"], ["ab", "c"]]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    return changed(definition, vocab={SPECIAL: len(vocab), **vocab}, merges=merges) | {"added_tokens": []}


def test_a_vocabulary_on_which_the_encoders_differ_is_detected(definition, folder, monkeypatch):
    tokenizer = of(diverging(definition), folder, eod=0)
    assert tokenizer.encoder == "tokenizers"
    assert len(tokenizer.encode("abc")) == 2
    # They do differ: without the check of each piece, tiktoken encodes the text as one id.
    made = diverging(definition)

    class EveryPieceIsOneToken:
        class model:
            tokenize = staticmethod(lambda piece: [type("Piece", (), {"id": made["model"]["vocab"][piece]})])

    core = byte_level.tiktoken_core(EveryPieceIsOneToken, made)
    assert len(byte_level.encode(core, "abc")) == 1
    assert not byte_level.same_encoding(core, Tokenizer.from_str(json.dumps(made)), ["abc"])


def test_merges_that_precede_their_parts_are_detected(definition, folder):
    merges = list(reversed(definition["model"]["merges"]))
    assert of(changed(definition, merges=merges), folder).encoder == "tokenizers"


def swapped(definition):
    """Swaps the ids of the first two merges, so that as ranks they are in the wrong order."""
    vocab = dict(definition["model"]["vocab"])
    first, second = ("".join(merge) for merge in definition["model"]["merges"][:2])
    vocab[first], vocab[second] = vocab[second], vocab[first]
    return changed(definition, vocab=vocab)


OTHERS = {
    "ids against the order of merges": swapped,
    "normalizer": lambda d: d | {"normalizer": {"type": "NFC"}},
    "prefix space": lambda d: d | {"pre_tokenizer": d["pre_tokenizer"] | {"add_prefix_space": True}},
    "no words": lambda d: d | {"pre_tokenizer": d["pre_tokenizer"] | {"use_regex": False}},
    "matched token": lambda d: (
        d | {"added_tokens": [d["added_tokens"][0], d["added_tokens"][0] | {"content": "  ", "special": False}]}
    ),
    "dropout": lambda d: changed(d, dropout=0.1),
    "whole words first": lambda d: changed(d, ignore_merges=True),
}


@pytest.mark.parametrize("case", OTHERS)
def test_the_library_encodes_what_tiktoken_cannot(definition, folder, case):
    made = OTHERS[case](definition)
    tokenizer = of(made, folder)
    assert tokenizer.encoder == "tokenizers"
    if case != "dropout":
        plain = Tokenizer.from_str(json.dumps(made))
        plain.encode_special_tokens = True
        text = "tari  monel e\u0301 shu  "
        assert tokenizer.encode(text).tolist() == plain.encode(text, add_special_tokens=False).ids


def test_a_tokenizer_with_its_own_pattern(definition, folder):
    pattern = r"\p{N}{1,3}|[^\s\p{N}]+|\s+"
    steps = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        definition["pre_tokenizer"] | {"use_regex": False},
    ]
    made = definition | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}
    tokenizer = of(made, folder)
    tokenizer.choose_encoder(AWKWARD)
    assert tokenizer.encoder == "tiktoken"
    plain = Tokenizer.from_str(json.dumps(made))
    text = "tari12345 monel  shu\n"
    assert tokenizer.encode(text).tolist() == plain.encode(text).ids


def test_a_sample_that_is_split_differently_is_detected(definition, folder, monkeypatch):
    """A pattern of one-letter words stands in for a difference between the two regex engines."""
    monkeypatch.setattr(byte_level, "GPT2_PATTERN", byte_level.GPT2_PATTERN.replace(r" ?\p{L}+", r" ?\p{L}"))
    tokenizer = of(definition, folder)
    tokenizer.choose_encoder(["1 2 3"])
    assert tokenizer.encoder == "tiktoken"
    tokenizer.choose_encoder(["1 2 3", "tari monel"])
    assert tokenizer.encoder == "tokenizers"


# --- files


def write_gpt2(folder, definition):
    (folder / "vocab.json").write_text(json.dumps(definition["model"]["vocab"]))
    lines = [" ".join(merge) for merge in definition["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]), encoding="utf-8")


def test_gpt2s_two_files_are_one_tokenizer(definition, fast, tmp_path):
    write_gpt2(tmp_path, definition)
    tokenizer = load_tokenizer(GPT2, tmp_path / "vocab.json")
    assert (tokenizer.type, tokenizer.encoder) == (GPT2, "tiktoken")
    assert (tokenizer.vocab_size, tokenizer.eod) == (fast.vocab_size, fast.eod)
    for text in [*AWKWARD, SPECIAL]:
        assert tokenizer.encode(text).tolist() == fast.encode(text).tolist()
    # The copy beside the data is a single file and the same tokenizer.
    (tmp_path / "kept.json").write_bytes(tokenizer.data)
    again = load_tokenizer(GPT2, tmp_path / "kept.json", eod=tokenizer.eod)
    assert (again.sha256, again.eod) == (tokenizer.sha256, tokenizer.eod)
    # Merges in a file with another name.
    (tmp_path / "merges.txt").rename(tmp_path / "other.bpe")
    assert load_tokenizer(GPT2, tmp_path / "vocab.json", tmp_path / "other.bpe").sha256 == tokenizer.sha256
    with pytest.raises(ConfigError, match="--merge-file"):
        load_tokenizer(GPT2, tmp_path / "vocab.json")


def test_the_end_of_document_token_is_found_or_given(definition, folder):
    renamed = json.loads(json.dumps(definition).replace(SPECIAL, "<|over|>"))
    with pytest.raises(ConfigError, match="--eod-token"):
        of(renamed, folder)
    assert of(renamed, folder, eod="<|over|>").eod == 0
    with pytest.raises(ConfigError, match="'nothing'"):
        of(definition, folder, eod="nothing")


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff", b'{"a": "b"}', b'{"model": {"type": "BPE"}}'])
@pytest.mark.parametrize("kind", [HUGGING_FACE, GPT2])
def test_files_that_are_not_tokenizers_are_refused(tmp_path, content, kind):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"--tokenizer-model|--merge-file"):
        load_tokenizer(kind, tmp_path / "tokenizer.json")
    with pytest.raises(ConfigError, match="--tokenizer-type"):
        load_tokenizer("Another", tmp_path / "tokenizer.json")
