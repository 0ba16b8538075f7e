"""Learning rates computed by hand, AdamW's parameter groups, and how a process determines its rank.

Run alone: python -m pytest tests/engine/test_optimizer_and_launch.py
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_doremi.cluster.launch import DEEPSPEED, MPIRUN, SRUN, TORCHRUN, Launch, read_launch
from megatron_doremi.config import OptimizerConfig
from megatron_doremi.engine.optimizer import make_learning_rate, make_optimizer
from megatron_doremi.errors import ConfigError
from megatron_doremi.parallel.groups import TensorGroup
from megatron_doremi.parallel.parameters import ParameterSpec, make_parameter

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
        assert make_learning_rate(replace(BASE, lr_decay_style=style), 100).at(step) == pytest.approx(rate)


def test_a_decay_in_iterations_overrules_the_fraction():
    rate = make_learning_rate(replace(BASE, lr_decay_style="WSD", lr_wsd_decay_iters=20), 100)
    assert [rate.at(step) for step in (10, 80, 90, 100)] == pytest.approx([1.0, 1.0, 0.505, 0.01])


def test_warmup_in_iterations_overrules_the_fraction():
    assert make_learning_rate(replace(BASE, lr_warmup_iters=4), 100).at(2) == pytest.approx(0.5)


def test_no_warmup_starts_at_the_peak():
    assert make_learning_rate(replace(BASE, lr_warmup_fraction=0.0, lr_decay_style="constant"), 100).at(1) == 1.0


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
    place, name = "tcp://10.0.0.1:20077", "SLURM job 77 step "
    assert read_launch(srun) == Launch(5, 8, 1, place, SRUN, name)
    assert read_launch({**srun, "MASTER_ADDR": "n7"}).rendezvous == "tcp://n7:20077"
    assert read_launch({}) == Launch()
    # Plain python in a batch script: SLURM's variables are there, but no step.
    assert read_launch({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) == Launch()


def mpi(rank: int, size: int, local_size: int | None, **more: str) -> dict[str, str]:
    entry = {"OMPI_COMM_WORLD_RANK": f"{rank}", "OMPI_COMM_WORLD_SIZE": f"{size}", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    return {**entry, **({"OMPI_COMM_WORLD_LOCAL_SIZE": f"{local_size}"} if local_size else {}), **more}


def test_mpirun_is_joined_or_refused():
    """Version 0.1 treated each rank as a separate run: rank 1 died, rank 0 trained alone and exited with 0."""
    assert read_launch(mpi(1, 2, 2)) == Launch(1, 2, 1, "tcp://127.0.0.1:29500", MPIRUN)
    named = read_launch(mpi(9, 16, 8, MASTER_ADDR="n1", PMIX_NAMESPACE="278790145"))
    assert (named.rank, named.launcher, named.run_id) == (9, MPIRUN, "278790145")
    assert 20000 <= int(named.rendezvous.removeprefix("tcp://n1:")) < 32000
    with pytest.raises(ConfigError, match="mpirun -x MASTER_ADDR="):
        read_launch(mpi(9, 16, 8))
    # Open MPI starts its daemons by srun, which sets its variables too.
    inside = mpi(9, 16, 8, MASTER_ADDR="n1", SLURM_STEP_NUM_TASKS="2", SLURM_PROCID="1", SLURM_JOB_ID="7")
    assert read_launch(inside).rank == 9
    hydra = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "2", "MPI_LOCALNRANKS": "4"}
    assert read_launch(hydra) == Launch(2, 4, 2, "tcp://127.0.0.1:29500", MPIRUN)
    with pytest.raises(ConfigError, match="PMIX_RANK"):
        read_launch({"PMIX_RANK": "1"})


def test_srun_with_its_own_support_of_mpi():
    entry = {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_JOB_ID": "7", "SLURM_LAUNCH_NODE_IPADDR": "n"}
    launch = read_launch({**entry, "PMI_RANK": "2", "PMI_SIZE": "4", "PMIX_RANK": "2"})
    assert (launch.rank, launch.launcher) == (2, SRUN)


def test_torchrun_deepspeed_and_salloc():
    torchrun = {"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "n1", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "none"}
    restarted = {**torchrun, "TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    launch = read_launch(restarted)
    assert (launch.launcher, launch.run_id, launch.generation, launch.hosted) == (TORCHRUN, "", 2, True)
    assert read_launch({**torchrun, "TORCHELASTIC_RUN_ID": "a"}).run_id == "a"
    deepspeed = {"RANK": "0", "WORLD_SIZE": "1", "CROSS_RANK": "0", "LOCAL_SIZE": "1"}
    assert read_launch(deepspeed).launcher == DEEPSPEED
    # salloc's shell, on the node from which it was called or in an interactive step: one process.
    assert read_launch({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_NNODES": "2"}) == Launch()
    step = {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}
    assert read_launch(step) == Launch()


def test_jobs_and_steps_on_a_node_have_ports_of_their_own():
    entry = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LAUNCH_NODE_IPADDR": "n"}
    places = {
        read_launch({**entry, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}).rendezvous
        for job in range(4000, 4020)
        for step in range(10)
    }
    assert len(places) == 200
    assert all(20000 <= int(place.rpartition(":")[2]) < 32000 for place in places)


@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_addresses_with_colons(host):
    environ = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": host, "MASTER_PORT": "29500"}
    assert read_launch(environ).rendezvous == "tcp://[::1]:29500"


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
