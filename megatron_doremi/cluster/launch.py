"""How this process was started, read from the environment. Imports nothing heavy: flags are checked first."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_doremi.errors import ConfigError, Fault

TORCHRUN, DEEPSPEED, MPIRUN, SRUN, BY_HAND = "torchrun", "deepspeed", "mpirun", "srun", ""
# Where no launcher names a port: below the ports that systems hand out to clients (32768 and up).
_FIRST_PORT, _PORTS = 20000, 12000
_DEFAULT_PORT = 29500
# (rank, world size, local rank, ranks on this host) as the implementations of MPI export them; the last may be missing.
_MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


@dataclass(frozen=True)
class Launch:
    """This process among those of the run.

    Attributes:
        rank, world_size, local_rank: as torchrun names them.
        rendezvous: URL at which the ranks meet, or "" for a single process.
        launcher: who started this process and ends with it; BY_HAND where nobody is known to.
        run_id: tells this run from others that may listen at the same place; "" where the launcher names none.
        generation: how often the launcher has restarted its workers.
        hosted: the launcher hosts the rendezvous, not rank 0.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    rendezvous: str = ""
    launcher: str = BY_HAND
    run_id: str = ""
    generation: int = 0
    hosted: bool = False


def read_launch(environ: Mapping[str, str]) -> Launch:
    """Finds out from the environment how this process was started.

    torchrun and deepspeed set RANK and its companions; mpirun has variables of its own; srun sets SLURM_PROCID in
    each task of a step. Plain python is a run of one process, inside a SLURM allocation (salloc, sbatch) too.

    Raises:
        ConfigError: the environment names a run but not its rendezvous.
    """
    mpi = next((names for names in _MPI if names[0] in environ and not _by_srun(environ, names)), None)
    if "RANK" in environ:
        rank, world_size, local_rank = _numbers(environ, "RANK", "WORLD_SIZE", "LOCAL_RANK")
        launcher, run_id = _launcher_of_rank(environ)
        host = environ.get("MASTER_ADDR", "")
    elif mpi is not None:
        rank, world_size, local_rank = _numbers(environ, *mpi[:3])
        launcher, run_id = MPIRUN, environ.get("PMIX_NAMESPACE") or environ.get("OMPI_MCA_ess_base_jobid", "")
        host = environ.get("MASTER_ADDR", "")
        if not host and environ.get(mpi[3]) == str(world_size):
            host = "127.0.0.1"
    elif environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        rank, world_size, local_rank = _numbers(environ, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        launcher = SRUN
        run_id = f"SLURM job {environ.get('SLURM_JOB_ID', '')} step {environ.get('SLURM_STEP_ID', '')}"
        # srun tells every task the node from which the step was started: the batch script's, the first.
        host = environ.get("MASTER_ADDR") or environ.get("SLURM_LAUNCH_NODE_IPADDR", "")
    elif "PMIX_RANK" in environ and "SLURM_JOB_ID" not in environ:
        raise ConfigError(
            Fault(
                "PMIX_RANK",
                environ["PMIX_RANK"],
                "a launcher that also says how many ranks there are",
                "export RANK and WORLD_SIZE, or start with torchrun, srun or Open MPI's mpirun",
            )
        )
    else:
        return Launch()
    place = ""
    if world_size > 1:
        place = _rendezvous(host, environ, run_id, launcher, world_size)
    generation = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Launch(
        rank,
        world_size,
        local_rank,
        place,
        launcher,
        run_id,
        int(generation) if generation.isdecimal() else 0,
        environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def launcher_of(environ: Mapping[str, str]) -> str:
    """Who started this process, by its traces alone: complete or not."""
    if "RANK" in environ:
        return _launcher_of_rank(environ)[0]
    if any(names[0] in environ and not _by_srun(environ, names) for names in _MPI):
        return MPIRUN
    return SRUN if environ.get("SLURM_STEP_NUM_TASKS", "1") != "1" else BY_HAND


def rank_of(environ: Mapping[str, str]) -> int:
    """This process's rank, 0 where the environment names none: for messages, before anything is checked."""
    for name in ("RANK", *(names[0] for names in _MPI), "SLURM_PROCID"):
        if name in environ:
            return int(environ[name]) if environ[name].isdecimal() else 0
    return 0


def local_rank_of(environ: Mapping[str, str]) -> int:
    """This process's rank on its machine, 0 where the environment names none."""
    for name in ("LOCAL_RANK", *(names[2] for names in _MPI), "SLURM_LOCALID"):
        if name in environ:
            return int(environ[name]) if environ[name].isdecimal() else 0
    return 0


def _by_srun(environ: Mapping[str, str], names: tuple[str, ...]) -> bool:
    """Whether srun's own support of MPI (--mpi=pmi2) has set these variables."""
    own = [environ.get(name) for name in names[:2]]
    return own == [environ.get("SLURM_PROCID"), environ.get("SLURM_STEP_NUM_TASKS")]


def _launcher_of_rank(environ: Mapping[str, str]) -> tuple[str, str]:
    """(launcher, run id) where RANK is set."""
    if "TORCHELASTIC_RUN_ID" in environ:
        run_id = environ["TORCHELASTIC_RUN_ID"]
        # torchrun's word where the user gave no --rdzv-id.
        return TORCHRUN, "" if run_id == "none" else run_id
    # These two come from deepspeed's launcher together.
    return (DEEPSPEED if {"CROSS_RANK", "LOCAL_SIZE"} <= environ.keys() else BY_HAND), ""


def _rendezvous(host: str, environ: Mapping[str, str], run_id: str, launcher: str, world_size: int) -> str:
    port = environ.get("MASTER_PORT") or str(_free_port(environ, run_id, launcher))
    if not (port.isdecimal() and 0 < int(port) < 65536):
        raise ConfigError(Fault("MASTER_PORT", port, "a port, from 1 to 65535", "export another, or unset it"))
    if not host:
        remedy = "export MASTER_ADDR, or start with torchrun or srun"
        if launcher == MPIRUN:
            remedy = "mpirun -x MASTER_ADDR=HOST_OF_RANK_0 (MPICH: -genv MASTER_ADDR HOST_OF_RANK_0), or use torchrun"
        raise ConfigError(Fault("MASTER_ADDR", "not set", f"the host of rank 0, for {world_size} processes", remedy))
    host = host.removeprefix("[").removesuffix("]")
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _free_port(environ: Mapping[str, str], run_id: str, launcher: str) -> int:
    """A port that jobs, and steps of a job, which share a node do not have in common."""
    job, step = environ.get("SLURM_JOB_ID", ""), environ.get("SLURM_STEP_ID", "0")
    if job.isdecimal():
        return _FIRST_PORT + (int(job) + 7919 * (int(step) if step.isdecimal() else 0)) % _PORTS
    return _FIRST_PORT + zlib.crc32(run_id.encode()) % _PORTS if launcher == MPIRUN and run_id else _DEFAULT_PORT


def _numbers(environ: Mapping[str, str], rank: str, world_size: str, local_rank: str) -> tuple[int, int, int]:
    try:
        found = int(environ[rank]), int(environ[world_size]), int(environ.get(local_rank, "0"))
    except (KeyError, ValueError) as error:
        raise ConfigError(
            Fault(
                f"{rank}, {world_size}",
                str(error),
                "whole numbers, both set",
                "start with torchrun, srun, deepspeed, mpirun or plain python",
            )
        ) from error
    if not 0 <= found[0] < found[1]:
        raise ConfigError(Fault(rank, str(found[0]), f"from 0 to {world_size} - 1 = {found[1] - 1}", "start again"))
    return found


def stop_marker(environ: Mapping[str, str]) -> Path | None:
    """A file that outlives a worker of torchrun and not torchrun itself; None where workers are not restarted.

    torchrun takes every exit code but 0 for a failure and restarts its workers (--max-restarts). A worker that was
    asked to stop leaves this file in the folder in which torchrun keeps its workers' reports, and one that finds it
    leaves at once.
    """
    report = environ.get("TORCHELASTIC_ERROR_FILE", "")
    if not report or environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return None
    # FOLDER/RUN/attempt_N/LOCAL_RANK/error.json
    return Path(report).parents[2] / "megatron_doremi_stopped"
