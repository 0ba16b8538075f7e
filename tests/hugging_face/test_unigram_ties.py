"""Equally likely splits of a unigram model: accepted between SentencePiece and its tokenizer.json; nothing else is.

Run alone: python -m pytest tests/hugging_face/test_unigram_ties.py
"""

from __future__ import annotations

import pytest
from sentencepiece import sentencepiece_model_pb2

from megatron_doremi.errors import ConfigError
from megatron_doremi.hugging_face.tokenizer_files import write_tokenizer
from megatron_doremi.hugging_face.unigram_ties import equally_likely
from megatron_doremi.tokenization.tokenizer import HUGGING_FACE, SENTENCEPIECE, load_tokenizer

PIECES = {1: "_", 2: "__", 3: "a", 4: "aa", 5: "_a", 6: "b"}


@pytest.mark.parametrize(
    ("ids", "others", "expected"),
    [
        ([3, 1, 2, 6], [3, 2, 1, 6], True),
        ([2, 2, 1, 6, 1, 2], [1, 2, 2, 6, 2, 1], True),
        # The same text in other pieces, the same pieces in another text, an end that differs.
        ([3, 1, 1, 6], [3, 2, 6], False),
        ([2, 2, 6], [1, 1, 2, 6], False),
        ([3, 1], [1, 3], False),
        ([3, 1, 2], [3, 2, 1, 6], False),
        ([2, 1, 4], [1, 5, 3], False),
    ],
)
def test_the_same_pieces_in_another_order(ids, others, expected):
    assert equally_likely(ids, others, PIECES) is expected


def unigram(path, scores):
    """A SentencePiece model of these pieces, beside those of bytes, <unk> and </s>."""
    protobuf = sentencepiece_model_pb2
    model, kinds = protobuf.ModelProto(), protobuf.ModelProto.SentencePiece
    pieces = [("<unk>", 0.0, kinds.UNKNOWN), ("</s>", 0.0, kinds.CONTROL)]
    pieces += [(f"<0x{n:02X}>", -20.0, kinds.BYTE) for n in range(256)]
    for piece, score, kind in [*pieces, *((piece, score, kinds.NORMAL) for piece, score in scores.items())]:
        model.pieces.add(piece=piece, score=score, type=kind)
    model.trainer_spec.model_type, model.trainer_spec.byte_fallback = model.trainer_spec.UNIGRAM, True
    model.trainer_spec.unk_id, model.trainer_spec.eos_id = 0, 1
    model.trainer_spec.bos_id = model.trainer_spec.pad_id = -1
    model.normalizer_spec.name, model.normalizer_spec.escape_whitespaces = "identity", True
    model.normalizer_spec.add_dummy_prefix = model.normalizer_spec.remove_extra_whitespaces = False
    path.write_bytes(model.SerializeToString())
    return load_tokenizer(SENTENCEPIECE, path)


def test_an_export_may_differ_by_ties_alone(tmp_path):
    """Three spaces are 2 + 1 or 1 + 2: rounding decides, by the text before them, and not alike in both libraries."""
    scores = {"\u2581": -2.1, "\u2581\u2581": -3.37, "a": -3.3}
    tokenizer = unigram(tmp_path / "m.model", scores)
    (tmp_path / "hf").mkdir()
    assert write_tokenizer(tmp_path / "hf", tokenizer, 64, ["a  a"]) is True
    written = load_tokenizer(HUGGING_FACE, tmp_path / "hf" / "tokenizer.json", eod=tokenizer.eod)
    texts = ["a" * count + "   " for count in range(1, 100)]
    assert [text for text in texts if tokenizer.encode(text).tolist() != written.encode(text).tolist()]
    assert write_tokenizer(tmp_path / "hf", tokenizer, 64, texts) is False
    # A model to which a pair of spaces is worth less than two spaces splits otherwise.
    other = unigram(tmp_path / "n.model", {**scores, "\u2581\u2581": -4.5})
    other.data = tokenizer.data
    with pytest.raises(ConfigError, match="from token"):
        write_tokenizer(tmp_path / "hf", other, 64, texts)
