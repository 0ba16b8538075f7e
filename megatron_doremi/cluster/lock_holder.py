"""The process that holds a run's lock, and whether it is alive, as far as another process can tell."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Mapping
from typing import ClassVar

from megatron_doremi.cluster.process_identity import boot_id, has_ended, pid_namespace, process_start
from megatron_doremi.storage.formats import Count, Name, Schema


class Holder(Schema):
    """The process that holds a lock.

    Attributes:
        token: random; differs between two starts.
        boot, pid_namespace: where `pid` is valid; "" if unknown.
        started: the process's start time in clock ticks since boot; 0 if unknown.
        job: SLURM job and cluster; "" outside SLURM.
        step: SLURM step; "" if none.
        restart: how many times SLURM has requeued the job.
    """

    FORMAT: ClassVar[str] = "megatron-doremi-lock/1"

    token: Name
    host: str
    boot: str
    pid_namespace: str
    pid: Count
    started: Count
    job: str
    step: str
    restart: Count

    def __str__(self) -> str:
        job = f", SLURM job {self.job}" + (f" step {self.step}" if self.step else "") if self.job else ""
        return f"process {self.pid} on host {self.host}{job}"


def this_process(environ: Mapping[str, str]) -> Holder:
    """Describes this process."""
    restart = environ.get("SLURM_RESTART_COUNT", "0")
    job, cluster = environ.get("SLURM_JOB_ID", ""), environ.get("SLURM_CLUSTER_NAME", "")
    return Holder(
        token=secrets.token_hex(8),
        host=socket.gethostname(),
        boot=boot_id(),
        pid_namespace=pid_namespace(),
        pid=os.getpid(),
        started=process_start(os.getpid()) or 0,
        job=f"{job} of cluster {cluster}" if job and cluster else job,
        step=environ.get("SLURM_STEP_ID", ""),
        restart=int(restart) if restart.isdecimal() else 0,
    )


def is_dead(holder: Holder, reader: Holder) -> bool | None:
    """Whether a holder has ended, as far as `reader` can tell immediately; None if its file has to be watched."""
    same_boot = holder.boot and (holder.host, holder.boot) == (reader.host, reader.boot)
    if same_boot and holder.pid_namespace == reader.pid_namespace:
        return has_ended(holder.pid, holder.started)
    # SLURM restarts a requeued job only after all of its earlier processes have ended.
    if holder.job and holder.job == reader.job and holder.restart < reader.restart:
        return True
    return None
