"""examples/pile/h100.sh: the paper's chain on 8, 64 and 512 H100s fits, and takes what docs/planning.md says.

Run alone: python -m pytest tests/planning/test_h100.py
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from phases.small import write_data
from ranks import ROOT
from slurm.accepting import path_with_sbatch

from megatron_doremi.arguments import parse_config
from megatron_doremi.config import data_parallel_size
from megatron_doremi.parallel.topology import Topology
from megatron_doremi.phases.inputs import device_memory, fitted, open_inputs, plan_text, planned_faults

STAGES = ("reference", "score", "proxy", "main")
DOCUMENT = (ROOT / "docs" / "planning.md").read_text()


@pytest.fixture(scope="module")
def pile(tmp_path_factory):
    """22 domains, and the paper's vocabulary."""
    manifest = write_data(tmp_path_factory.mktemp("pile"), num_domains=22, tokens=5000, held_out=2000)
    entry = json.loads(manifest.read_text())
    entry["tokenizer"]["vocab_size"] = 256_000
    manifest.write_text(json.dumps(entry))
    return manifest


def flags_of(stage: str, gpus: int, data="no-data", source: str = "online") -> list[str]:
    """The flags that the scripts of examples/slurm give a stage in a dry run, of data in a folder."""
    commands = 'source examples/slurm/common.sh; stage_flags "$1"; printf "%s\\n" "${FLAGS[@]}"'
    environ = {**os.environ, "EXPERIMENT": "examples/pile/h100.sh", "GPUS": str(gpus), "DRY_RUN": "1", "OUT": "to-come"}
    environ["DATA"] = str(data)
    words = ["bash", "-euo", "pipefail", "-c", commands, "-", stage]
    done = subprocess.run(words, env={**environ, "REFERENCE_SOURCE": source}, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def planned(stage: str, gpus: int, pile) -> str:
    """What the dry run of a stage prints, with the data or before they exist; it finds no fault."""
    argv = ["--phase", stage, "--domains", str(pile), *flags_of(stage, gpus, pile.parent), "--dry-run"]
    config = parse_config([*argv, "--dry-run-world-size", str(gpus)], gpus)
    parallel = config.parallel
    tensor, pipe = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    inputs = open_inputs(config, Topology(pipe, data_parallel_size(parallel, gpus), tensor))
    inputs = fitted(inputs, device_memory(config))
    assert planned_faults(inputs) == []
    return plan_text(inputs)


@pytest.mark.parametrize("gpus", [8, 64, 512])
@pytest.mark.parametrize("stage", STAGES)
def test_it_fits_and_takes_what_the_document_says(stage, gpus, pile):
    text = planned(stage, gpus, pile)
    assert f"= {gpus} ranks" in text
    if stage == "score":
        return
    memory = re.search(r"fullest: stage \d+, (\S+) GiB, \S+ of 80 GiB", text)[1]
    step, duration = re.search(r"TFLOP/s: (\S+) s a step, (\S+ \S+) on", text).groups()
    bubble = re.search(r"pipeline bubble: (\S+)% of", text)
    sent = re.findall(r"^  (?:tensor|pipeline|data) +\d+ +\S+ +\S+ +\d+ +(\S+) ", text, flags=re.MULTILINE)
    layout = re.search(r"^layout: (.*) = ", text, flags=re.MULTILINE)[1]
    cells = [layout, memory, step, f"{bubble[1]} %" if bubble else "0", f"{sum(map(float, sent)):.3f}", duration]
    print(f"| {gpus} | {stage} | {' | '.join(cells)} |")
    row = next(line for line in DOCUMENT.splitlines() if line.startswith(f"| {gpus} | {stage} |"))
    _, _, *written = [cell.strip() for cell in row.strip("|").split("|")]
    # What a token holds and what is exchanged change now and then; run with -s for the rows of the document.
    for column in (4, 1):
        assert float(written.pop(column)) == pytest.approx(float(cells.pop(column)), rel=0.1)
    assert written == cells


@pytest.mark.parametrize("stage", ["reference", "proxy", "main"])
def test_a_plan_needs_no_data(stage, pile, tmp_path):
    """It says what stands in; memory, arithmetic and communication are the same."""
    with_data, without = (planned(stage, 64, path) for path in (pile, tmp_path / "domains.json"))
    assert f"--domains {tmp_path}/domains.json does not exist yet: two domains" in " ".join(without.split())
    machine = [
        re.search(r"\nparameters: .*?(?=\n  domain )", text, flags=re.DOTALL)[0] for text in (with_data, without)
    ]
    assert machine[0] == machine[1]
    assert len(machine[0].splitlines()) > 10


def test_scoring_is_planned_without_data(tmp_path):
    """All windows of the run: 200,000 steps of 512, in equal shares, each rounded up by at most one."""
    text = planned("score", 64, tmp_path / "domains.json")
    assert f"at most {200_000 * 512 + 2:,}" in " ".join(text.split())


def test_the_share_of_reference_and_proxy(pile):
    """GPU-hours at one utilization; the paper counts 8 %."""
    hours = {
        stage: float(re.search(r"([\d.,]+) GPU-hours", planned(stage, 64, pile))[1].replace(",", ""))
        for stage in ("reference", "proxy", "main")
    }
    share = (hours["reference"] + hours["proxy"]) / hours["main"]
    for figure in hours.values():
        assert f"{figure:,.1f}" in DOCUMENT
    assert f"{share:.1%}".replace("%", " %") in DOCUMENT
    assert share == pytest.approx(0.08, abs=0.012)


@pytest.mark.slow
def test_the_dry_run_of_the_chain(pile, tmp_path):
    """run_all.sh asks for the nodes of the GPUs; a GPU that is too small for a stage fails the checks."""
    environ = {**os.environ, "PYTHON": sys.executable, "DATA": str(pile.parent), "OUT": str(pile.parent / "run")}
    environ |= {"STAGES": "reference main", "GPUS": "64", "DRY_RUN": "1", "PATH": path_with_sbatch(tmp_path)}
    words = ["bash", "examples/slurm/run_all.sh", "examples/pile/h100.sh"]
    done = subprocess.run(words, env=environ, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "reference, 64 ranks:\n" in done.stdout
    hours = "4445.8; those before main are 3.0 % of main"
    assert f"GPU-hours of these stages at the stated utilization: {hours}\n" in done.stdout
    assert "\n  layout: tensor 2 x pipeline 1 x data 32 = 64 ranks, ZeRO 1\n" in done.stdout
    argv = ["--phase", "main", "--domains", str(pile), *flags_of("main", 8, pile.parent), "--dry-run-world-size", "8"]
    command = [sys.executable, "pretrain_doremi.py", *argv, "--dry-run", "--device-memory-gib", "40"]
    small = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert small.returncode == 2
    assert "138% of 40 GiB" in small.stdout
    assert "memory: 55.4 GiB on a rank of stage 0" in small.stderr


def test_another_number_of_gpus_is_refused():
    with pytest.raises(AssertionError, match="has layouts for 8, 64 and 512 GPUs"):
        flags_of("main", 100)
