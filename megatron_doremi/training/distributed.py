"""Joining the other processes of a run."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist

from megatron_doremi.errors import ConfigError, Fault, RunError
from megatron_doremi.training.launch import Launch


def join(launch: Launch, minutes: float = 8.0) -> tuple[torch.device, dist.Store]:
    """Joins the process group; returns this process's device, and a connection to the ranks' store for the watchdog.

    Args:
        minutes: to wait for peers; see --distributed-timeout-minutes.

    Raises:
        ConfigError: there are more processes than GPUs.
        RunError: peers did not come in time.
    """
    # DeepSpeed reads these, whoever started us.
    os.environ["LOCAL_RANK"] = str(launch.local_rank)
    os.environ["RANK"] = str(launch.rank)
    os.environ["WORLD_SIZE"] = str(launch.world_size)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if launch.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                Fault(
                    "processes on this machine",
                    f"at least {launch.local_rank + 1}",
                    f"one a GPU, of which there are {torch.cuda.device_count()}",
                    "start fewer, let every task see all GPUs of its node (SLURM: --gpus-per-node in place of "
                    "--gpus-per-task), or set CUDA_VISIBLE_DEVICES to nothing to train on the CPU",
                )
            )
        device = torch.device("cuda", launch.local_rank)
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    # The watchdog speaks before a collective times out.
    timeout = timedelta(minutes=minutes + 1)
    store = _meet(launch, timedelta(minutes=minutes))
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("run", store),
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timeout,
    )
    # DeepSpeed wraps the group that is there. Its all-reduce through shared memory would be compiled at the
    # first start on a machine; gloo serves.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, dist_init_required=False)
    # A connection of its own, for that of the process group waits where a collective does.
    return device, dist.PrefixStore("watchdog", second_connection(store))


def second_connection(store: dist.Store) -> dist.Store:
    """Another connection to a store, so that a wait on one does not block the other."""
    if hasattr(store, "clone"):
        return store.clone()
    # Older versions of torch (2.11) cannot clone one. Stores in a file or in memory have no connection to share.
    if isinstance(store, dist.TCPStore):
        return dist.TCPStore(store.host, store.port, is_master=False, wait_for_workers=False)
    return store


def _meet(launch: Launch, timeout: timedelta) -> dist.Store:
    """The store of the run, once all ranks are there."""
    if not launch.rendezvous:
        return dist.HashStore()
    try:
        store, _, _ = next(dist.rendezvous(launch.rendezvous, launch.rank, launch.world_size, timeout=timeout))
        store.set(f"here/{launch.rank}", socket.gethostname())
    except (RuntimeError, OSError) as error:
        minutes = timeout.total_seconds() / 60
        raise RunError(
            f"rank {launch.rank}: not all {launch.world_size} ranks met at {launch.rendezvous} within {minutes:g} "
            f"minutes (--distributed-timeout-minutes): {str(error).splitlines()[0]}"
        ) from error
    missing = [rank for rank in range(launch.world_size) if not _came(store, rank, timeout)]
    if missing:
        raise RunError(f"rank {launch.rank}: these ranks never came to {launch.rendezvous}: {missing}")
    return store


def _came(store: dist.Store, rank: int, timeout: timedelta) -> bool:
    try:
        store.wait([f"here/{rank}"], timeout)
    except RuntimeError:
        return False
    return True
