"""Modifies tokenizers so that text which spells a special token never becomes that token, or always does.

These tokens count as special: those that the tokenizer flags (Hugging Face's flag, SentencePiece's control pieces), the
end-of-document token, its usual names, and names of the form <|...|>. Other added tokens, such as runs of spaces or
HTML tags, are ordinary pieces of text.
"""

from __future__ import annotations

import copy
import re
from typing import Any

from sentencepiece import sentencepiece_model_pb2

# The usual end-of-document tokens; the first one in the vocabulary is the default.
EOD_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<EOD>")
# Some tokenizers use full-width bars.
_SPECIAL = re.compile("<[|\uff5c].+[|\uff5c]>", re.DOTALL)
# Encloses the id of a renamed piece, so that no text matches it: Unicode reserves this code point for internal use.
_NONCHARACTER = "\U0010ffff"


def looks_special(token: str) -> bool:
    """Returns whether the name of a token suggests that it is special."""
    return token in EOD_TOKENS or _SPECIAL.fullmatch(token) is not None


def unknown_token(model: dict[str, Any]) -> str | None:
    """Returns the unknown token of a tokenizer.json's model, or None if the model drops unknown text."""
    if model.get("type") == "Unigram":
        return model["vocab"][model["unk_id"]][0] if model.get("unk_id") is not None else None
    unknown = model.get("unk_token")
    return unknown if isinstance(unknown, str) else None


def without_special_text(definition: dict[str, Any], end: str | None) -> dict[str, Any]:
    """Returns a tokenizer.json that gives the same ids but never those of special tokens, if it is loaded with
    `encode_special_tokens`. Returns `definition` itself if nothing has to change.

    `encode_special_tokens` alone only skips tokens that are flagged. The model may still produce their names as
    pieces: the "</s>" of a Unigram, a BPE whose merges form it, a word of a WordLevel.

    Args:
        end: the end-of-document token.
    """
    added = definition.get("added_tokens") or []
    special = {token["content"] for token in added if token.get("special") or looks_special(token["content"])}
    special |= {end} if end is not None else set()
    special -= {unknown_token(definition["model"])}
    changed = copy.copy(definition)
    changed["added_tokens"] = [{**token, "special": True} if token["content"] in special else token for token in added]
    model = changed["model"] = copy.copy(definition["model"])
    vocab = model["vocab"]
    if model.get("type") == "BPE" and not model.get("ignore_merges"):
        model["merges"] = [merge for merge in model["merges"] if not special & _parts(merge)]
    elif isinstance(vocab, dict):
        model["vocab"] = {_renamed(piece, piece_id, special): piece_id for piece, piece_id in vocab.items()}
    else:
        model["vocab"] = [[_renamed(piece, index, special), *rest] for index, (piece, *rest) in enumerate(vocab)]
    if model["vocab"] != vocab:
        # Added tokens must keep the names that the model has for them, or they would get other ids.
        ids = vocab if isinstance(vocab, dict) else {piece: index for index, (piece, *_) in enumerate(vocab)}
        changed["added_tokens"] = [
            {**token, "content": _renamed(token["content"], ids[token["content"]], special)}
            if token["content"] in ids
            else token
            for token in changed["added_tokens"]
        ]
        changed["post_processor"] = None
    return definition if changed == definition else changed


def _parts(merge: Any) -> set[str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return {left, right, left + right}


def _renamed(piece: str, piece_id: int, special: set[str]) -> str:
    return f"{_NONCHARACTER}{piece_id}{_NONCHARACTER}" if piece in special else piece


def sentencepiece_model(data: bytes, allow_special: bool) -> tuple[bytes, bool]:
    """Returns a SentencePiece model that never encodes text as a special piece, or always if the text spells one.

    Args:
        data: content of the model file.
        allow_special: whether text that spells a special piece becomes that piece.

    Returns:
        The model, and whether it is lossless: it encodes unknown characters as bytes and does not normalize.

    Raises:
        DecodeError: `data` is not a model (google.protobuf).
    """
    protobuf: Any = sentencepiece_model_pb2
    model = protobuf.ModelProto()
    model.ParseFromString(data)
    kinds = protobuf.ModelProto.SentencePiece
    trainer = model.trainer_spec
    special = {trainer.bos_piece, trainer.eos_piece, trainer.pad_piece}
    for piece in model.pieces:
        if piece.type == kinds.USER_DEFINED and (piece.piece in special or looks_special(piece.piece)):
            piece.type = kinds.CONTROL
        if allow_special and piece.type == kinds.CONTROL:
            piece.type = kinds.USER_DEFINED
    all_bytes = sum(piece.type == kinds.BYTE for piece in model.pieces) == 256
    return model.SerializeToString(), all_bytes and not model.normalizer_spec.precompiled_charsmap
