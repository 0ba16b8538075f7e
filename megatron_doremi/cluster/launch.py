"""How this process was launched, read from the environment. Imports nothing heavy, so that flags are checked first."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_doremi.errors import ConfigError, Fault, raise_if_any

TORCHRUN, DEEPSPEED, MPIRUN, SRUN, LOCAL, NO_LAUNCHER = (
    "torchrun",
    "deepspeed",
    "mpirun",
    "srun",
    "--nproc-per-node",
    "",
)
# Set by --nproc-per-node (local_launch.py): rank 0's listening socket, on which it hosts the rendezvous (other ranks:
# -1), and an id of the run.
LISTENER, RUN_ID = "MEGATRON_DOREMI_LISTENER", "MEGATRON_DOREMI_RUN_ID"
# Ports to choose from if the launcher sets none; all are below the ephemeral range (32768 and up).
_FIRST_PORT, _NUM_PORTS = 20000, 12000
_DEFAULT_PORT = 29500
# Variables of (rank, world size, local rank, ranks on this host) of the MPI implementations; the last may be unset.
_MPI_VARIABLES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


@dataclass(frozen=True)
class Launch:
    """This process's place in the run.

    Attributes:
        rank, world_size, local_rank: as torchrun defines them.
        rendezvous: URL at which the ranks meet; "" for a single process.
        launcher: the program that started this process; NO_LAUNCHER if none is known.
        run_id: distinguishes this run from others that use the same address; "" if the launcher sets none.
        generation: how many times the launcher has restarted its workers.
        hosted: whether the launcher, and not rank 0, hosts the rendezvous.
        listener: rank 0's listening socket for the rendezvous, if the launcher has opened it; else -1.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    rendezvous: str = ""
    launcher: str = NO_LAUNCHER
    run_id: str = ""
    generation: int = 0
    hosted: bool = False
    listener: int = -1


def read_launch(environ: Mapping[str, str]) -> Launch:
    """How this process was launched; see `find_launch`. Raises ConfigError if the environment is incomplete."""
    launch, faults = find_launch(environ)
    raise_if_any(faults)
    assert launch is not None
    return launch


def find_launch(environ: Mapping[str, str], meets: bool = True) -> tuple[Launch | None, list[Fault]]:
    """Determines from the environment how this process was launched, and what is wrong with the environment.

    torchrun and deepspeed set RANK, WORLD_SIZE and LOCAL_RANK; mpirun sets its own variables; srun sets SLURM_PROCID
    in each task of a step. Plain python is a run of one process, also inside a SLURM allocation (salloc, sbatch).

    Args:
        meets: whether the ranks meet; a dry run needs no rendezvous.

    Returns:
        the launch, None if the ranks are unknown, and the faults.
    """
    try:
        launch, host = _read_environment(environ)
    except ConfigError as error:
        return None, list(error.faults)
    if launch.world_size == 1 or not meets:
        return launch, []
    try:
        url = _rendezvous_url(host, environ, launch.run_id, launch.launcher, launch.world_size)
    except ConfigError as error:
        return launch, list(error.faults)
    return replace(launch, rendezvous=url), []


