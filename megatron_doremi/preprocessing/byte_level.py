"""Byte-level BPE by tiktoken's core, for Hugging Face tokenizers that it provably encodes alike.

Byte-pair encoding by merges (Sennrich et al. 2016) and tiktoken's by ranks (merge whatever pair makes the known piece
of the lowest rank) differ as soon as a piece can be put together in a way that is no merge of the list. They agree
where every merge makes a piece of its own, from pieces of earlier merges, and every piece is what its own text is
encoded as. For then, when tiktoken joins two neighbors x and y to a piece t, no merge of a lower rank was left to do,
nor did any reach over the ends of t; so x and y are what the lower merges make of t's text alone, which are the two
halves of t's own merge. What stays open is whether two regex engines split text alike: the classes of characters are
compared one by one, and the whole on a sample of the input.
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

# How GPT-2 cuts text into words; what ByteLevel with use_regex stands for in a tokenizer.json.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Characters of the two planes in which nearly all of a text lies.
_CHARACTERS = 0x20000
# What a pattern names classes of characters by.
_CLASS = re.compile(r"\\[pP]\{[^}]+\}|\\[pP][A-Z]|\\[sSdDwW]")
# Characters of a text whose runs could overflow the regex engine's stack, which holds a million.
_LONG = 200_000


def byte_alphabet() -> dict[str, int]:
    """The byte that each character of GPT-2's byte-level vocabularies stands for: printable Latin-1 ones for
    themselves, then U+0100 and on for the other bytes in their order."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


def encode(core: tiktoken.Encoding, text: str) -> NDArray[np.int32]:
    """Ids of a text, int32. Raises ValueError if a run of spaces is too long for tiktoken's regex engine."""
    # On a long text encode_ordinary may panic; encode is slower by a third, but raises.
    ids = core.encode_ordinary(text) if len(text) < _LONG else core.encode(text, disallowed_special=())
    # The fastest way from a list of integers to an array.
    return np.frombuffer(struct.pack(f"={len(ids)}i", *ids), np.int32)


def tiktoken_core(tokenizer: Tokenizer, definition: dict[str, Any]) -> tiktoken.Encoding | None:
    """The tiktoken core of a tokenizer, or None where it is not known to give the same ids.

    The ids themselves serve as ranks, so they have to rise with the merges, as they do where the merges were learned.

    Args:
        definition: the content of its tokenizer.json.
    """
    model, pattern = definition.get("model") or {}, _pattern_of(definition.get("pre_tokenizer"))
    plain = all(not model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
    # Tokens that are matched in text without being special are cut out before the words are.
    matched = any(not token.get("special") for token in definition.get("added_tokens") or [])
    if pattern is None or matched or not plain or model.get("type") != "BPE" or definition.get("normalizer"):
        return None
    alphabet, vocab = byte_alphabet(), model["vocab"]
    if model.get("byte_fallback") or any(character not in vocab for character in alphabet):
        return None
    # What is made of single bytes is never compared with a merge, so their ids may lie anywhere.
    ranks = {bytes([byte]): vocab[character] for character, byte in alphabet.items()}
    made, last = list(alphabet), -1
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        halves = [bytes(alphabet.get(character, 0) for character in half) for half in (left, right)]
        piece, number = halves[0] + halves[1], vocab[left + right]
        known = set(left + right) <= alphabet.keys() and all(half in ranks for half in halves)
        if not known or piece in ranks or number <= last:
            return None
        ranks[piece] = last = number
        made.append(left + right)
    # A piece that no merge makes can only come out of a text where whole words are looked up first.
    if model.get("ignore_merges") and len(made) < len(vocab):
        return None
    for piece_text in made:
        pieces = tokenizer.model.tokenize(piece_text)
        if len(pieces) != 1 or pieces[0].id != vocab[piece_text]:
            return None
    return tiktoken.Encoding("byte-level", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def _pattern_of(entry: Any) -> str | None:
    """The regular expression by which a pre-tokenizer finds words; None where it does something else as well."""
    steps = entry["pretokenizers"] if isinstance(entry, dict) and entry.get("type") == "Sequence" else [entry]
    if not all(isinstance(step, dict) for step in steps) or not steps or steps[-1].get("type") != "ByteLevel":
        return None
    if steps[-1].get("add_prefix_space"):
        return None
    if len(steps) == 1:
        return GPT2_PATTERN if steps[0].get("use_regex", True) else None
    split = steps[0]
    pattern = split.get("pattern")
    alone = len(steps) == 2 and split.get("type") == "Split" and split.get("behavior") == "Isolated"
    if not alone or split.get("invert") or steps[1].get("use_regex", True) or not isinstance(pattern, dict):
        return None
    return pattern.get("Regex")


def same_classes(pattern: str) -> bool:
    """Whether the regex engines of tiktoken and tokenizers agree on every class of characters that a pattern names,
    over the characters of Unicode's first two planes."""
    surrogates = range(0xD800, 0xE000)
    characters = "".join(chr(code) for code in range(_CHARACTERS) if code not in surrogates)
    single_bytes = {bytes([byte]): byte for byte in range(256)}
    for name in set(_CLASS.findall(pattern)):
        # tiktoken leaves out what the pattern does not match; the other one, asked for what it does not match, says
        # between which places that lies.
        core = tiktoken.Encoding("class", pat_str=name, mergeable_ranks=single_bytes, special_tokens={})
        others = pre_tokenizers.Split(Regex(name), "removed").pre_tokenize_str(characters)
        ends = [0, *(end for _, (_, end) in others)]
        starts = [*(start for _, (start, _) in others), len(characters)]
        members = "".join(characters[end:start] for end, start in zip(ends, starts, strict=True))
        if bytes(core.encode_ordinary(characters)) != members.encode("utf-8"):
            return False
    return True


def same_encoding(core: tiktoken.Encoding, tokenizer: Tokenizer, texts: list[str]) -> bool:
    """Whether both know the same classes of characters and encode all texts alike."""
    if not same_classes(core._pat_str):
        return False
    encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    try:
        return all(encode(core, text).tolist() == other.ids for text, other in zip(texts, encoded, strict=True))
    except ValueError:
        return False


def gpt2_definition(vocab: dict[str, int], merges: list[str]) -> dict[str, Any]:
    """The tokenizer.json of GPT-2's two files, vocab.json and merges.txt.

    Args:
        merges: lines 'left right', without the file's first line, which names its version.
    """
    special = [
        {"id": number, "content": text, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False, "special": True}
        for text, number in vocab.items()
        if text.startswith("<|") and text.endswith("|>") and len(text) > 4
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model: dict[str, Any] = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(special, key=lambda token: token["id"]),
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": model | {"vocab": vocab, "merges": [line.split(" ") for line in merges]},
    }


def as_bytes(definition: dict[str, Any]) -> bytes:
    """A tokenizer.json, the same bytes for the same definition."""
    return json.dumps(definition, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
