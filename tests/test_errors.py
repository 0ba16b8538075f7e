"""How a program says what is wrong with its input.

Run alone: python -m pytest tests/test_errors.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_doremi.errors import ConfigError, Fault, raise_if_any

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
from megatron_doremi import errors
errors._SECONDS_FOR_RANK_0 = 0.1
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


@pytest.mark.parametrize(
    ("environ", "start"),
    [({}, "error: 2 faults"), ({"RANK": "0"}, "error: 2 faults"), ({"RANK": "3"}, "error: rank 3: 2 faults")],
)
def test_the_program_leaves_with_2_and_no_traceback(environ, start):
    """A rank other than 0 that was not ended in the meantime has something of its own to say."""
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "SLURM_PROCID")}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=ROOT, env={**clean, **environ}, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(start)
    assert "Traceback" not in done.stderr
