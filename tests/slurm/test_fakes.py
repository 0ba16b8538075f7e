"""The batch scripts against stand-ins for SLURM's commands that are slow, split, verbose or failing.

Run alone: python -m pytest tests/slurm/test_fakes.py
"""

from __future__ import annotations

import getpass
import os
import subprocess
import sys
from pathlib import Path

import pytest
from slurm.test_scripts import ROOT, SCRIPTS

from megatron_doremi.cluster.process_group import nccl_variables

EXPERIMENT = """
DATA={folder}/data
OUT={folder}/run
TRAINING=() SMALL_MODEL=() REFERENCE=() PROXY=() MAIN_MODEL=() SCORE=(--seq-length 16)
TRAIN_FILES=(a.jsonl) VALID_FILES=(b.jsonl) TOKENIZER=t
"""
# Prints its arguments and variables.
SRUN = 'echo "srun: $* addr=$MASTER_ADDR port=${MASTER_PORT-} end=${SLURM_JOB_END_TIME-} cpus=${SRUN_CPUS_PER_TASK-}"'
# Variables of NCCL, of torch and of srun that the scripts set, and one that they leave to the site.
CLUSTER = {
    "SRUN_CPUS_PER_TASK": "8",
    "TORCH_FR_BUFFER_SIZE": "2000",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    "NCCL_DEBUG": "WARN",
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    "TORCHINDUCTOR_CACHE_DIR": f"/tmp/torchinductor_{getpass.getuser()}",
    "NCCL_SOCKET_IFNAME": "",
}
QUIET = {"squeue": "exit 1", "scontrol": "[ $1 = requeue ] || echo n1", "srun": SRUN, "sbatch": "echo 7"}


