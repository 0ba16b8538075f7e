"""The quickstart as a user runs it, on a small corpus of their own, with few steps.

Run alone: python -m pytest tests/test_quickstart.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def quickstart(out: Path, *arguments: object, **variables: object) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "OUT": str(out),
        "OMP_NUM_THREADS": "1",
        **{name: str(value) for name, value in variables.items()},
    }
    command = ["bash", "examples/quickstart.sh", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    command = [sys.executable, "tools/embedded_corpus.py", "--output-dir", str(folder), "--domain-bytes", "60000"]
    subprocess.run([*command, "--valid-fraction", "0.3"], cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.mark.slow
def test_the_whole_of_doremi_on_ones_own_files(corpus, tmp_path):
    out = tmp_path / "out"
    small = {"TRAIN_ITERS": 6, "VOCAB_SIZE": 400, "SEQ_LENGTH": 16, "HIDDEN": 32, "MAIN_HIDDEN": 32, "EVAL_ITERS": 1}
    arguments = (corpus / "train.jsonl", corpus / "valid.jsonl")
    done = quickstart(out, *arguments, **small)
    assert done.returncode == 0, done.stderr[-3000:]
    for word in ("learned", "boilerplate", "uniform mean", "One run of each cannot tell", "Planted domain noise"):
        assert word in done.stdout
    names = set(json.loads((out / "proxy" / "domain_weights.json").read_text())["weights"])
    assert len(names) == 8
    config = json.loads((out / "proxy" / "config.json").read_text())
    assert config["topology"] == {"pipe_size": 2, "data_size": 1, "tensor_size": 1}
    lines = [json.loads(line) for line in (out / "proxy" / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "loss" in line] == list(range(1, 7))
    main = json.loads((out / "main" / "config.json").read_text())["sampling_weights"]
    learned = json.loads((out / "proxy" / "domain_weights.json").read_text())["weights"]
    assert main == pytest.approx(learned, rel=1e-12)
    assert list(out.glob("*/tensorboard/events*"))
    assert list((out / "report").glob("*.png"))
    assert (out / "report" / "report.html").stat().st_size > 10_000

    # Started again it finds everything done; with other settings it refuses to mix two runs.
    before = (out / "proxy" / "metrics.jsonl").read_text()
    other = quickstart(out, *arguments, **{**small, "VOCAB_SIZE": 500})
    assert other.returncode == 2
    assert "other settings" in other.stderr
    assert (out / "proxy" / "metrics.jsonl").read_text() == before


def test_usage():
    done = subprocess.run(
        ["bash", "examples/quickstart.sh", "one.jsonl"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "usage:" in done.stderr
