"""Characters that a tokenizer loses: it drops them or encodes them as its unknown token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

# Lost characters that a message lists.
_MAX_EXAMPLES = 5


class CharacterCheck:
    """Counts the characters that a tokenizer loses, by encoding each distinct character once, alone. Ignores spaces.

    This suits tokenizers whose pieces are built from characters. For word-level ones see `uncovered_characters`.
    """

    def __init__(self, encode: Callable[[str], Sequence[int]], decode: Callable[[Sequence[int]], str], unknown: int):
        """Creates a check.

        Args:
            encode: maps a text to ids.
            decode: maps ids to text.
            unknown: the id of the unknown token, or -1 if there is none.
        """
        self._encode, self._decode, self._unknown = encode, decode, unknown
        self._kept: set[str] = set()
        self._lost: set[str] = set()
        self._classify({chr(code) for code in range(128)})
        self._keeps_ascii = not self._lost

    def _classify(self, characters: set[str]) -> None:
        for character in characters:
            (self._kept if self._keeps(character) else self._lost).add(character)

    def _keeps(self, character: str) -> bool:
        if character.isspace():
            return True
        ids = list(self._encode(character))
        if self._unknown in ids:
            return False
        text = self._decode(ids)
        # If the vocabulary misses one byte of the character, the others decode to U+FFFD.
        return bool(text.strip()) and ("\ufffd" not in text or character == "\ufffd")

    def lost_in(self, texts: Sequence[str]) -> Counter[str]:
        """Counts the occurrences of each lost character in the texts."""
        counts: Counter[str] = Counter()
        for text in texts:
            if self._keeps_ascii and text.isascii():
                continue
            suspects = set(text) - self._kept
            self._classify(suspects - self._lost)
            for character in suspects & self._lost:
                counts[character] += text.count(character)
        return counts


def uncovered_characters(text: str, tokens: Sequence[tuple[int, tuple[int, int]]], unknown: int) -> Counter[str]:
    """Counts the characters of a text, except spaces, that no known token covers.

    Args:
        tokens: (id, (start, end) in the text) of each token.
        unknown: the id of the unknown token, or -1 if there is none.
    """
    covered = bytearray(len(text))
    for token_id, (start, end) in tokens:
        if token_id != unknown:
            covered[start:end] = b"\1" * (end - start)
    return Counter(c for c, known in zip(text, covered, strict=True) if not known and not c.isspace())


def describe_lost(lost: Counter[str], characters: int) -> str:
    """Describes the lost characters in a message, by code point: a console may not be able to display them."""
    total = lost.total()
    examples = ", ".join(f"U+{ord(character):04X} ({count:,})" for character, count in lost.most_common(_MAX_EXAMPLES))
    return f"{total:,} of {characters:,} characters ({total / max(1, characters):.2%}), such as {examples}"
