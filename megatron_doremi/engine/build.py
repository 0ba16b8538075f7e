"""Building the engine that a run trains with: the model, its optimizer and its objective."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.utils import logger as deepspeed_logger
from numpy.typing import NDArray
from torch import nn

from megatron_doremi.config import Config, GPTConfig
from megatron_doremi.engine.deepspeed_config import deepspeed_config
from megatron_doremi.engine.engines import PipelinedEngine, TrainingEngine, ZeroEngine
from megatron_doremi.engine.optimizer import make_optimizer
from megatron_doremi.mixture.objective import DoReMiSettings, GroupDRO, MeanLoss
from megatron_doremi.model.pipeline import GPTPipeline
from megatron_doremi.model.sizes import parameters_by_layer
from megatron_doremi.model.unpipelined import GPT, GPTModel
from megatron_doremi.parallel.groups import ProcessGroups
from megatron_doremi.parallel.layers import TensorParallel
from megatron_doremi.parallel.topology import Topology
from megatron_doremi.settings import PROXY


@dataclass(frozen=True)
class Layout:
    """What DeepSpeed asks of a layout without a pipeline: its `mpu`, whose method names are Megatron-LM's."""

    topology: Topology
    groups: ProcessGroups

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.groups.data

    def get_data_parallel_world_size(self) -> int:
        return self.topology.data_size

    def get_data_parallel_rank(self) -> int:
        return self.topology.data_rank

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.groups.model

    def get_model_parallel_world_size(self) -> int:
        return self.topology.tensor_size

    def get_model_parallel_rank(self) -> int:
        return self.topology.tensor_rank


def make_objective(
    config: Config, sampling: NDArray[Any], topology: Topology, groups: ProcessGroups, device: torch.device
) -> MeanLoss:
    """A proxy's objective is Group DRO, that of every other phase the mean loss."""
    if config.data.phase != PROXY:
        return MeanLoss(len(sampling), topology, groups, device)
    doremi = config.doremi
    settings = DoReMiSettings(
        step_size=doremi.doremi_step_size,
        smoothing=doremi.doremi_smoothing,
        update=doremi.doremi_update,
        weighting=doremi.doremi_weighting,
        objective=doremi.doremi_objective,
        normalization=doremi.doremi_normalization,
        sampling=torch.from_numpy(sampling).to(device),
    )
    return GroupDRO(settings, topology, groups, device)


def make_engine(
    config: Config,
    gpt: GPTConfig,
    sampling: NDArray[Any],
    topology: Topology,
    groups: ProcessGroups,
    device: torch.device,
) -> TrainingEngine:
    """Builds this rank's part of the model and the DeepSpeed engine that trains it.

    Args:
        sampling: [k] sampling weights of the blend, float64.
    """
    deepspeed_logger.setLevel(logging.WARNING)
    parallel = config.parallel
    tp = TensorParallel(groups.tensor, parallel.sequence_parallel)
    parameters = sum(parameters_by_layer(gpt, topology.tensor_size))
    entry = deepspeed_config(config, gpt.hidden_size, parameters, topology.world_size)
    model = (gpt, topology, tp, config.data.seed, parallel.recompute_granularity, parallel.loss_chunk_tokens)
    module: GPT
    kind: type[TrainingEngine]
    if parallel.zero_stage < 2:
        module = pipeline = GPTPipeline(*model)
        kind, mpu = PipelinedEngine, pipeline.mpu()
    else:
        kind, mpu = ZeroEngine, Layout(topology, groups)

        def partition(layer: nn.Module) -> None:
            # `dtype` below is for parameters that are yet to be made; those that are there keep their own.
            dtype = torch.bfloat16 if config.optimizer.bf16 else torch.float32
            layer.to(dtype)
            deepspeed.zero.Init(layer, groups.data, config_dict_or_path=entry, dtype=dtype, mpu=mpu)

        module = GPTModel(*model, partition=partition if parallel.zero_stage == 3 else None)
    return kind(
        objective=make_objective(config, sampling, topology, groups, device),
        groups=groups,
        clip_grad=config.optimizer.clip_grad,
        args=None,
        model=module,
        optimizer=make_optimizer(module.model_parameters(), config.optimizer),
        mpu=mpu,
        dist_init_required=False,
        config=entry,
        config_class=DeepSpeedConfig(entry, mpu),
    )