def _read_environment(environ: Mapping[str, str]) -> tuple[Launch, str]:
    """The launch without its rendezvous, and the host of that, "" if unknown. Raises ConfigError."""
    mpi = next((names for names in _MPI_VARIABLES if names[0] in environ and not _set_by_srun(environ, names)), None)
    if "RANK" in environ:
        rank, world_size, local_rank = _read_ranks(environ, "RANK", "WORLD_SIZE", "LOCAL_RANK")
        launcher, run_id = _launcher_of_rank(environ)
        host = environ.get("MASTER_ADDR", "")
    elif mpi is not None:
        rank, world_size, local_rank = _read_ranks(environ, *mpi[:3])
        launcher, run_id = MPIRUN, environ.get("PMIX_NAMESPACE") or environ.get("OMPI_MCA_ess_base_jobid", "")
        host = environ.get("MASTER_ADDR", "")
        if not host and environ.get(mpi[3]) == str(world_size):
            host = "127.0.0.1"
    elif environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        rank, world_size, local_rank = _read_ranks(environ, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        launcher = SRUN
        run_id = f"SLURM job {environ.get('SLURM_JOB_ID', '')} step {environ.get('SLURM_STEP_ID', '')}"
        # The node from which the step was launched: that of the batch script, which is the first.
        host = environ.get("MASTER_ADDR") or environ.get("SLURM_LAUNCH_NODE_IPADDR", "")
    elif "PMIX_RANK" in environ and "SLURM_JOB_ID" not in environ:
        raise ConfigError(
            Fault(
                "PMIX_RANK",
                environ["PMIX_RANK"],
                "a launcher that also sets the number of ranks",
                "export RANK and WORLD_SIZE, or start with torchrun, srun or Open MPI's mpirun",
            )
        )
    elif environ.get("WORLD_SIZE", "1") != "1":
        rule, remedy = "RANK, set beside it", "export RANK too, or unset WORLD_SIZE for a run of one process"
        raise ConfigError(Fault("WORLD_SIZE", f"{environ['WORLD_SIZE']} without RANK", rule, remedy))
    else:
        return Launch(), ""
    generation, listener = environ.get("TORCHELASTIC_RESTART_COUNT", "0"), environ.get(LISTENER, "-1")
    launch = Launch(
        rank,
        world_size,
        local_rank,
        "",
        launcher,
        run_id,
        int(generation) if generation.isdecimal() else 0,
        environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        int(listener) if launcher == LOCAL and listener.isdecimal() else -1,
    )
    return launch, host


def launcher_of(environ: Mapping[str, str]) -> str:
    """The launcher that set the environment, even if it set it incompletely."""
    if "RANK" in environ:
        return _launcher_of_rank(environ)[0]
    if any(names[0] in environ and not _set_by_srun(environ, names) for names in _MPI_VARIABLES):
        return MPIRUN
    return SRUN if environ.get("SLURM_STEP_NUM_TASKS", "1") != "1" else NO_LAUNCHER


def rank_of(environ: Mapping[str, str]) -> int:
    """This process's rank for messages, before the environment is checked; 0 if none is set."""
    for name in ("RANK", *(names[0] for names in _MPI_VARIABLES), "SLURM_PROCID"):
        if name in environ:
            return int(environ[name]) if environ[name].isdecimal() else 0
    return 0


def local_rank_of(environ: Mapping[str, str]) -> int:
    """This process's rank on its machine; 0 if none is set."""
    for name in ("LOCAL_RANK", *(names[2] for names in _MPI_VARIABLES), "SLURM_LOCALID"):
        if name in environ:
            return int(environ[name]) if environ[name].isdecimal() else 0
    return 0


def _set_by_srun(environ: Mapping[str, str], names: tuple[str, ...]) -> bool:
    """Whether srun's MPI support (--mpi=pmi2) has set these variables."""
    rank_and_size = [environ.get(name) for name in names[:2]]
    return rank_and_size == [environ.get("SLURM_PROCID"), environ.get("SLURM_STEP_NUM_TASKS")]


def _launcher_of_rank(environ: Mapping[str, str]) -> tuple[str, str]:
    """(launcher, run id) if RANK is set."""
    if "TORCHELASTIC_RUN_ID" in environ:
        run_id = environ["TORCHELASTIC_RUN_ID"]
        # torchrun sets "none" if the user gave no --rdzv-id.
        return TORCHRUN, "" if run_id == "none" else run_id
    if RUN_ID in environ:
        return LOCAL, environ[RUN_ID]
    # Only deepspeed's launcher sets both of these.
    return (DEEPSPEED if {"CROSS_RANK", "LOCAL_SIZE"} <= environ.keys() else NO_LAUNCHER), ""


def _rendezvous_url(host: str, environ: Mapping[str, str], run_id: str, launcher: str, world_size: int) -> str:
    port = environ.get("MASTER_PORT") or str(_free_port(environ, run_id, launcher))
    if not (port.isdecimal() and 0 < int(port) < 65536):
        raise ConfigError(Fault("MASTER_PORT", port, "a port from 1 to 65535", "export another, or unset it"))
    if not host:
        remedy = "export MASTER_ADDR, or start with --nproc-per-node, torchrun or srun"
        if launcher == MPIRUN:
            remedy = "mpirun -x MASTER_ADDR=HOST_OF_RANK_0 (MPICH: -genv MASTER_ADDR HOST_OF_RANK_0), or use torchrun"
        raise ConfigError(Fault("MASTER_ADDR", "not set", f"the host of rank 0, for {world_size} processes", remedy))
    host = host.removeprefix("[").removesuffix("]")
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _free_port(environ: Mapping[str, str], run_id: str, launcher: str) -> int:
    """A port that differs between jobs, and between the steps of a job, that share a node."""
    job, step = environ.get("SLURM_JOB_ID", ""), environ.get("SLURM_STEP_ID", "0")
    if job.isdecimal():
        return _FIRST_PORT + (int(job) + 7919 * (int(step) if step.isdecimal() else 0)) % _NUM_PORTS
    return _FIRST_PORT + zlib.crc32(run_id.encode()) % _NUM_PORTS if launcher == MPIRUN and run_id else _DEFAULT_PORT


def _read_ranks(environ: Mapping[str, str], rank: str, world_size: str, local_rank: str) -> tuple[int, int, int]:
    """(rank, world size, local rank) from the variables of these names."""
    try:
        ranks = int(environ[rank]), int(environ[world_size]), int(environ.get(local_rank, "0"))
    except (KeyError, ValueError) as error:
        raise ConfigError(
            Fault(
                f"{rank}, {world_size}",
                str(error),
                "integers, both set",
                "start with --nproc-per-node, torchrun, srun, deepspeed, mpirun or plain python",
            )
        ) from error
    if not 0 <= ranks[0] < ranks[1]:
        raise ConfigError(Fault(rank, str(ranks[0]), f"from 0 to {world_size} - 1 = {ranks[1] - 1}", "start again"))
    return ranks


def stop_marker(environ: Mapping[str, str]) -> Path | None:
    """A file that records a requested stop across restarts by torchrun; None if the launcher does not restart workers.

    torchrun treats every exit code except 0 as a failure and restarts its workers (--max-restarts). A worker that was
    requested to stop creates this file in torchrun's folder of error reports, which is new at each start of torchrun;
    a worker that finds the file at its start exits immediately.
    """
    report = environ.get("TORCHELASTIC_ERROR_FILE", "")
    if not report or environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return None
    # FOLDER/RUN/attempt_N/LOCAL_RANK/error.json
    return Path(report).parents[2] / "megatron_doremi_stopped"
