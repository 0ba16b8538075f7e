"""Creating the process group of all ranks, and one small all-reduce over it."""

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
    """Meets the other ranks and creates the process group; returns this process's device and the rendezvous.

    Raises:
        ConfigError: as `Rendezvous`, or there are more processes than GPUs on this machine.
        RunError: as `Rendezvous`.
    """
    raise_if_any(device_faults(launch))
    rendezvous = Rendezvous(launch, minutes)
    return join_group(rendezvous, minutes), rendezvous


def device_faults(launch: Launch) -> list[Fault]:
    """A fault if this machine has more processes than GPUs; reported only by the first process without a GPU."""
    if not torch.cuda.is_available() or launch.local_rank != torch.cuda.device_count():
        return []
    return [
        Fault(
            "processes on this machine",
            f"at least {launch.local_rank + 1}",
            f"one per visible GPU, {torch.cuda.device_count()} at most",
            "start fewer; let every task see all GPUs of its node (SLURM: --gpus-per-node instead of "
            "--gpus-per-task); or set CUDA_VISIBLE_DEVICES to an empty string to train on the CPU",
        )
    ]


def nccl_variables(minutes: float) -> dict[str, str]:
    """Environment variables of NCCL's process group that leave the end of a hanging run to the program's watchdog,
    which names the rank; NCCL's own monitor ends a process after 8 minutes without progress.

    Args:
        minutes: see --distributed-timeout-minutes.
    """
    return {"TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": f"{60 * (minutes + 2):.0f}"}


def join_group(rendezvous: Rendezvous, minutes: float) -> torch.device:
    """Creates the process group of all ranks after the rendezvous; returns this process's device.

    Args:
        minutes: to wait for peers; see --distributed-timeout-minutes.
    """
    launch = rendezvous.launch
    # DeepSpeed reads these, whatever the launcher was.
    os.environ["LOCAL_RANK"] = str(launch.local_rank)
    os.environ["RANK"] = str(launch.rank)
    os.environ["WORLD_SIZE"] = str(launch.world_size)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", launch.local_rank)
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    for name, value in nccl_variables(minutes).items():
        os.environ.setdefault(name, value)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("group", rendezvous.store),
        rank=launch.rank,
        world_size=launch.world_size,
        # Longer than the watchdog's timeout: its message names the rank that hangs, a collective's does not.
        timeout=timedelta(minutes=minutes + 1),
    )
    disable_shared_memory_all_reduce()
    # DeepSpeed uses the existing group.
    deepspeed.init_distributed(dist_backend=backend, dist_init_required=False)
    return device


def device_name(device: torch.device) -> str:
    """What a rank computes on, as text: the GPU's name, or the CPU with the threads of a rank."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'' if threads == 1 else 's'} each"


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set on any rank; a collective call."""
    flags = torch.tensor([int(flag)], device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags.item())
