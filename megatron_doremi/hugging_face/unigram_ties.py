"""Splits of a text that a unigram model finds equally likely. Pure.

A unigram model takes the most likely split of a text into pieces. Splits with the same pieces in another order are
equally likely, such as three spaces as 2 + 1 or as 1 + 2, and rounding decides between them: sentencepiece adds float32
numbers over the text, Hugging Face's tokenizers library float64 numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def equally_likely(ids: Sequence[int], others: Sequence[int], pieces: Mapping[int, str]) -> bool:
    """Whether two splits are the same but for the order of pieces within stretches of the same text.

    Args:
        pieces: by id.
    """
    left = right = 0
    while left < len(ids) and right < len(others):
        if ids[left] == others[right]:
            left, right = left + 1, right + 1
            continue
        length = _stretch(ids[left:], others[right:], pieces)
        if not length:
            return False
        left, right = left + length, right + length
    return left == len(ids) and right == len(others)


def _stretch(ids: Sequence[int], others: Sequence[int], pieces: Mapping[int, str]) -> int:
    """The least number of pieces, the same on both sides, that are the same text and the same pieces; 0: none is."""
    text, other_text, count = "", "", dict[int, int]()
    for length, (one, other) in enumerate(zip(ids, others, strict=False), 1):
        text, other_text = text + pieces.get(one, ""), other_text + pieces.get(other, "")
        count[one] = count.get(one, 0) + 1
        count[other] = count.get(other, 0) - 1
        if not any(count.values()):
            return length if text == other_text else 0
    return 0
