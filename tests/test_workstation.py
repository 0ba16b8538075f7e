"""examples/workstation: the chain on two CPU processes, and what is said before anything is spent.

Run alone: python -m pytest tests/test_workstation.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import ROOT

EXPERIMENT = """
DATA={data}
OUT={out}
WINDOWS=(--seq-length 16 --global-batch-size 8 --train-iters 2 --seed 11)
TRAINING=("${{WINDOWS[@]}}" --log-interval 1)
SMALL_MODEL=(--num-layers 2 --hidden-size 32 --num-attention-heads 4)
MAIN_MODEL=(--num-layers 1 --hidden-size 64 --num-attention-heads 4)
SCORE=("${{WINDOWS[@]}}")
REFERENCE=(--domain-weights natural)
PROXY=(--doremi-step-size 0.5)
"""


@pytest.fixture
def workstation(data, tmp_path):
    """Runs the script on an experiment whose data exist, and returns the finished process."""
    experiment = tmp_path / "experiment.sh"
    experiment.write_text(EXPERIMENT.format(data=data.parent, out=tmp_path / "run"))

    def start(python: Path | str = sys.executable, **variables: str) -> subprocess.CompletedProcess:
        environment = {**os.environ, "PYTHON": str(python), "DEVICE": "cpu", "OMP_NUM_THREADS": "1", **variables}
        command = ["bash", str(ROOT / "examples/workstation/run_all.sh"), str(experiment)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    return start


@pytest.mark.slow
def test_the_chain_on_two_processes(workstation, ready_python, tmp_path):
    done = workstation(ready_python, NPROC="2", STAGES="reference proxy main")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "tensor 1 x pipeline 1 x data 2" in done.stdout
    run = tmp_path / "run"
    for name, hidden in (("reference", 32), ("proxy", 32), ("main", 64)):
        config = json.loads((run / name / "config.json").read_text())
        assert config["topology"] == {"pipe_size": 1, "data_size": 2, "tensor_size": 1}
        assert config["settings"]["data"]["micro_batch_size"] == 4
        assert config["settings"]["model"]["hidden_size"] == hidden
        assert "held-out" in (run / "logs" / f"{name}.log").read_text()
    learned = json.loads((run / "proxy" / "domain_weights.json").read_text())["weights"]
    assert json.loads((run / "main" / "config.json").read_text())["sampling_weights"] == pytest.approx(learned)


def test_a_dry_run_plans_and_writes_nothing(workstation, tmp_path):
    done = workstation(NPROC="2", TP="2", DRY_RUN="1", STAGES="proxy main")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("--tensor-model-parallel-size 2 ") == 2
    lines = (done.stdout + done.stderr).splitlines()
    assert [line for line in lines if len(line) > 120 and str(tmp_path) not in line] == []
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"NPROC": "3", "TP": "2"}, "start 2 or 4 processes"),
        ({"NPROC": "5", "STAGES": "main"}, "--global-batch-size 8 is not a multiple of 5"),
        ({"NPROC": "two"}, "NPROC=two: give a number"),
        ({"STAGES": "train"}, "unknown stage 'train'"),
        ({"DEVICE": "tpu"}, "DEVICE=tpu: give gpu or cpu"),
        ({"DEVICE": "gpu", "CUDA_VISIBLE_DEVICES": ""}, "DEVICE=cpu trains on CPUs"),
    ],
    ids=lambda value: " ".join(value.values()) if isinstance(value, dict) else "",
)
def test_what_is_wrong_is_said_first(variables, words, workstation, tmp_path):
    done = workstation(**variables)
    assert done.returncode == 2
    assert words in done.stderr
    assert not (tmp_path / "run").exists()
