"""A SentencePiece model as a tokenizer.json of Hugging Face's tokenizers library.

The library has all that SentencePiece does to text: its normalization, its two algorithms, and bytes for unknown
characters. Whether both give the same ids is for the caller to check on text: ties between pieces of equal score may be
broken differently.
"""

from __future__ import annotations

import base64
from typing import Any

from sentencepiece import sentencepiece_model_pb2

_SPACE = "\u2581"


def sentencepiece_definition(data: bytes) -> dict[str, Any]:
    """The definition of a model file.

    Args:
        data: content of the file.

    Raises:
        DecodeError: `data` is not a model (google.protobuf).
        ValueError: the library has nothing that acts like the model: words or characters in place of pieces, or spaces
            as suffixes.
    """
    protobuf: Any = sentencepiece_model_pb2
    model = protobuf.ModelProto()
    model.ParseFromString(data)
    kinds, trainer, normalizer = protobuf.ModelProto.SentencePiece, model.trainer_spec, model.normalizer_spec
    if trainer.model_type not in (trainer.UNIGRAM, trainer.BPE):
        raise ValueError("a model of words or characters")
    if trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        raise ValueError("a model with spaces as suffixes, or unescaped")
    pieces = [(piece.piece, piece.score, piece.type) for piece in model.pieces]
    added = [
        {"id": number, "content": piece, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        | {"special": kind in (kinds.CONTROL, kinds.UNKNOWN)}
        for number, (piece, _, kind) in enumerate(pieces)
        if kind in (kinds.CONTROL, kinds.UNKNOWN, kinds.USER_DEFINED)
    ]
    unknown = next(number for number, (_, _, kind) in enumerate(pieces) if kind == kinds.UNKNOWN)
    all_bytes = sum(kind == kinds.BYTE for _, _, kind in pieces) == 256
    build = _unigram if trainer.model_type == trainer.UNIGRAM else _bpe
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": _normalizer(normalizer),
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": _decoder(normalizer.add_dummy_prefix),
        "model": build([(piece, score) for piece, score, _ in pieces], unknown, all_bytes),
    }


def _unigram(pieces: list[tuple[str, float]], unknown: int, all_bytes: bool) -> dict[str, Any]:
    return {
        "type": "Unigram",
        "unk_id": unknown,
        "vocab": [list(piece) for piece in pieces],
        "byte_fallback": all_bytes,
    }


def _bpe(pieces: list[tuple[str, float]], unknown: int, all_bytes: bool) -> dict[str, Any]:
    ids = {piece: number for number, (piece, _) in enumerate(pieces)}
    merges: list[tuple[float, int, int, list[str]]] = []
    for piece, score in pieces:
        for middle in range(1, len(piece)):
            left, right = piece[:middle], piece[middle:]
            if left in ids and right in ids:
                merges.append((-score, ids[left], ids[right], [left, right]))
    # SentencePiece merges the pair whose result scores highest.
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": pieces[unknown][0],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": all_bytes,
        "ignore_merges": False,
        "vocab": ids,
        "merges": [pair for *_, pair in sorted(merges)],
    }


def _normalizer(spec: Any) -> dict[str, Any]:
    steps: list[dict[str, Any]] = []
    if spec.precompiled_charsmap:
        table = base64.b64encode(spec.precompiled_charsmap).decode("ascii")
        steps.append({"type": "Precompiled", "precompiled_charsmap": table})
    if spec.remove_extra_whitespaces:
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if spec.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": " "})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": _SPACE})
    return {"type": "Sequence", "normalizers": steps}


def _decoder(dummy_prefix: bool) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}
