"""Text that spells special tokens, and characters that a tokenizer does not know, for every kind of tokenizer.

Run alone: python -m pytest tests/tokenization/test_special_tokens.py
"""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter

import pytest
import sentencepiece
from preprocessing.test_preprocess import contents, fails, jsonl_of, put, run
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from megatron_doremi.data.indexed_dataset import IndexedDataset
from megatron_doremi.data.manifest import load_manifest
from megatron_doremi.errors import ConfigError
from megatron_doremi.tokenization.byte_level import byte_alphabet
from megatron_doremi.tokenization.lost_characters import CharacterCheck, describe_lost
from megatron_doremi.tokenization.tokenizer import GPT2, HUGGING_FACE, SENTENCEPIECE, load_tokenizer

END = "<|endoftext|>"
LETTERS = "abcdefghijklmnopqrstuvwxyz<>|/[]_"


def saved(folder, tokenizer, change=lambda definition: None):
    definition = json.loads(tokenizer.to_str())
    change(definition)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(definition))
    return HUGGING_FACE, path


def byte_level(folder, merges=(), **options):
    """A byte-level BPE whose vocabulary contains END; `merges` may form parts of it."""
    vocab = {character: number for number, character in enumerate(sorted(byte_alphabet()))}
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    vocab.setdefault(END, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, list(merges), **options))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def merges_to(text):
    return [(text[:end], text[end]) for end in range(1, len(text))]


def flagged(folder):
    tokenizer = byte_level(folder)
    tokenizer.add_special_tokens([END])
    return saved(folder, tokenizer)


def added_but_not_flagged(folder):
    tokenizer = byte_level(folder)
    tokenizer.add_tokens([END])
    return saved(folder, tokenizer)


def learned(folder):
    """The merges of the model form END."""
    return saved(folder, byte_level(folder, merges_to(END)))


def whole_words_first(folder):
    return saved(folder, byte_level(folder, ignore_merges=True))


def unigram(folder):
    """Like those of T5 and XLM-R: END is flagged, and is also a piece with a score."""
    pieces = [("<unk>", 0.0), (END, 0.0), *((letter, -3.0) for letter in LETTERS + "\u2581")]
    tokenizer = Tokenizer(models.Unigram(pieces, 0, False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([END])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
    return saved(folder, tokenizer)


def words(folder):
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, END: 2, "b": 3}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return saved(folder, tokenizer)


def gpt2(folder):
    definition = json.loads(byte_level(folder, merges_to(END)).to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(definition["vocab"]))
    (folder / "merges.txt").write_text("\n".join(" ".join(merge) for merge in definition["merges"]))
    return GPT2, folder / "vocab.json"


def sentencepiece_of(folder, **options):
    model = io.BytesIO()
    text = [f"{LETTERS} {LETTERS[::-1]}"] * 20
    settings = {"vocab_size": 330, "byte_fallback": True, "normalization_rule_name": "identity"} | options
    settings |= {"add_dummy_prefix": False, "remove_extra_whitespaces": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, hard_vocab_limit=False, **settings
    )
    (folder / "t.model").write_bytes(model.getvalue())
    return SENTENCEPIECE, folder / "t.model"


def control(folder):
    return sentencepiece_of(folder, eos_piece=END)


def user_defined(folder):
    """The special tokens are user-defined symbols, which SentencePiece matches in text."""
    return sentencepiece_of(folder, user_defined_symbols=[END, "<|im_start|>", "<table>"])


def user_defined_end(folder):
    _, path = sentencepiece_of(folder, eos_piece=END)
    model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    for piece in model.pieces:
        if piece.piece == END:
            piece.type = piece.USER_DEFINED
    path.write_bytes(model.SerializeToString())
    return SENTENCEPIECE, path


KINDS = [flagged, added_but_not_flagged, learned, whole_words_first, unigram, words, gpt2]
SENTENCEPIECES = [control, user_defined, user_defined_end]
TEXTS = [END, f"a {END} b", f"{END}{END}", f"a{END}", " </s> <s> <unk> <|im_start|>"]


@pytest.mark.parametrize("make", [*KINDS, *SENTENCEPIECES])
def test_text_is_never_encoded_as_the_end(make, tmp_path):
    kind, path = make(tmp_path)
    tokenizer = load_tokenizer(kind, path)
    for text in TEXTS:
        for ids in (tokenizer.encode(text), *tokenizer.encode_batch([text])):
            assert tokenizer.eod not in ids
            if make is not words:
                assert tokenizer.decode(ids).strip() == text.strip() or make is unigram
    # The id is that of the original file, so it decodes to END.
    assert END in tokenizer.decode([tokenizer.eod]) or make in SENTENCEPIECES


@pytest.mark.parametrize("make", [*KINDS, *SENTENCEPIECES])
def test_text_is_encoded_as_the_end_if_that_is_allowed(make, tmp_path):
    kind, path = make(tmp_path)
    tokenizer = load_tokenizer(kind, path, allow_special=True)
    if make is user_defined:
        assert tokenizer.encode(f"a{END}b").tolist().count(3) == 1
        assert tokenizer.encode("a</s>b").tolist().count(tokenizer.eod) == 1
    elif make is whole_words_first:
        assert tokenizer.encode(END).tolist() == [tokenizer.eod]
    else:
        assert tokenizer.encode(f"a {END} b").tolist().count(tokenizer.eod) == 1


@pytest.mark.parametrize("make", [*KINDS, *SENTENCEPIECES])
def test_ids_of_other_text_equal_the_librarys(make, tmp_path):
    kind, path = make(tmp_path)
    tokenizer = load_tokenizer(kind, path)
    for text in ("abc <b> a b", "zz|y", "a"):
        if kind == SENTENCEPIECE:
            expected = sentencepiece.SentencePieceProcessor(model_file=str(path)).encode(text)
        else:
            expected = Tokenizer.from_str(tokenizer.data.decode()).encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text).tolist() == expected


