"""Encodes with tiktoken's core instead of a byte-level BPE of Hugging Face, if that provably gives the same ids.

Hugging Face applies a list of merges (Sennrich et al. 2016); tiktoken merges the adjacent pair that forms the known
piece of lowest rank. The two differ if a piece can be formed by a pair that is not in the list of merges. They agree if

1. every merge forms a new piece from pieces of earlier merges, and
2. the text of every piece is encoded as that piece alone.

Proof: let tiktoken merge the neighbors x and y into t. No merge of lower rank was applicable at that point, and none
had crossed the boundaries of t. So x and y are what the merges of lower rank make of t's text alone, and by 2 these are
the two halves of t's own merge.

That leaves the two regex engines, which might split text differently. `same_classes` compares the character classes of
the pattern one by one; `same_encoding` also compares the ids of a sample of the input.
"""

from __future__ import annotations

import json
import re
import struct
from typing import Any

import numpy as np
import tiktoken
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, pre_tokenizers

# GPT-2's pattern that splits text into words; ByteLevel with use_regex implies it in a tokenizer.json.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Code points of Unicode's first two planes, which hold nearly all characters in use.
_COMPARED_CODE_POINTS = 0x20000
# A character class within a pattern.
_CLASS = re.compile(r"\\[pP]\{[^}]+\}|\\[pP][A-Z]|\\[sSdDwW]")
# Texts of this many characters may overflow the stack of tiktoken's regex engine, which holds a million entries.
_LONG_TEXT = 200_000


def byte_alphabet() -> dict[str, int]:
    """Maps each character of GPT-2's byte-level vocabularies to its byte: printable Latin-1 characters stand for
    themselves, U+0100 and up for the other bytes in ascending order."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


def encode(core: tiktoken.Encoding, text: str) -> NDArray[np.int32]:
    """Returns the ids of a text. Raises ValueError if a run of spaces is too long for tiktoken's regex engine."""
    # encode_ordinary may panic on a long text; encode is slower by a third but raises.
    ids = core.encode_ordinary(text) if len(text) < _LONG_TEXT else core.encode(text, disallowed_special=())
    # The fastest conversion of a list of integers to an array.
    return np.frombuffer(struct.pack(f"={len(ids)}i", *ids), np.int32)


def tiktoken_core(tokenizer: Tokenizer, definition: dict[str, Any]) -> tiktoken.Encoding | None:
    """Returns the tiktoken core of a tokenizer, or None if it is not known to give the same ids.

    The ids serve as ranks, so they must increase in the order of the merges. They do in every trained tokenizer.

    Args:
        definition: the content of the tokenizer's tokenizer.json.
    """
    model, pattern = definition.get("model") or {}, _pattern_of(definition.get("pre_tokenizer"))
    plain = all(not model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
    # Added tokens that are not special are matched before the text is split into words.
    matches_text = any(not token.get("special") for token in definition.get("added_tokens") or [])
    if pattern is None or matches_text or not plain or model.get("type") != "BPE" or definition.get("normalizer"):
        return None
    alphabet, vocab = byte_alphabet(), model["vocab"]
    if model.get("byte_fallback") or any(character not in vocab for character in alphabet):
        return None
    # Single bytes never compete with a merge, so their ids may be anything.
    ranks = {bytes([byte]): vocab[character] for character, byte in alphabet.items()}
    formed, last_id = list(alphabet), -1
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        halves = [bytes(alphabet.get(character, 0) for character in half) for half in (left, right)]
        piece, token_id = halves[0] + halves[1], vocab[left + right]
        known = set(left + right) <= alphabet.keys() and all(half in ranks for half in halves)
        if not known or piece in ranks or token_id <= last_id:
            return None
        ranks[piece] = last_id = token_id
        formed.append(left + right)
    # With ignore_merges, words are looked up first, so text may be encoded as pieces that no merge forms.
    if model.get("ignore_merges") and len(formed) < len(vocab):
        return None
    for piece_text in formed:
        tokens = tokenizer.model.tokenize(piece_text)
        if len(tokens) != 1 or tokens[0].id != vocab[piece_text]:
            return None
    return tiktoken.Encoding("byte-level", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def _pattern_of(pre_tokenizer: Any) -> str | None:
    """Returns the regular expression by which a pre-tokenizer splits words, or None if it does anything else too."""
    is_sequence = isinstance(pre_tokenizer, dict) and pre_tokenizer.get("type") == "Sequence"
    steps = pre_tokenizer["pretokenizers"] if is_sequence else [pre_tokenizer]
    if not all(isinstance(step, dict) for step in steps) or not steps or steps[-1].get("type") != "ByteLevel":
        return None
    if steps[-1].get("add_prefix_space"):
        return None
    if len(steps) == 1:
        return GPT2_PATTERN if steps[0].get("use_regex", True) else None
    split = steps[0]
    pattern = split.get("pattern")
    splits_only = len(steps) == 2 and split.get("type") == "Split" and split.get("behavior") == "Isolated"
    if not splits_only or split.get("invert") or steps[1].get("use_regex", True) or not isinstance(pattern, dict):
        return None
    return pattern.get("Regex")


def same_classes(pattern: str) -> bool:
    """Returns whether the regex engines of tiktoken and tokenizers agree on every character class of a pattern, over
    Unicode's first two planes."""
    surrogates = range(0xD800, 0xE000)
    characters = "".join(chr(code) for code in range(_COMPARED_CODE_POINTS) if code not in surrogates)
    single_bytes = {bytes([byte]): byte for byte in range(256)}
    for name in set(_CLASS.findall(pattern)):
        # tiktoken drops the characters outside the class. tokenizers, told to remove the matches, returns the gaps
        # between them; the members of the class lie between these gaps.
        core = tiktoken.Encoding("class", pat_str=name, mergeable_ranks=single_bytes, special_tokens={})
        gaps = pre_tokenizers.Split(Regex(name), "removed").pre_tokenize_str(characters)
        ends = [0, *(end for _, (_, end) in gaps)]
        starts = [*(start for _, (start, _) in gaps), len(characters)]
        members = "".join(characters[end:start] for end, start in zip(ends, starts, strict=True))
        if bytes(core.encode_ordinary(characters)) != members.encode("utf-8"):
            return False
    return True


def same_encoding(core: tiktoken.Encoding, tokenizer: Tokenizer, texts: list[str]) -> bool:
    """Returns whether both agree on the character classes of the pattern and give the same ids for all `texts`."""
    if not same_classes(core._pat_str):
        return False
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    try:
        return all(encode(core, text).tolist() == other.ids for text, other in zip(texts, encodings, strict=True))
    except ValueError:
        return False


def gpt2_definition(vocab: dict[str, int], merges: list[str]) -> dict[str, Any]:
    """Builds a tokenizer.json from the contents of GPT-2's vocab.json and merges.txt.

    Args:
        merges: lines 'left right', without the version line at the top of the file.
    """
    special = [
        {"id": token_id, "content": text, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False, "special": True}
        for text, token_id in vocab.items()
        if text.startswith("<|") and text.endswith("|>") and len(text) > 4
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model: dict[str, Any] = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(special, key=lambda token: token["id"]),
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": model | {"vocab": vocab, "merges": [line.split(" ") for line in merges]},
    }


def as_bytes(definition: dict[str, Any]) -> bytes:
    """Serializes a tokenizer.json; the same definition always gives the same bytes."""
    return json.dumps(definition, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
