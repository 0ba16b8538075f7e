"""Mutated files of recorded losses and scores.json: right losses or a ConfigError, never a traceback.

Run alone: python -m pytest tests/data/test_fuzz_losses.py
"""

from __future__ import annotations

import pytest
from data.fuzz_losses import TARGETS, fuzz

CASES = 250


@pytest.mark.parametrize(("file", "old", "way"), TARGETS)
def test_mutations(file, old, way, tmp_path):
    refused = fuzz(tmp_path, file, old, way, CASES)
    print(f"{file}, {'version 0.1, ' if old else ''}{way}: {refused} of {CASES} refused")
    assert refused > CASES // 4
