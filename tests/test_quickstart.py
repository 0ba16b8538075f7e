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


def quickstart(out: Path, *arguments: object, cwd: Path = ROOT, **variables: object) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "OUT": str(out),
        "OMP_NUM_THREADS": "1",
        **{name: str(value) for name, value in variables.items()},
    }
    command = ["bash", str(ROOT / "examples/quickstart.sh"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=400, check=False)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder of folders of texts, a domain each."""
    folder = tmp_path_factory.mktemp("corpus")
    for domain, words in (("Letters", "ab"), ("Numbers", "12"), ("Signs", "+-")):
        (folder / domain).mkdir()
        for number in range(40):
            text = "".join(words[(number * n) % 7 % 2] + " " * (n % 3 == 0) for n in range(200))
            (folder / domain / f"{number}.txt").write_text(f"{domain} {number}: {text}\n")
    return folder


@pytest.mark.slow
def test_the_whole_of_doremi_on_ones_own_files(corpus, ready_python, tmp_path):
    """Up to the first run by Python itself; the runs start in processes that have imported what they need."""
    out = tmp_path / "out"
    # A mistake that the dry run finds does not hold the folder: nothing was trained there yet.
    wrong = quickstart(out, corpus, LR="fast")
    assert wrong.returncode == 2
    assert "--lr: fast" in wrong.stderr
    small = {"SEEDS": 2, "TRAIN_ITERS": 6, "SEQ_LENGTH": 16, "HIDDEN": 16, "LAYERS": 1, "GLOBAL_BATCH_SIZE": 6}
    done = quickstart(out, corpus, **small, PYTHON=ready_python)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Over 2 paired seeds" in done.stdout
    printed = [line for line in done.stdout.splitlines() if str(tmp_path) not in line]
    assert max(map(len, printed)) <= 120
    assert len(printed) < 100
    for seed in (1, 2):
        runs = {run.name: run for run in (out / f"seed-{seed}").iterdir()}
        assert runs.keys() == {"uniform", "natural", "proxy", "doremi"}
        configs = {name: json.loads((run / "config.json").read_text()) for name, run in runs.items()}
        assert {config["settings"]["data"]["seed"] for config in configs.values()} == {seed}
        learned = json.loads((runs["proxy"] / "domain_weights.json").read_text())["weights"]
        assert learned.keys() == {"Letters", "Numbers", "Signs"}
        assert configs["doremi"]["sampling_weights"] == pytest.approx(learned, rel=1e-12)
        assert configs["uniform"]["sampling_weights"] == pytest.approx(dict.fromkeys(learned, 1 / 3))
        for run in runs.values():
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            assert lines[-1]["iteration"] == 6
            assert lines[-1]["eval_bpb"].keys() == learned.keys()
    results = json.loads((out / "report" / "results.json").read_text())
    assert results["unit"] == "bits per byte"
    assert (out / "report" / "report.html").stat().st_size > 10_000

    # Started again it finds everything done; with other settings it refuses to mix two runs.
    before = (out / "seed-1" / "proxy" / "metrics.jsonl").read_text()
    other = quickstart(out, corpus, **{**small, "VOCAB_SIZE": 500})
    assert other.returncode == 2
    assert "other settings\n       there: VOCAB_SIZE=257\n       here:  VOCAB_SIZE=500\n" in other.stderr
    assert (out / "seed-1" / "proxy" / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("arguments", "variables", "expected"),
    [
        (("1", "2", "3"), {}, "usage:"),
        ((), {"NPROC": 3, "TP": 2}, "NPROC must be a multiple of TP x PP"),
        ((), {"NPROC": 5}, "GLOBAL_BATCH_SIZE a multiple of NPROC"),
        ((), {"SEEDS": "two"}, "SEEDS=two"),
        ((), {"JOBS": 0}, "JOBS=0"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(tmp_path, arguments, variables, expected):
    done = quickstart(tmp_path / "out", *arguments, **variables)
    assert done.returncode == 2
    assert expected in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("domains", "expected"),
    [({"Web": 40, "Code": 1}, "domain 'Code'"), ({"A": 1, "B": 1}, "held out")],
)
def test_data_that_no_run_can_use_are_found_before_the_first_run(tmp_path, domains, expected):
    # Relative to the folder in which the script is called.
    for domain, documents in domains.items():
        (tmp_path / "texts" / domain).mkdir(parents=True)
        for number in range(documents):
            (tmp_path / "texts" / domain / f"{number}.txt").write_text(f"{number} " * (20 if documents > 1 else 1))
    done = quickstart(tmp_path / "out", "texts", cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert expected in done.stderr
    assert "3. Runs" not in done.stdout
