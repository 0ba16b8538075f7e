"""Learning rates by hand, the groups of AdamW, and how a process finds out who it is.

Run alone: python -m pytest tests/training/test_optimizer_and_launch.py
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_doremi.config import OptimizerConfig
from megatron_doremi.errors import ConfigError
from megatron_doremi.parallel.groups import TensorGroup
from megatron_doremi.parallel.parameters import ParameterSpec, make_parameter
from megatron_doremi.training.launch import Launch, read_launch
from megatron_doremi.training.optimizer import learning_rate, make_optimizer

BASE = OptimizerConfig(lr=1.0, min_lr=0.01, lr_warmup_fraction=0.1)


@pytest.mark.parametrize(
    ("style", "at"),
    [
        ("constant", {1: 0.1, 5: 0.5, 10: 1.0, 55: 1.0, 100: 1.0}),
        ("linear", {1: 0.1, 10: 1.0, 55: 0.505, 100: 0.01}),
        ("cosine", {10: 1.0, 55: 0.505, 100: 0.01}),
        ("exponential", {10: 1.0, 55: 0.1, 100: 0.01}),
        ("WSD", {10: 1.0, 90: 1.0, 95: 0.505, 100: 0.01}),
    ],
)
def test_decay_styles(style, at):
    for step, rate in at.items():
        assert learning_rate(step, replace(BASE, lr_decay_style=style), 100) == pytest.approx(rate)


def test_warmup_in_iterations_overrules_the_fraction():
    assert learning_rate(2, replace(BASE, lr_warmup_iters=4), 100) == pytest.approx(0.5)


def test_no_warmup_starts_at_the_peak():
    assert learning_rate(1, replace(BASE, lr_warmup_fraction=0.0, lr_decay_style="constant"), 100) == 1.0


def test_vectors_do_not_decay():
    matrix, vector = (make_parameter(ParameterSpec(shape), TensorGroup()) for shape in ((2, 2), (2,)))
    groups = make_optimizer([("w", matrix), ("b", vector)], BASE).param_groups
    assert [(group["params"], group["weight_decay"]) for group in groups] == [([matrix], 0.01), ([vector], 0.0)]


def test_launchers():
    torchrun = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "1234"}
    assert read_launch(torchrun) == Launch(3, 8, 1, "tcp://n1:1234")
    srun = {
        "SLURM_PROCID": "5",
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_LOCALID": "1",
        "SLURM_JOB_ID": "77",
        "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
    }
    assert read_launch(srun) == Launch(5, 8, 1, "tcp://10.0.0.1:20077")
    assert read_launch({**srun, "MASTER_ADDR": "n7"}).rendezvous == "tcp://n7:20077"
    assert read_launch({}) == Launch()
    # Plain python in a batch script: SLURM's variables are there, but no step.
    assert read_launch({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) == Launch()


@pytest.mark.parametrize(
    "environ",
    [
        {"RANK": "0"},
        {"RANK": "one", "WORLD_SIZE": "2", "MASTER_ADDR": "n"},
        {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "n"},
        {"RANK": "0", "WORLD_SIZE": "2"},
    ],
)
def test_half_set_environments_are_said(environ):
    with pytest.raises(ConfigError):
        read_launch(environ)