def test_added_tokens_that_are_text_stay_pieces_of_text(tmp_path):
    """Runs of spaces and HTML tags keep their ids."""
    tokenizer = byte_level(tmp_path)
    tokenizer.add_tokens(["<|im_start|>", "    ", "<table>"])
    tokenizer.add_special_tokens([END])
    expected = tokenizer.encode("a    <table>").ids
    loaded = load_tokenizer(*saved(tmp_path, tokenizer))
    assert loaded.encode("a    <table>").tolist() == expected
    assert len(loaded.encode("<|im_start|>")) == len("<|im_start|>")
    _, path = user_defined(tmp_path)
    assert len(load_tokenizer(SENTENCEPIECE, path).encode("<table>")) == 1
    assert len(load_tokenizer(SENTENCEPIECE, path).encode("<|im_start|>")) > 1


def test_a_token_that_text_encodes_to_cannot_end_documents(tmp_path):
    kind, path = saved(tmp_path, byte_level(tmp_path))
    with pytest.raises(ConfigError, match="no text encodes to"):
        load_tokenizer(kind, path, eod="a")


# --- lost characters


def no_fallback(folder):
    return sentencepiece_of(folder, byte_fallback=False, vocab_size=60)


def bpe_that_drops(folder):
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate([END, *LETTERS, " "])}, []))
    tokenizer.decoder = decoders.Fuse()
    return saved(folder, tokenizer)


def bytes_that_are_missing(folder):
    vocab = {character: number for number, character in enumerate(sorted(byte_alphabet())) if number != 200}
    tokenizer = Tokenizer(models.BPE({**vocab, END: 300}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return saved(folder, tokenizer)


@pytest.mark.parametrize("make", [no_fallback, bpe_that_drops, unigram])
def test_unknown_and_dropped_characters_are_counted(make, tmp_path):
    tokenizer = load_tokenizer(*make(tmp_path))
    texts = ["abc", "a\u4f60b\u4f60\u4f60", "\U0001f600 z\n", "a"]
    assert tokenizer.lost_characters(texts) == Counter({"\u4f60": 3, "\U0001f600": 1})
    assert tokenizer.lost_characters(texts) == tokenizer.lost_characters(texts)


def test_unknown_words_are_counted_by_their_characters(tmp_path):
    tokenizer = load_tokenizer(*words(tmp_path))
    assert tokenizer.lost_characters(["a b cc\u4f60 a", "b"]) == Counter({"c": 2, "\u4f60": 1})
    pieces = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2, "</s>": 3}, unk_token="[UNK]"))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    assert load_tokenizer(*saved(tmp_path, pieces)).lost_characters(["ab abb ax"]) == Counter({"a": 1, "x": 1})


