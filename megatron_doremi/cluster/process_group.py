"""Joining the other processes of a run."""

from __future__ import annotations

import os
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist

from megatron_doremi.cluster.launch import Launch
from megatron_doremi.cluster.rendezvous import Rendezvous
from megatron_doremi.errors import Fault, raise_if_any
from megatron_doremi.parallel.deepspeed_internals import disable_shared_memory_all_reduce


def join(launch: Launch, minutes: float = 8.0) -> tuple[torch.device, Rendezvous]:
    """Meets the other ranks and joins them in a process group; returns this process's device and the rendezvous.

    Raises:
        ConfigError, RunError: as Rendezvous; and there are more processes than GPUs.
    """
    raise_if_any(device_faults(launch))
    rendezvous = Rendezvous(launch, minutes)
    return join_group(rendezvous, minutes), rendezvous


def device_faults(launch: Launch) -> list[Fault]:
    """A fault where this machine has more processes than GPUs, of the first that has none."""
    if not torch.cuda.is_available() or launch.local_rank != torch.cuda.device_count():
        return []
    return [
        Fault(
            "processes on this machine",
            f"at least {launch.local_rank + 1}",
            f"one a GPU, of which there are {torch.cuda.device_count()}",
            "start fewer, let every task see all GPUs of its node (SLURM: --gpus-per-node in place of "
            "--gpus-per-task), or set CUDA_VISIBLE_DEVICES to nothing to train on the CPU",
        )
    ]


def join_group(rendezvous: Rendezvous, minutes: float) -> torch.device:
    """Makes the process group of all ranks, which have met; returns this process's device.

    Args:
        minutes: to wait for peers; see --distributed-timeout-minutes.
    """
    launch = rendezvous.launch
    # DeepSpeed reads these, whoever started us.
    os.environ["LOCAL_RANK"] = str(launch.local_rank)
    os.environ["RANK"] = str(launch.rank)
    os.environ["WORLD_SIZE"] = str(launch.world_size)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", launch.local_rank)
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("group", rendezvous.store),
        rank=launch.rank,
        world_size=launch.world_size,
        # The watchdog speaks before a collective times out.
        timeout=timedelta(minutes=minutes + 1),
    )
    # DeepSpeed wraps the existing group.
    disable_shared_memory_all_reduce()
    deepspeed.init_distributed(dist_backend=backend, dist_init_required=False)
    return device


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether a rank says yes; a collective call."""
    value = torch.tensor([int(flag)], device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())
