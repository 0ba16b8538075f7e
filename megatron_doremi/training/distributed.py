"""Joining the other processes of a run."""

from __future__ import annotations

import os

import deepspeed
import torch
import torch.distributed as dist

from megatron_doremi.errors import ConfigError, Fault
from megatron_doremi.training.launch import Launch


def join(launch: Launch) -> torch.device:
    """Joins the process group and returns this process's device.

    Raises:
        ConfigError: there are more processes than GPUs.
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
                    "start fewer, or set CUDA_VISIBLE_DEVICES to nothing to train on the CPU",
                )
            )
        device = torch.device("cuda", launch.local_rank)
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if launch.rendezvous:
        dist.init_process_group(backend, init_method=launch.rendezvous, rank=launch.rank, world_size=launch.world_size)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    # DeepSpeed wraps the group that is there. Its all-reduce through shared memory would be compiled at the
    # first start on a machine; gloo serves.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, dist_init_required=False)
    return device
