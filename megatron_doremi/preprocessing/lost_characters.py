"""Characters of a text that a tokenizer loses: it drops them, or makes its unknown token of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

_SHOWN = 5


class CharacterCheck:
    """Counts characters that a tokenizer loses, by what it makes of each character alone. Spaces are not counted.

    For tokenizers whose pieces are made of characters. Of one that knows whole words `uncovered_characters` tells.
    """

    def __init__(self, encode: Callable[[str], Sequence[int]], decode: Callable[[Sequence[int]], str], unknown: int):
        """A check.

        Args:
            encode: ids of a text.
            decode: the text of ids.
            unknown: the id of the unknown token; -1: there is none.
        """
        self._encode, self._decode, self._unknown = encode, decode, unknown
        self._kept: set[str] = set()
        self._lost: set[str] = set()
        self._look_at({chr(code) for code in range(128)})
        self._keeps_ascii = not self._lost

    def _look_at(self, characters: set[str]) -> None:
        for character in characters:
            (self._kept if self._keeps(character) else self._lost).add(character)

    def _keeps(self, character: str) -> bool:
        if character.isspace():
            return True
        ids = list(self._encode(character))
        if self._unknown in ids:
            return False
        text = self._decode(ids)
        # Bytes of the character that are missing leave the others without a meaning.
        return bool(text.strip()) and ("\ufffd" not in text or character == "\ufffd")

    def lost_in(self, texts: Sequence[str]) -> Counter[str]:
        """How often the texts hold each character that is lost."""
        counts: Counter[str] = Counter()
        for text in texts:
            if self._keeps_ascii and text.isascii():
                continue
            found = set(text) - self._kept
            self._look_at(found - self._lost)
            for character in found & self._lost:
                counts[character] += text.count(character)
        return counts


def uncovered_characters(text: str, tokens: Sequence[tuple[int, tuple[int, int]]], unknown: int) -> Counter[str]:
    """The characters of a text, spaces apart, that no known token covers.

    Args:
        tokens: (id, (start, end) in the text) of each token.
        unknown: the id of the unknown token; -1: there is none.
    """
    covered = bytearray(len(text))
    for number, (start, end) in tokens:
        if number != unknown:
            covered[start:end] = b"\1" * (end - start)
    return Counter(c for c, known in zip(text, covered, strict=True) if not known and not c.isspace())


def describe_lost(lost: Counter[str], characters: int) -> str:
    """What was lost, for a message. Characters by their code points: a console may not be able to show them."""
    total = lost.total()
    examples = ", ".join(f"U+{ord(character):04X} ({count:,})" for character, count in lost.most_common(_SHOWN))
    return f"{total:,} of {characters:,} characters ({total / max(1, characters):.2%}), such as {examples}"