def test_characters_with_missing_bytes_and_normalized_ones_are_counted(tmp_path):
    tokenizer = load_tokenizer(*bytes_that_are_missing(tmp_path))
    missing = sorted(byte_alphabet())[200]
    byte = byte_alphabet()[missing]
    lost = tokenizer.lost_characters(["".join(map(chr, range(33, 0x500))) + "\ufffd"])
    assert lost == Counter(c for c in map(chr, range(33, 0x500)) if byte in c.encode() and not c.isspace())
    folded = byte_level(tmp_path)
    folded.normalizer = normalizers.Replace("x", "")
    assert load_tokenizer(*saved(tmp_path, folded)).lost_characters(["axxb\u4f60"]) == Counter({"x": 2})


@pytest.mark.parametrize("make", [flagged, control, gpt2])
def test_tokenizers_with_all_bytes_lose_nothing(make, tmp_path):
    tokenizer = load_tokenizer(*make(tmp_path))
    assert tokenizer.lost_characters(["\u4f60\x01\U0001f600\u200b\xad"]) == Counter()
    if make is not flagged:
        assert tokenizer.lossless or make is gpt2


def test_lost_characters_are_described_in_ascii():
    text = describe_lost(Counter({"\u4f60": 3, "\U0001f600": 1}), 400)
    assert text == "4 of 400 characters (1.00%), such as U+4F60 (3), U+1F600 (1)"
    check = CharacterCheck(lambda text: [ord(c) for c in text if c != "q"], lambda ids: "".join(map(chr, ids)), -1)
    assert check.lost_in(["qaq"]) == Counter("qq")


# --- the tool


def preprocess(folder, model, *flags, kind=HUGGING_FACE):
    given = ["--input", folder / "input.jsonl", "--output-dir", folder / "out", "--workers", 1, "--split", "train"]
    return run("preprocess_data.py", *given, "--tokenizer-type", kind, "--tokenizer-model", model, *flags)


def test_lost_characters_are_refused_above_the_allowed_share_and_reported_below_it(tmp_path):
    """Version 0.1 dropped them silently."""
    _, model = bpe_that_drops(tmp_path)
    put(tmp_path, jsonl_of([("abc" * 30 + "\u4f60", "Books"), ("xyz" * 3, "Books")]))
    done = preprocess(tmp_path, model, "--append-eod")
    fails(done, "loses 1 of 100 characters (1.00%), such as U+4F60 (1)", "--max-dropped-share 0.001", "as bytes")
    assert "in a sample of the input, the tokenizer loses 1 of 100" in done.stderr
    assert contents(tmp_path / "out") == {}
    done = preprocess(tmp_path, model, "--append-eod", "--resume", "--max-dropped-share", 0.02)
    assert done.returncode == 0, done.stderr
    assert "resuming after 2 documents" in done.stdout
    assert done.stdout.splitlines()[-1] == "the tokenizer lost 1 of 100 characters (1.00%), such as U+4F60 (1)"


def test_only_append_eod_puts_the_end_into_the_data(tmp_path):
    """Version 0.1 encoded the text of such a token as the end-of-document id."""
    _, model = added_but_not_flagged(tmp_path)
    put(tmp_path, jsonl_of([(f"a{END}b{END}", "Books"), ("c", "Books")]))
    counts = []
    for flags in (["--append-eod"], [], ["--allow-special-tokens"]):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        done = preprocess(tmp_path, model, *flags)
        assert done.returncode == 0, done.stderr
        manifest = load_manifest(tmp_path / "out" / "domains.json")
        ids = IndexedDataset(manifest.domains[0].train)
        counts.append(ids.tokens(0, ids.num_tokens).tolist().count(manifest.tokenizer.eod))
    assert counts == [2, 0, 2]


def test_flags_that_the_tokenizer_type_ignores_are_faults(tmp_path):
    _, model = control(tmp_path)
    put(tmp_path, jsonl_of([("a", "Books")]))
    flags = ["--eod-token", "</s>", "--merge-file", model, "--max-dropped-share", 2, "--journal-seconds", "nan"]
    done = preprocess(tmp_path, model, *flags, kind=SENTENCEPIECE)
    fails(done, "--eod-token: </s>", "--merge-file: ", "--max-dropped-share: 2", "--journal-seconds: nan", "4 faults")


def test_trained_tokenizers_are_not_modified(tmp_path):
    """tiktoken encodes a BPE like those of tools/train_tokenizer.py."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([f"{LETTERS} {END}"] * 50, trainer)
    loaded = load_tokenizer(*saved(tmp_path, tokenizer))
    assert loaded.encoder == "tiktoken"
    assert loaded.lossless
