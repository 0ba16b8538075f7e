"""The batch scripts without SLURM: a dry run checks each script's flags for a small experiment and for The Pile.

Run alone: python -m pytest tests/slurm/test_scripts.py
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest
from phases.small import write_data
from ranks import unwrapped
from slurm.accepting import path_with_sbatch

from megatron_doremi.shapes import PAPER_SHAPES

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "examples" / "slurm"
PHASES = ("reference", "score", "proxy", "main")
SMALL = """
TRAINING=(--seq-length 16 --global-batch-size 8 --micro-batch-size 2 --train-iters 2 --seed 11)
SCORE=(--seq-length 16 --global-batch-size 8 --micro-batch-size 2 --train-iters 2 --seed 11)
SMALL_MODEL=(--num-layers 2 --hidden-size 32 --num-attention-heads 4)
REFERENCE=(--domain-weights natural)
PROXY=(--doremi-step-size 0.5)
MAIN_MODEL=(--num-layers 4 --hidden-size 64 --num-attention-heads 4 --tensor-model-parallel-size 2)
"""


@pytest.fixture(autouse=True)
def python(ready_python, monkeypatch):
    """Of all scripts here; test_fakes.py and planning/test_h100.py run them under Python itself."""
    monkeypatch.setenv("PYTHON", str(ready_python))


def script(name: str, *words: str, **environ: object) -> subprocess.CompletedProcess:
    """Runs a script with a job's variables."""
    variables = {**os.environ, "SLURM_SUBMIT_DIR": str(ROOT)}
    variables |= {key: str(value) for key, value in environ.items()}
    words = ("bash", str(SCRIPTS / name), *words)
    return subprocess.run(words, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/**/*.s*")), ids=lambda path: path.name)
def test_bash_parses_it_and_stops_at_errors(path):
    subprocess.run(["bash", "-n", path], check=True)
    text = path.read_text()
    sourced = path.name in (
        "site.sh",
        "common.sh",
        "stages.sh",
        "environment.sh",
        "pile.sh",
        "h100.sh",
        "own_data.sh",
        "study.sh",
    )
    assert sourced != ("set -euo pipefail" in text)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """An experiment whose data exist and whose runs do not."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "data").mkdir()
    write_data(folder / "data", tokens=300)
    (folder / "small.sh").write_text(f"DATA={folder}/data\nOUT={folder}/run\n{SMALL}")
    return folder


def settings_of(done: subprocess.CompletedProcess) -> tuple[dict, str]:
    """The settings that a dry run printed, and the lines after them."""
    assert done.returncode == 0, done.stderr
    text, _, layout_lines = done.stdout.partition("\nlayout: ")
    return json.loads(text), layout_lines


WEIGHTS = {
    "reference": "natural",
    "score": "uniform",
    "proxy": "uniform",
    "main": "{}/run/proxy/domain_weights.json",
}


@pytest.mark.parametrize("phase", PHASES)
def test_the_flags_of_each_phase(phase, small):
    task = {"SLURM_ARRAY_TASK_ID": 1, "SLURM_ARRAY_TASK_COUNT": 3}
    settings, layout_lines = settings_of(script(f"{phase}.sbatch", EXPERIMENT=small / "small.sh", DRY_RUN=4, **task))
    assert settings["data"]["phase"] == phase
    assert settings["data"]["train_iters"] == 2
    assert settings["data"]["domains"] == f"{small}/data/domains.json"
    assert layout_lines.startswith(f"tensor {2 if phase == 'main' else 1} x ")
    assert settings["model"]["hidden_size"] == (64 if phase == "main" else 32)
    assert settings["data"]["domain_weights"] == WEIGHTS[phase].format(small)
    if phase == "score":
        assert (settings["doremi"]["shard"], settings["doremi"]["num_shards"]) == (1, 3)
    else:
        assert settings["run"]["load"] == settings["run"]["save"]
    if phase == "proxy":
        assert settings["doremi"]["reference_losses"] == f"{small}/run/scores"
    missing = {"score": "/reference", "proxy": "/scores", "main": "/proxy/domain_weights.json"}
    if phase in missing:
        assert f"{small}/run{missing[phase]} does not exist yet: " in unwrapped(layout_lines)
    assert not (small / "run").exists()


@pytest.fixture(scope="module")
def pile(tmp_path_factory):
    """The Pile's 22 domains with the paper's vocabulary, a few windows each."""
    folder = tmp_path_factory.mktemp("pile")
    names = json.loads((ROOT / "examples" / "domains" / "pile.json").read_text())["domains"]
    manifest = write_data(folder, num_domains=22, tokens=5000, held_out=2000)
    entry = json.loads(manifest.read_text())
    for domain, name in zip(entry["domains"], names, strict=True):
        domain["name"] = name
    entry["tokenizer"]["vocab_size"] = 256_000
    manifest.write_text(json.dumps(entry))
    return folder


@pytest.mark.parametrize(
    ("phase", "ranks", "shape", "layout"),
    [
        ("reference", 8, "280m", "tensor 1 x pipeline 1 x data 8 "),
        ("proxy", 8, "280m", "tensor 1 x pipeline 1 x data 8 "),
        ("main", 64, "8b", "tensor 4 x pipeline 2 x data 8 "),
    ],
)
def test_the_papers_hyperparameters(phase, ranks, shape, layout, pile):
    """Xie et al. 2023, section 3 and its appendix on training."""
    settings, layout_lines = settings_of(script(f"{phase}.sbatch", DRY_RUN=ranks, DATA=pile, OUT=pile))
    data, optimizer = settings["data"], settings["optimizer"]
    sizes = ("num_layers", "num_attention_heads", "kv_channels", "hidden_size", "ffn_hidden_size")
    assert tuple(settings["model"][name] for name in sizes) == PAPER_SHAPES[shape]
    assert (data["train_iters"], data["global_batch_size"], data["seq_length"]) == (200_000, 512, 1024)
    assert (optimizer["lr"], optimizer["min_lr"], optimizer["lr_decay_style"]) == (1e-3, 1e-4, "exponential")
    assert (optimizer["lr_warmup_fraction"], optimizer["weight_decay"], optimizer["clip_grad"]) == (0.06, 0.01, 1.0)
    if phase == "proxy":
        doremi = settings["doremi"]
        assert (doremi["doremi_step_size"], doremi["doremi_smoothing"]) == (1.0, 1e-3)
        assert (doremi["doremi_update"], doremi["doremi_normalization"]) == ("alternating", "domain")
    assert layout_lines.startswith(layout)
    assert "512 windows = 524,288 tokens" in layout_lines


def chains_of(name: str, tmp_path: Path, **environ: object) -> list[dict[str, str]]:
    """The variables of each call of run_all.sh by a script of examples/pile, in order."""
    record = tmp_path / "run_all.sh"
    names = (
        "OUT",
        "STAGES",
        "SMALL_SIZE",
        "MAIN_SIZE",
        "OBJECTIVE",
        "REFERENCE_OUT",
        "REFERENCE_SOURCE",
        "MAIN_WEIGHTS",
    )
    entries = " ".join(f'"{each}=${{{each}:-}}"' for each in names)
    record.write_text(f'printf "%s\\n" {entries} "EXPERIMENT=$1" END >> {tmp_path}/calls\n')
    done = script(f"../pile/{name}", RUN_ALL=record, OUT="runs/x", **environ)
    assert done.returncode == 0, done.stderr
    assert "--group natural=runs/x/natural/main" in done.stdout
    calls = (tmp_path / "calls").read_text().split("END\n")[:-1]
    return [{k: v for k, v in (line.split("=", 1) for line in call.splitlines()) if v} for call in calls]


def test_the_papers_proxies_by_size(tmp_path):
    pile = {"EXPERIMENT": "examples/pile/pile.sh"}
    chains = chains_of("sizes.sh", tmp_path, SIZES="70m 1b")
    assert chains[0] == {"OUT": "runs/x/natural", "STAGES": "main", "MAIN_WEIGHTS": "natural", **pile}
    for chain, size in zip(chains[1:], ("70m", "1b"), strict=True):
        assert chain == {"OUT": f"runs/x/{size}", "STAGES": "reference score proxy main", "SMALL_SIZE": size, **pile}


def test_the_ablation_of_the_objective(tmp_path, pile):
    shared = {"SMALL_SIZE": "280m", "MAIN_SIZE": "280m", "REFERENCE_OUT": "runs/x/shared"}
    shared |= {"EXPERIMENT": "examples/pile/pile.sh"}
    natural, *chains = chains_of("objectives.sh", tmp_path)
    assert natural == {"OUT": "runs/x/natural", "STAGES": "main", "MAIN_WEIGHTS": "natural", **shared}
    assert [chain["OBJECTIVE"] for chain in chains] == ["excess", "easiest", "hardest"]
    assert [chain.get("REFERENCE_SOURCE") for chain in chains] == [None, None, "none"]
    assert all(chain["STAGES"] == "proxy main" for chain in chains)
    # What the last proxy and the main models are told.
    variables = {**chains[-1], "DATA": pile, "DRY_RUN": 8}
    settings, _ = settings_of(script("proxy.sbatch", **variables))
    assert settings["doremi"]["doremi_objective"] == "hardest"
    assert (settings["doremi"]["reference_load"], settings["doremi"]["reference_losses"]) == ("", "online")
    settings, layout_lines = settings_of(script("main.sbatch", **{**natural, "DATA": pile, "DRY_RUN": 8}))
    assert settings["data"]["domain_weights"] == "natural"
    assert layout_lines.startswith("tensor 1 x pipeline 1 x data 8 ")


def test_the_papers_largest_proxy_fits_into_80_gib_and_a_small_main_model_takes_a_small_job(pile, tmp_path):
    """Without recomputation proxies of 1b hold 65 GiB of activations alone; a main model of 280m needs one node."""
    for phase in ("reference", "score", "proxy"):
        _, lines = settings_of(script(f"{phase}.sbatch", DRY_RUN=8, DATA=pile, OUT=tmp_path, SMALL_SIZE="1b"))
        assert float(lines.split("memory per rank: ")[1].split(" GiB")[0]) < 70, phase
    for size, ranks in (("280m", 8), ("8b", 64)):
        variables = {"DATA": pile, "OUT": tmp_path, "STAGES": "main", "MAIN_WEIGHTS": "natural", "MAIN_SIZE": size}
        done = script("run_all.sh", "examples/pile/pile.sh", DRY_RUN=1, **variables)
        assert f"main, {ranks} ranks:" in done.stdout, done.stderr


def test_the_plan_of_a_chain_names_the_paths_of_its_jobs(pile, tmp_path):
    """Also where an interrupted run has left a result, which does not count."""
    (tmp_path / "proxy").mkdir()
    (tmp_path / "proxy" / "domain_weights.json").write_text("of an unfinished proxy")
    variables = {"DATA": pile, "OUT": tmp_path, "STAGES": "proxy main", "MAIN_SIZE": "70m", "SMALL_SIZE": "70m"}
    done = script("run_all.sh", "examples/pile/pile.sh", DRY_RUN=1, **variables)
    text = " ".join(done.stdout.split())
    assert f"--domain-weights {tmp_path}/proxy/domain_weights.json is still to come: uniform" in text, done.stderr
    assert f"sampling weights: {tmp_path}/proxy/domain_weights.json" in text
    assert "/to-come" not in text


def test_what_is_wrong_is_said(small, tmp_path):
    done = script("run_all.sh")
    assert done.returncode != 0
    assert "give the experiment" in done.stderr
    for done in (script("run_all.sh", "no.sh"), script("run_all.sh", str(small / "small.sh"), SITE="no.sh")):
        assert done.returncode == 2
        assert "error: no.sh is missing" in done.stderr
    done = script("run_all.sh", str(small / "small.sh"), STAGES="train", OUT=tmp_path)
    assert done.returncode == 2
    assert "unknown stage 'train' in STAGES" in done.stderr


def test_what_is_wrong_with_chains_is_said(small, tmp_path):
    """Before a chain starts; and what it awaits from elsewhere."""
    record = tmp_path / "run all.sh"
    record.write_text(f"echo started >> '{tmp_path}/started'\n")
    environ = {"RUN_ALL": record, "OUT": tmp_path / "a b", "EXPERIMENT": small / "small.sh"}
    dry = {"OUT": tmp_path / "a b", "DRY_RUN": 1, "PATH": path_with_sbatch(tmp_path)}
    free = tmp_path / "free.sh"
    # As many windows as the ranks of site.sh need.
    free.write_text(f"DATA={small}/data\nOUT=${{OUT:-x}}\n{SMALL.replace('size 8 ', 'size 64 ')}")
    cases = (
        ({"SIZES": " "}, "SIZES names nothing"),
        ({"SIZES": "70m natural"}, "SIZES: 'natural'"),
        ({"SIZES": "70m 70m"}, "SIZES: '70m'"),
        ({"SIZES": "../70m"}, "SIZES: '../70m'"),
        ({"RUN_ALL": "no.sh"}, "error: no.sh is missing: RUN_ALL"),
        ({"EXPERIMENT": "no.sh"}, "error: no.sh is missing: EXPERIMENT"),
    )
    for changes, said in cases:
        done = script("../pile/sizes.sh", **{**environ, "EXPERIMENT": free, **changes})
        assert (done.returncode, done.stdout) == (2, "")
        assert said in done.stderr
    assert not (tmp_path / "started").exists()
    # The command for the shell, as it is printed, has the paths of the runs.
    done = script("../pile/sizes.sh", **{**environ, "EXPERIMENT": free, "SIZES": "70m"})
    words = shlex.split(done.stdout.splitlines()[-1].partition("python ")[2])
    assert words[2] == f"70m={tmp_path}/a b/70m/main"
    # Scores that no stage makes.
    done = script("run_all.sh", str(free), STAGES="proxy main", **dry)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-2:] == [
        f"  proxy: --reference-losses {tmp_path}/a b/scores",
        "all checks passed; nothing was submitted",
    ]
    assert "no stage of STAGES makes" in lines[-3]
    done = script("run_all.sh", str(free), STAGES="reference score proxy main", **dry)
    assert "no stage of STAGES makes" not in done.stdout
    assert not (tmp_path / "a b").exists()
