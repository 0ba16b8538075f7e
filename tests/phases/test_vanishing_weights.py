"""A vanishing weight is reported when it occurs, not when a main run refuses the result.

Run alone: python -m pytest tests/phases/test_vanishing_weights.py
"""

from __future__ import annotations

import contextlib
import io
import json

import pytest
from phases.small import MODEL
from ranks import on_ranks, program

pytestmark = pytest.mark.slow


def messages(launch, argv):
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        program(launch, argv)
    return stdout.getvalue()


def test_a_weight_that_vanishes_is_reported_once(data, reference, tmp_path):
    argv = ["--phase", "proxy", "--domains", str(data), "--save", str(tmp_path), "--train-iters", "4", *MODEL]
    (stdout,) = on_ranks(1, messages, [*argv, *reference, "--doremi-step-size", "1e6", "--doremi-smoothing", "0"])
    weights = json.loads((tmp_path / "domain_weights.json").read_text())["weights"]
    vanished = [name for name, weight in weights.items() if weight < 1e-12]
    assert vanished
    for name in vanished:
        assert stdout.count(f"warning: iteration 1: the weight of {name!r} is 0.0e+00") == 1, stdout
