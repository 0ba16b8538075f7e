"""Files that version 0.1 wrote are still read and give the results that version 0.1 gave.

tests/fixtures/version_0_1 was written by version 0.1 (commit 95921cd): data of two domains, a reference, its recorded
losses (float16), a proxy and a main run stopped after 3 of 6 steps. expected.json holds what version 0.1 wrote when it
resumed them, on one process.

Run alone: python -m pytest tests/phases/test_version_0_1.py
"""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
from phases.small import metrics, train, training_lines

pytestmark = pytest.mark.slow

FIXTURE = Path(__file__).resolve().parents[1] / "fixtures" / "version_0_1"
MODEL = shlex.split(
    "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --ffn-hidden-size 32 --swiglu --disable-bias-linear "
    "--make-vocab-size-divisible-by 16 --seq-length 16 --micro-batch-size 2 --global-batch-size 4 --lr 5e-3 "
    "--min-lr 1e-3 --seed 11 --log-interval 1"
)
# Another processor may round differently.
BOUND = 1e-5


@pytest.fixture
def old(tmp_path):
    shutil.copytree(FIXTURE, tmp_path / "old")
    return tmp_path / "old"


def assert_alike(lines, expected):
    assert len(lines) == len(expected)
    for line, before in zip(lines, expected, strict=True):
        for name, value in before.items():
            assert line[name] == pytest.approx(value, rel=BOUND, abs=BOUND), (line["iteration"], name)


@pytest.mark.parametrize(
    ("name", "phase", "flags"),
    [
        ("main", "main", "--load {old}/main"),
        ("proxy", "proxy", "--load {old}/proxy --reference-load {old}/reference"),
        ("recorded", "proxy", "--reference-losses {old}/scores"),
    ],
)
def test_it_leads_where_version_0_1_led(name, phase, flags, old):
    expected = json.loads((old / "expected.json").read_text())
    words = shlex.split(flags.format(old=old))
    lines = train(1, phase, old / "data" / "domains.json", old / name, 6, *words, model=MODEL)
    assert_alike(training_lines(lines), expected[name])
    if name == "proxy":
        learned = json.loads((old / "proxy" / "domain_weights.json").read_text())["weights"]
        assert learned == pytest.approx(expected["weights"], rel=BOUND)


def test_its_weights_file_is_taken(old, tmp_path):
    """Without the number of planned steps the file does not show that the proxy was stopped."""
    flags = ["--domain-weights", str(old / "proxy" / "domain_weights.json")]
    train(1, "main", old / "data" / "domains.json", tmp_path / "run", 2, *flags, model=MODEL)
    weights = json.loads((old / "proxy" / "domain_weights.json").read_text())["weights"]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["sampling_weights"] == pytest.approx(weights)
    assert len(metrics(tmp_path / "run")) >= 2
