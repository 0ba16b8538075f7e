"""Mutated input files of every format give either the documents that the libraries read from them, or a fault.

Run alone: python -m pytest tests/preprocessing/test_fuzz_inputs.py. For more cases: tests/soak/fuzz_inputs.py
"""

from __future__ import annotations

import pytest
from input_mutations import FILES, TEXTS, fuzz, one, reference


@pytest.mark.parametrize("name", FILES)
def test_mutations(name, tmp_path):
    assert one(name, tmp_path / f"d.{name}", FILES[name]) == "same"
    assert reference(name, FILES[name]) == TEXTS
    answers = fuzz(tmp_path, name, 150)
    assert answers["refused"] > 50
