"""How a program reports what is wrong with its input.

Run alone: python -m pytest tests/test_errors.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_doremi.errors import ConfigError, Fault, raise_if_any

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
from megatron_doremi import errors
def main():
    raise errors.ConfigError([errors.Fault("--lr", "fast", "a number", "give one"), errors.Fault("--x", "", "r", "m")])
errors.run_or_exit(main)
"""


def test_a_message_holds_every_fault():
    with pytest.raises(ConfigError) as caught:
        raise_if_any([Fault("--lr", "fast", "a number", "give one"), Fault("file", "", "be there", "make it")])
    assert str(caught.value).splitlines() == [
        "2 faults in the input:",
        "  [1] --lr: fast",
        "      rule:   a number",
        "      remedy: give one",
        "  [2] file",
        "      rule:   be there",
        "      remedy: make it",
    ]
    raise_if_any([])


def test_the_program_exits_with_2_and_without_a_traceback():
    process = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert process.stderr.startswith("error: 2 faults")
    assert "Traceback" not in process.stderr
