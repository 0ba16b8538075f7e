"""Mutated files: whatever stands in an .idx, a .bin, a manifest, a list, a weights file, a journal or a shard.json, a
ConfigError or a right answer. tests/soak/fuzz_files.py reads a thousand of each, or more.

Run alone: python -m pytest tests/data/test_fuzz.py
"""

from __future__ import annotations

import pytest
from file_mutations import FUZZERS, OTHER, REFUSED, fuzz, mutated_bytes

CASES = 200
# What only this program writes carries a hash of itself: there is no other right answer.
SEALED = ("journal", "shard")

__all__ = ["mutated_bytes"]


@pytest.mark.parametrize("name", FUZZERS)
def test_mutations_are_refused_or_read_right(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answers = fuzz(tmp_path, name, CASES)
    assert answers.total() == CASES
    assert answers[REFUSED] > CASES // 5
    assert not (name.startswith(SEALED) and answers[OTHER])
