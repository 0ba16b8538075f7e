"""How this process was started, read from the environment. Imports nothing heavy: flags are checked first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_doremi.errors import ConfigError, Fault


@dataclass(frozen=True)
class Launch:
    """This process among those of the run.

    Attributes:
        rank, world_size, local_rank: as torchrun names them.
        rendezvous: URL at which the ranks meet, or "" for a single process.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    rendezvous: str = ""


def read_launch(environ: Mapping[str, str]) -> Launch:
    """Finds out from the environment how this process was started.

    torchrun and deepspeed set RANK and its companions; srun sets SLURM_PROCID in each task of a step. Plain
    python is a run of one process, inside a SLURM allocation too.

    Raises:
        ConfigError: the environment names a run but not its rendezvous.
    """
    if "RANK" in environ:
        launch = _numbers(environ, "RANK", "WORLD_SIZE", "LOCAL_RANK")
        host = environ.get("MASTER_ADDR", "")
    elif environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        launch = _numbers(environ, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        # srun tells every task the node from which the step was started: the batch script's, the first.
        host = environ.get("MASTER_ADDR") or environ.get("SLURM_LAUNCH_NODE_IPADDR", "")
    else:
        return Launch()
    if launch.world_size == 1:
        return launch
    # A port that jobs on a shared node do not have in common.
    job = environ.get("SLURM_JOB_ID", "")
    port = environ.get("MASTER_PORT") or str(20000 + (int(job) if job.isdecimal() else 9500) % 20000)
    if not (port.isdecimal() and 0 < int(port) < 65536):
        raise ConfigError(Fault("MASTER_PORT", port, "a port, from 1 to 65535", "export another, or unset it"))
    if not host:
        raise ConfigError(
            Fault(
                "MASTER_ADDR",
                "not set",
                f"the host of rank 0, for {launch.world_size} processes",
                "export MASTER_ADDR, or start with torchrun or srun",
            )
        )
    return Launch(launch.rank, launch.world_size, launch.local_rank, f"tcp://{host}:{port}")


def _numbers(environ: Mapping[str, str], rank: str, world_size: str, local_rank: str) -> Launch:
    try:
        launch = Launch(int(environ[rank]), int(environ[world_size]), int(environ.get(local_rank, "0")))
    except (KeyError, ValueError) as error:
        raise ConfigError(
            Fault(
                f"{rank}, {world_size}",
                str(error),
                "whole numbers, both set",
                "start with torchrun, srun, deepspeed or plain python",
            )
        ) from error
    if not 0 <= launch.rank < launch.world_size:
        raise ConfigError(
            Fault(rank, str(launch.rank), f"from 0 to {world_size} - 1 = {launch.world_size - 1}", "start again")
        )
    return launch
