"""Text that spells a special token stays text: tokenizers changed so that no text becomes one, or so that it does.

What counts as special: what the tokenizer itself calls so (Hugging Face's flag, SentencePiece's control pieces), the
token that ends documents, its usual names, and names of the form <|...|>. Other added tokens, such as runs of spaces or
HTML tags, are pieces of text like any other.
"""

from __future__ import annotations

import copy
import re
from typing import Any

from sentencepiece import sentencepiece_model_pb2

# What ends a document where the user does not say: the first of these that the vocabulary has.
ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<EOD>")
# With the full-width bars of some tokenizers as well.
_SPECIAL = re.compile("<[|\uff5c].+[|\uff5c]>", re.DOTALL)
# Stands before the id of a piece whose name no text may match: no character of a text, by Unicode.
_NONCHARACTER = "\U0010ffff"


def looks_special(token: str) -> bool:
    """Whether a token's name says that it is no text."""
    return token in ENDS or _SPECIAL.fullmatch(token) is not None


def unknown_token(model: dict[str, Any]) -> str | None:
    """What the model of a tokenizer.json makes of text that it does not know; None: nothing, such text is dropped."""
    if model.get("type") == "Unigram":
        return model["vocab"][model["unk_id"]][0] if model.get("unk_id") is not None else None
    unknown = model.get("unk_token")
    return unknown if isinstance(unknown, str) else None


def without_special_text(definition: dict[str, Any], end: str | None) -> dict[str, Any]:
    """A tokenizer.json that gives the same ids, but never those of special tokens, provided that it is loaded with
    `encode_special_tokens`. The same object where there is nothing to change.

    `encode_special_tokens` alone leaves out the tokens that are flagged; the model may still know their names as
    pieces: a Unigram's "</s>", a BPE whose merges lead to it, a whole word of a WordLevel.

    Args:
        end: the token that ends documents.
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
        model["vocab"] = {_renamed(piece, number, special): number for piece, number in vocab.items()}
    else:
        model["vocab"] = [[_renamed(piece, number, special), *rest] for number, (piece, *rest) in enumerate(vocab)]
    if model["vocab"] != vocab:
        # Named as in the model, or they would get other ids.
        numbers = vocab if isinstance(vocab, dict) else {piece: number for number, (piece, *_) in enumerate(vocab)}
        changed["added_tokens"] = [
            {**token, "content": _renamed(token["content"], numbers[token["content"]], special)}
            if token["content"] in numbers
            else token
            for token in changed["added_tokens"]
        ]
        changed["post_processor"] = None
    return definition if changed == definition else changed


def _parts(merge: Any) -> set[str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return {left, right, left + right}


def _renamed(piece: str, number: int, special: set[str]) -> str:
    return f"{_NONCHARACTER}{number}{_NONCHARACTER}" if piece in special else piece


def sentencepiece_model(data: bytes, allow_special: bool) -> tuple[bytes, bool]:
    """A SentencePiece model in which text never becomes a special piece, or always where it spells one.

    Args:
        data: the model's file.

    Returns:
        The model, and whether it keeps every character: bytes stand for what it does not know, and nothing is
        normalized.

    Raises:
        DecodeError: the data are no model (google.protobuf).
    """
    messages: Any = sentencepiece_model_pb2
    model = messages.ModelProto()
    model.ParseFromString(data)
    kinds = messages.ModelProto.SentencePiece
    trainer = model.trainer_spec
    special = {trainer.bos_piece, trainer.eos_piece, trainer.pad_piece}
    for piece in model.pieces:
        if piece.type == kinds.USER_DEFINED and (piece.piece in special or looks_special(piece.piece)):
            piece.type = kinds.CONTROL
        if allow_special and piece.type == kinds.CONTROL:
            piece.type = kinds.USER_DEFINED
    all_bytes = sum(piece.type == kinds.BYTE for piece in model.pieces) == 256
    return model.SerializeToString(), all_bytes and not model.normalizer_spec.precompiled_charsmap
