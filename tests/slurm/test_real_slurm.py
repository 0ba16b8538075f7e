"""The batch scripts on a real SLURM: all stages of DoReMi over two nodes, and a job that receives a stop signal.

Run alone: python -m pytest tests/slurm/test_real_slurm.py
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from phases.small import metrics, training_lines
from ranks import run_program
from slurm.slurm_cluster import cluster, wait_for

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
# One task per node, so that a job's ranks communicate over the network.
SITE = """
PYTHON={python}
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= MASTER_ADDR=127.0.0.1
CPU_JOB=(--nodes=1 --ntasks=1 --cpus-per-task=1 --mem=500M --time=10)
SMALL_JOB=(--nodes=2 --ntasks-per-node=1 --cpus-per-task=1 --mem=500M --time=10)
MAIN_JOB=("${{SMALL_JOB[@]}}")
SIGNAL=(--signal=USR1@60)
PREPROCESS_TASKS=2
SCORE_TASKS=2
"""
EXPERIMENT = """
DATA={folder}/data
OUT={folder}/run
TRAIN_FILES=({folder}/corpus/train.jsonl)
VALID_FILES=({folder}/corpus/valid.jsonl)
TOKENIZER={folder}/t.model
WINDOWS=(--seq-length 32 --micro-batch-size 4 --global-batch-size 16 --train-iters {iters} --seed 5)
SCORE=("${{WINDOWS[@]}}" --pipeline-model-parallel-size 2)
TRAINING=(
    "${{WINDOWS[@]}}" --lr 2e-3 --min-lr 2e-4
    --save-interval 20 --log-interval 1 --eval-iters 1
)
SMALL_MODEL=(--num-layers 2 --hidden-size 32 --num-attention-heads 2 --pipeline-model-parallel-size 2)
REFERENCE=(--domain-weights natural)
PROXY=(--doremi-step-size 1.0)
MAIN_MODEL=(--num-layers 2 --hidden-size 48 --num-attention-heads 2 --zero-stage 1)
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with cluster(tmp_path_factory.mktemp("slurm")) as environ:
        yield environ


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a small corpus, its tokenizer and the site's settings."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "corpus").mkdir()
    for split, count in (("train", 240), ("valid", 48)):
        with (folder / "corpus" / f"{split}.jsonl").open("w") as file:
            for number in range(count):
                path = sorted(Path(os.__file__).parent.glob("*.py"))[number % 60]
                words = path.read_text()[200 * (number // 3) :][:1500]
                text = words if number % 3 == 0 else words.upper() if number % 3 == 1 else "".join(sorted(words))
                entry = {"text": text, "meta": {"pile_set_name": ("code", "CODE", "sorted")[number % 3]}}
                file.write(json.dumps(entry) + "\n")
    words = ["--input", folder / "corpus" / "train.jsonl", "--vocab-size", "450", "--output", folder / "t.model"]
    subprocess.run([sys.executable, ROOT / "tools" / "train_tokenizer.py", *map(str, words)], check=True)
    (folder / "site.sh").write_text(SITE.format(python=shlex.quote(sys.executable)))
    return folder


def experiment(folder: Path, name: str, iters: int) -> Path:
    path = folder / f"{name}.sh"
    path.write_text(EXPERIMENT.format(folder=folder, iters=iters))
    return path


def stdout_of(words: list[str], environ: dict[str, str]) -> str:
    done = subprocess.run(words, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def shown(job: str, environ: dict[str, str]) -> str:
    return stdout_of(["scontrol", "show", "job", job, "--oneliner"], environ)


def state_of(job: str, environ: dict[str, str]) -> str:
    return shown(job, environ).split("JobState=")[1].split()[0]


def start_soon(job: str, environ: dict[str, str]) -> None:
    """Starts a requeued job in 3 s: SLURM delays it by two minutes; nodes refuse it in the second of the requeue."""
    stdout_of(["scontrol", "update", f"JobId={job}", "StartTime=now+3"], environ)


def logs(folder: Path, last: int = 3000) -> str:
    paths = sorted(folder.rglob("*.log"))
    return "\n".join(f"== {path}\n{path.read_text(errors='replace')[-last:]}" for path in paths)


def run_all(folder: Path, environ: dict[str, str], script: Path, *stages: str) -> dict[str, str]:
    """Submits the stages; returns {stage's name and first argument: job}."""
    variables = {**environ, "SITE": str(folder / "site.sh"), "STAGES": " ".join(stages)}
    printed = stdout_of(["bash", "examples/slurm/run_all.sh", str(script)], variables)
    jobs = [line.split(": job ") for line in printed.splitlines() if ": job " in line]
    return {name.strip().split(" /")[0]: job for name, job in jobs}


def finish(folder: Path, environ: dict[str, str], job: str, seconds: float) -> None:
    ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL")
    try:
        wait_for(lambda: state_of(job, environ) in ended, seconds, f"the end of job {job}")
        assert state_of(job, environ) == "COMPLETED"
    except AssertionError as error:
        queue = stdout_of(["squeue"], environ)
        raise AssertionError(f"{error}\n{queue}\n{logs(folder)}") from error


def test_all_stages_of_doremi(slurm, folder):
    stages = ["reference", "score", "proxy", "main"]
    jobs = run_all(folder, slurm, experiment(folder, "small", 40), "preprocess", *stages)
    assert list(jobs) == ["preprocess train", "merge train", "preprocess valid", "merge valid", *stages]
    finish(folder, slurm, jobs["main"], 240)
    weights = json.loads((folder / "run" / "proxy" / "domain_weights.json").read_text())["weights"]
    assert set(weights) == {"code", "CODE", "sorted"}
    assert sum(weights.values()) == pytest.approx(1.0)
    for phase in ("reference", "proxy", "main"):
        lines = metrics(folder / "run" / phase)
        assert training_lines(lines)[-1]["iteration"] == 40
        assert training_lines(lines)[-1]["loss"] < training_lines(lines)[0]["loss"]
        assert (folder / "run" / phase / "checkpoints" / "iter_0000040" / "state.json").exists()
    config = json.loads((folder / "run" / "main" / "config.json").read_text())
    assert config["sampling_weights"] == pytest.approx(weights)
    # Submitted again, every stage finds its output complete.
    before = (folder / "run" / "main" / "metrics.jsonl").read_text()
    again = run_all(folder, slurm, folder / "small.sh", "proxy", "main")
    finish(folder, slurm, again["main"], 120)
    assert (folder / "run" / "main" / "metrics.jsonl").read_text() == before


def test_a_dry_run_asks_slurm_about_every_job_and_submits_none(slurm, folder, tmp_path):
    (tmp_path / "site.sh").write_text(SITE.format(python="true") + "MAIN_JOB=(--partition=nowhere)\n")
    variables = {**slurm, "SITE": str(tmp_path / "site.sh"), "DRY_RUN": "1"}
    words = ["bash", "examples/slurm/run_all.sh", str(experiment(folder, "dry", 40))]
    done = subprocess.run(words, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    accepted = [line.split()[1] for line in done.stdout.splitlines() if line.endswith(": accepted")]
    assert accepted == ["preprocess", "merge", "reference", "score", "proxy"]
    assert "error: job main --partition=nowhere" in done.stderr
    assert "error: 1 of the checks failed; nothing was submitted" in done.stderr
    assert stdout_of(["squeue", "--noheader"], slurm) == ""


def test_a_job_that_is_told_to_stop_saves_requeues_and_finishes(slurm, folder):
    """Its metrics equal those of a run that nothing disturbed, and the dependent job keeps waiting."""
    if not (folder / "data" / "domains.json").exists():
        jobs = run_all(folder, slurm, experiment(folder, "small", 40), "preprocess")
        finish(folder, slurm, jobs["merge valid"], 120)
    script = experiment(folder, "long", 200)
    script.write_text(script.read_text().replace(f"OUT={folder}/run", f"OUT={folder}/disturbed"))
    jobs = run_all(folder, slurm, script, "reference", "score")
    job, save = jobs["reference"], folder / "disturbed" / "reference"
    try:
        lines = save / "metrics.jsonl"
        wait_for(lambda: lines.exists() and lines.read_text().count("\n") >= 20, 60, "twenty steps")
        stdout_of(["scancel", "--signal=USR1", job], slurm)
        wait_for(lambda: state_of(job, slurm) == "PENDING", 60, "the requeue")
    except AssertionError as error:
        raise AssertionError(f"{error}\n{logs(folder / 'disturbed')}") from error
    stopped = training_lines(metrics(save))[-1]["iteration"]
    assert 20 <= stopped < 200
    start_soon(job, slurm)
    expected = without_slurm(script, folder / "undisturbed")
    for stage in ("reference", "score"):
        finish(folder, slurm, jobs[stage], 150)
    log = logs(folder / "disturbed", 10**6)
    assert "the run was stopped and has saved: requesting a requeue" in log
    assert f"stopped and saved after iteration {stopped} of 200: a signal requested it" in log
    assert training_lines(metrics(save)) == expected
    assert len(expected) == 200


def without_slurm(script: Path, save: Path) -> list[dict]:
    """The training lines of the experiment's reference on two ranks of this machine, which nothing disturbs."""
    shell = 'source "$1"; source examples/stages.sh; stage_flags reference; printf "%s\\n" "$DATA" "${FLAGS[@]}"'
    data, *flags = stdout_of(["bash", "-c", shell, "-", str(script)], dict(os.environ)).splitlines()
    argv = ["--phase", "reference", "--domains", f"{data}/domains.json", *flags]
    run_program(2, [*argv, "--save", str(save), "--load", str(save)])
    return training_lines(metrics(save))


# Stands in for Python: on a script's first stop signal it exits as a run does that has saved.
STAND_IN = """#!/bin/bash
echo run >> {folder}/$SLURM_ARRAY_JOB_ID.$SLURM_ARRAY_TASK_ID.$SLURM_PROCID
if [ "$SLURM_ARRAY_TASK_ID" = "$STOPPED" ] && [ "$SLURM_RESTART_COUNT" = "" ]; then
    exit 3
fi
sleep 3
"""


def test_a_stopped_task_of_an_array_requeues_itself_alone(slurm, folder, tmp_path):
    """Tests both tasks in turn, because one of them has the array's job number."""
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN.format(folder=tmp_path))
    stand_in.chmod(0o755)
    (tmp_path / "site.sh").write_text(SITE.format(python=stand_in))
    variables = {"SITE": str(tmp_path / "site.sh"), "STAGES": "score"}
    script = experiment(folder, "array", 40)
    arrays = {}
    for stopped in "01":
        printed = stdout_of(
            ["bash", "examples/slurm/run_all.sh", str(script)], {**slurm, **variables, "STOPPED": stopped}
        )
        arrays[stopped] = printed.split(": job ")[1].split()[0]
    for stopped, array in arrays.items():
        task = f"{array}_{stopped}"
        wait_for(lambda t=task: state_of(t, slurm) == "PENDING" and "Restarts=1" in shown(t, slurm), 60, "the requeue")
        start_soon(task, slurm)
    for stopped, array in arrays.items():
        for task in "01":
            finish(folder, slurm, f"{array}_{task}", 60)
            for rank in "01":
                runs = (tmp_path / f"{array}.{task}.{rank}").read_text().count("run")
                assert runs == (2 if task == stopped else 1), f"task {task}, of which {stopped} was stopped"
