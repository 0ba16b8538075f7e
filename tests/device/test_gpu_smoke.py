"""The script for a GPU: its quick checks with tiny models on the CPU here, and for real where there is a GPU.

Run alone: python -m pytest tests/device/test_gpu_smoke.py
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys

import pytest
import torch
from ranks import ROOT


def smoke(tmp_path, *flags, **environment):
    """The script's exit code and its lines, from the file that it writes."""
    command = ["bash", str(ROOT / "benchmarks" / "gpu_smoke.sh"), *flags]
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable, **environment}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    lines = (tmp_path / "gpu_smoke.jsonl").read_text().splitlines()
    assert lines == done.stdout.splitlines(), done.stderr
    return done.returncode, [json.loads(line) for line in lines]


@pytest.mark.slow
def test_quick_checks_on_the_cpu(tmp_path):
    code, lines = smoke(tmp_path, "--cpu", "--only", "versions,kernels,compiled,flags")
    assert [line["check"] for line in lines] == ["versions", "kernels", "compiled", "flags"]
    assert all(line["ok"] for line in lines), lines
    assert code == 0
    assert lines[0]["result"]["backend"] == "gloo"


def test_a_check_that_hangs_costs_its_share(tmp_path):
    """Importing torch takes longer than this limit; the next check is said to have had no time."""
    code, lines = smoke(tmp_path, "--cpu", "--only", "versions,float32", "--seconds", "1.05")
    assert code == 1
    assert (lines[0]["check"], lines[0]["ok"], lines[0]["error"]) == ("versions", False, "no end within 1 s")
    assert lines[1] == {"check": "float32", "ok": False, "cpu": True, "error": "no time left", "seconds": 0.0}


@functools.cache
def missing_gpu() -> str:
    """Why there is no GPU here, or "" where there is one. Asked in a process of its own: the suite hides GPUs."""
    if torch.version.cuda is None:
        return "torch was built without CUDA"
    ask = "import torch; print(torch.cuda.device_count())"
    done = subprocess.run([sys.executable, "-c", ask], env=with_gpus(), capture_output=True, text=True, check=False)
    return "" if done.stdout.strip().isdigit() and int(done.stdout) else "no CUDA GPU"


def with_gpus() -> dict[str, str]:
    """The environment with the GPUs that conftest.py has hidden."""
    environment = {
        key: value for key, value in os.environ.items() if key not in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR")
    }
    shown = os.environ["MEGATRON_DOREMI_GPUS"]
    return environment if shown == "all" else {**environment, "CUDA_VISIBLE_DEVICES": shown}


@pytest.mark.gpu
@pytest.mark.parametrize("check", ["versions", "float32", "program", "resume", "documents", "sync", "flags"])
def test_on_a_gpu(check, tmp_path):
    if missing_gpu():
        pytest.skip(missing_gpu())
    command = ["bash", str(ROOT / "benchmarks" / "gpu_smoke.sh"), "--only", check]
    environment = {**with_gpus(), "OUT": str(tmp_path), "PYTHON": sys.executable}
    subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    line = json.loads((tmp_path / "gpu_smoke.jsonl").read_text())
    assert line["ok"], line
    if check == "versions":
        assert (line["result"]["device"], line["result"]["backend"]) == ("cuda:0", "nccl")