class Slurm:
    """A folder of stand-ins; `run` runs a script with them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.calls = folder / "calls"
        (folder / "experiment.sh").write_text(EXPERIMENT.format(folder=folder))

    def run(self, script: str, *words: str, environ=None, **commands: str) -> subprocess.CompletedProcess:
        for name, does in {**QUIET, **commands}.items():
            path = self.folder / name
            path.write_text(f'#!/bin/bash\necho "{name} $*" >> "{self.calls}"\n{does}\n')
            path.chmod(0o755)
        set_by_scripts = ("SLURM", "MASTER", *CLUSTER, "PYTORCH_CUDA_ALLOC_CONF")
        variables = {k: v for k, v in os.environ.items() if not k.startswith(set_by_scripts)}
        variables |= {"PATH": f"{self.folder}:{os.environ['PATH']}", "PYTHON": "python", "SLURM_SUBMIT_DIR": str(ROOT)}
        variables |= {"EXPERIMENT": str(self.folder / "experiment.sh"), "TZ": "UTC", "SLURM_JOB_ID": "7"}
        variables |= {"SLURM_JOB_NODELIST": "n[1-2]", **(environ or {})}
        command = ["bash", str(SCRIPTS / script), *words]
        return subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)

    def called(self, name: str) -> list[str]:
        lines = self.calls.read_text().splitlines() if self.calls.exists() else []
        return [line for line in lines if line.startswith(name)]


@pytest.fixture
def slurm(tmp_path):
    return Slurm(tmp_path)


@pytest.mark.parametrize(
    ("scontrol", "host"),
    [
        # Names of more than a pipe holds: version 0.1's `head -n 1` ended scontrol by SIGPIPE, exit code 141.
        ("for k in $(seq 9000); do echo a-node-with-a-long-name-$k; done", "a-node-with-a-long-name-1"),
        ("echo n1; sleep 1; echo n2", "n1"),
        ("echo 'Welcome to the cluster!'; echo; echo n1; echo n2", "n1"),
        ("echo n1; exit 1", ""),
        ("exit 1", ""),
    ],
    ids=["many", "slow", "verbose", "half", "failing"],
)
def test_the_first_node(scontrol, host, slurm):
    done = slurm.run("main.sbatch", scontrol=scontrol)
    assert done.returncode == 0, done.stderr
    assert f"addr={host} port= " in done.stdout


@pytest.mark.parametrize(
    ("squeue", "end"),
    [
        ("[[ $* == *--jobs=7_1* ]] && echo 2033-05-18T03:33:20", "2000000000"),
        ("sleep 1; echo 2033-05-18T03:33:21; echo 2033-05-18T03:33:20", "2000000000"),
        ("echo 'squeue: use --me, please'; echo 2033-05-18T03:33:20; echo N/A", "2000000000"),
        ("echo", ""),
        ("echo N/A", ""),
        ("echo 2033-99-99T03:33:20", ""),
        ("exit 1", ""),
    ],
    ids=["plain", "two lines", "verbose", "empty", "unknown", "not a date", "failing"],
)
def test_the_end_of_an_allocation_where_slurm_does_not_set_it(squeue, end, slurm):
    task = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
    done = slurm.run("score.sbatch", environ=task, squeue=squeue)
    assert done.returncode == 0, done.stderr
    assert f"end={end} " in done.stdout


def test_srun_takes_the_cores_of_the_job(slurm):
    done = slurm.run("main.sbatch", environ={"SLURM_CPUS_PER_TASK": "8"})
    assert "cpus=8" in done.stdout
    assert "--cpu-bind=cores" in done.stdout


def tasks_end(*codes: int) -> str:
    """An srun whose tasks exit with these codes; a negative code is a signal."""
    says = [
        f"srun: error: n1: task {k}: {'Killed' if code < 0 else f'Exited with exit code {code}'}"
        for k, code in enumerate(codes)
        if code
    ]
    lines = "; ".join(f"echo '{line}' >&2" for line in says) or "true"
    return f"echo 0: a line; echo '1: srun: error: n1: task 9: Killed' >&2; {lines}; exit {max(map(abs, codes))}"


@pytest.mark.parametrize(
    ("codes", "code", "requeued"),
    [
        ((0, 0), 0, False),
        ((3, 3), 3, True),
        ((3, 0), 3, True),
        ((1, 1), 1, False),
        ((3, 1), 1, False),
        ((-3, 3), 1, False),
    ],
)
def test_only_a_job_that_was_stopped_everywhere_is_requeued(codes, code, requeued, slurm):
    """srun exits with the highest code: 3, even if another rank failed with 1."""
    done = slurm.run("main.sbatch", srun=tasks_end(*codes))
    assert done.returncode == code, done.stderr
    assert bool(slurm.called("scontrol requeue 7")) == requeued
    assert ("\nrequeued\n" in done.stdout) == requeued
    assert "0: a line" in done.stdout
    assert done.stderr.count("Exited with exit code") == sum(code > 0 for code in codes)


@pytest.mark.parametrize(
    ("lines", "code", "requeued"),
    [
        ("seq -f 'srun: error: n1: task %g: Exited with exit code 1' 5000", 3, False),
        ("seq -f 'srun: error: n1: task %g: Exited with exit code 3' 5000", 3, True),
        ("true", 3, True),
        ("echo srun: error: n1: some other trouble", 3, True),
        ("true", 1, False),
    ],
    ids=["5000 failed", "5000 stopped", "no line", "no task", "failed without a line"],
)
def test_every_line_of_srun_is_read(lines, code, requeued, slurm):
    """A reader that ended at the first failed task reported "all stopped" for 80 or more lines. If srun names no task
    (--quiet), its own exit code, the highest of all tasks, decides."""
    done = slurm.run("main.sbatch", srun=f"{lines} >&2; exit {code}")
    assert done.returncode == (code if requeued or code != 3 else 1), done.stderr[-1000:]
    assert bool(slurm.called("scontrol requeue 7")) == requeued


def test_a_requeue_that_fails_is_not_said_to_have_happened(slurm):
    done = slurm.run("main.sbatch", srun=tasks_end(3, 3), scontrol="[ $1 = show ] && echo n1 || exit 1")
    assert done.returncode == 3
    assert "\nrequeued\n" not in done.stdout
    assert "scontrol requeue 7 failed; submit the job again to resume" in done.stderr


def test_a_wrong_stage_is_found_before_anything_is_submitted(slurm):
    done = slurm.run("run_all.sh", str(slurm.folder / "experiment.sh"), environ={"STAGES": "proxy mian"})
    assert done.returncode == 2
    assert "unknown stage 'mian' in STAGES" in done.stderr
    assert not slurm.called("sbatch")


@pytest.mark.parametrize("sbatch", ["echo 'Welcome!'; echo '{n};cluster'", "sleep 0.3; echo '{n}'"])
def test_jobs_are_chained_by_their_numbers(sbatch, slurm):
    numbered = f"n=$(($(wc -l < {slurm.calls}) + 10)); " + sbatch.replace("'{n};cluster'", '"$n;cluster"').replace(
        "'{n}'", '"$n"'
    )
    done = slurm.run(
        "run_all.sh", str(slurm.folder / "experiment.sh"), environ={"STAGES": "proxy main"}, sbatch=numbered
    )
    assert done.returncode == 0, done.stderr
    assert "proxy: job 11" in done.stdout
    first, second = slurm.called("sbatch")
    assert "--dependency" not in first
    assert "--dependency=afterok:11 " in second


def test_the_jobs_of_a_round_are_judged_by_one_that_waits_for_all_proxies(slurm):
    experiment = slurm.folder / "experiment.sh"
    text = experiment.read_text().replace(f"OUT={slurm.folder}/run", "OUT=${OUT:-" + f"{slurm.folder}/run" + "}")
    numbered = f"echo $(($(wc -l < {slurm.calls}) + 10)); echo $OUT $RUN_SEED $REFERENCE_WEIGHTS >> {slurm.calls}.env"
    done = slurm.run("rounds.sh", str(experiment), sbatch=numbered)
    assert done.returncode == 2
    assert "so every chain would write to that folder" in done.stderr
    experiment.write_text(text)
    rounds = slurm.folder / "run" / "rounds"
    (rounds / "round-2").mkdir(parents=True)
    (rounds / "round-2" / "reference_weights.json").touch()
    done = slurm.run("rounds.sh", str(experiment), environ={"SEEDS": "2"}, sbatch=numbered)
    assert done.returncode == 0, done.stderr
    jobs = slurm.called("sbatch")
    assert [job.split("examples/slurm/")[1] for job in jobs] == [
        *("reference.sbatch", "score.sbatch", "proxy.sbatch"),
        *("reference.sbatch", "score.sbatch", "proxy.sbatch"),
        "judge.sbatch",
    ]
    assert "--dependency=afterok:13:16 --kill-on-invalid-dep=yes" in jobs[-1]
    assert "--dependency" not in jobs[3]
    weights = rounds / "round-2" / "reference_weights.json"
    given = [line.split() for line in (slurm.folder / "calls.env").read_text().splitlines()]
    assert given[:6:3] == [[f"{rounds}/round-2/seed-{n}", str(1233 + n), str(weights)] for n in (1, 2)]
    (rounds / "domain_weights.json").touch()
    done = slurm.run("rounds.sh", str(experiment), sbatch=numbered, python="echo judged")
    assert "the rounds have ended" in done.stdout
    assert len(slurm.called("sbatch")) == 7


@pytest.mark.parametrize("failure", ["echo 'sbatch: error: no such partition' >&2; exit 1", "echo queued, thank you"])
def test_a_failed_sbatch_names_what_was_submitted(failure, slurm):
    third = f"[ $(wc -l < {slurm.calls}) -lt 3 ] && echo $((10 + $(wc -l < {slurm.calls}))) || {{ {failure}; }}"
    done = slurm.run(
        "run_all.sh", str(slurm.folder / "experiment.sh"), environ={"STAGES": "reference score proxy"}, sbatch=third
    )
    assert done.returncode == 1
    assert "to cancel them: scancel 11 12\n" in done.stderr
    assert len(slurm.called("sbatch")) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ('--domain-key "my key"', ["--domain-key", "my key"]),
        ("--a 'x  y' --b \"it's\" \\$HOME *", ["--a", "x  y", "--b", "it's", "$HOME", "*"]),
        ("--empty ''", ["--empty", ""]),
        ("", []),
    ],
)
def test_options_keep_their_quotes(options, words, slurm):
    python = f'{sys.executable} -c "import sys; print(sys.argv[1:])" "$@"'
    task = {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "1", "OPTIONS": options}
    done = slurm.run("preprocess.sbatch", "train", "a.jsonl", environ=task, python=python)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith(f"'--append-eod'{''.join(f', {word!r}' for word in words)}]")


def test_options_of_an_experiment_may_be_an_array_and_an_open_quote_is_said(slurm):
    python = f'{sys.executable} -c "import sys; print(sys.argv[1:])" "$@"'
    task = {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "1"}
    done = slurm.run("preprocess.sbatch", "train", "a", environ={**task, "OPTIONS": "--a 'b"}, python=python)
    assert done.returncode == 2
    assert "unclosed quote" in done.stderr
    with (slurm.folder / "experiment.sh").open("a") as file:
        file.write('OPTIONS=(--domain-key "my key")\n')
    done = slurm.run("preprocess.sbatch", "train", "a", environ=task, python=python)
    assert done.stdout.rstrip().endswith("'--domain-key', 'my key']")


DRY_EXPERIMENT = """
DATA={data}
OUT={folder}/run
SMALL_MODEL=(--num-layers 2 --hidden-size 32 --num-attention-heads 4 --micro-batch-size 1)
MAIN_MODEL=("${{SMALL_MODEL[@]}}" --tensor-model-parallel-size 4)
WINDOWS=(--seq-length 8 --train-iters 10 --global-batch-size 32)
TRAINING=("${{WINDOWS[@]}}") SCORE=("${{WINDOWS[@]}}") REFERENCE=() PROXY=({proxy})
TRAIN_FILES=({folder}/a.jsonl) VALID_FILES=({folder}/b.jsonl) TOKENIZER={folder}/experiment.sh
SMALL_JOB=(--nodes=2 --ntasks-per-node 8) MAIN_JOB=(--ntasks=16) SIGNAL=(--signal=USR1@300)
"""


def dry_run(slurm: Slurm, stages: str, proxy: str = "", sbatch: str = "[ $1 = --test-only ]"):
    experiment, data = slurm.folder / "experiment.sh", ROOT / "tests/fixtures/version_0_1/data"
    experiment.write_text(DRY_EXPERIMENT.format(folder=slurm.folder, data=data, proxy=proxy))
    (slurm.folder / "a.jsonl").touch()
    environ = {"DRY_RUN": "1", "PYTHON": sys.executable, "STAGES": stages}
    done = slurm.run("run_all.sh", str(experiment), environ=environ, sbatch=sbatch)
    assert all("--test-only" in call for call in slurm.called("sbatch"))
    assert not (slurm.folder / "run").exists()
    return done


def test_a_dry_run_plans_a_stage_before_the_earlier_ones_and_submits_nothing(slurm):
    done = dry_run(slurm, "main")
    assert done.returncode == 0, done.stderr
    assert "main, 16 ranks:\n  layout: tensor 4 x pipeline 1 x data 4 = 16 ranks" in done.stdout
    assert "job main --ntasks=16 --signal=USR1@300: accepted" in done.stdout
    assert done.stdout.endswith("all checks passed; nothing was submitted\n")


def test_a_dry_run_collects_what_is_wrong_with_files_flags_and_jobs(slurm):
    done = dry_run(slurm, "preprocess proxy", "--doremi-smoothing 2", "[[ $* != *merge.sbatch* ]]")
    assert done.returncode == 2
    assert "preprocess train: 1 files and the tokenizer can be read" in done.stdout
    assert f"error: preprocess valid: cannot read '{slurm.folder}/b.jsonl'" in done.stderr
    assert "error: job merge" in done.stderr
    assert "error: proxy, 16 ranks: error: 1 fault in the input:\n  [1] --doremi-smoothing: 2" in done.stderr
    assert done.stderr.endswith("3 of the checks failed; nothing was submitted\n")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {}),
        # What the user or the site has set stays.
        (
            {**dict.fromkeys(CLUSTER, "mine"), "CPU_BIND": "none"},
            {**dict.fromkeys(CLUSTER, "mine"), "--cpu-bind": "none"},
        ),
        (
            {"PYTORCH_CUDA_ALLOC_CONF": "backend:native", "SLURM_TMPDIR": "/local/7"},
            {
                "PYTORCH_ALLOC_CONF": "backend:native",
                "TORCHINDUCTOR_CACHE_DIR": f"/local/7/torchinductor_{getpass.getuser()}",
            },
        ),
    ],
    ids=["defaults", "given", "older name and local disk"],
)
def test_the_environment_of_a_cluster(given, expected, slurm):
    prints = "; ".join(f'echo "{name}=${{{name}-}}."' for name in CLUSTER)
    environ = {"SLURM_CPUS_PER_TASK": "8", **given}
    done = slurm.run("main.sbatch", environ=environ, srun=f'echo "$*"; {prints}')
    assert done.returncode == 0, done.stderr
    for name, value in {**CLUSTER, "--cpu-bind": "cores", **expected}.items():
        assert f"{name}={value}{' ' if name.startswith('--') else '.'}" in done.stdout


@pytest.mark.parametrize(("minutes", "seconds"), [(8.0, "600"), (0.2, "132"), (30.0, "1920")])
def test_nccl_outwaits_the_programs_own_watchdog(minutes, seconds):
    """The process group gives up a minute after the watchdog, and NCCL's monitor another one later."""
    assert nccl_variables(minutes) == {"TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": seconds}
