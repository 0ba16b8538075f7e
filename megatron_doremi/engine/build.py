"""Builds the engine that a run trains with: the model, its optimizer and its objective."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.utils import logger as deepspeed_logger
from torch import nn

from megatron_doremi.engine.deepspeed_config import deepspeed_config
from megatron_doremi.engine.engines import OneStageEngine, PipelinedEngine, TrainingEngine
from megatron_doremi.engine.muon import make_muon
from megatron_doremi.engine.optimizer import make_optimizer
from megatron_doremi.mixture.objective import Objective
from megatron_doremi.model.pipeline import GPTPipeline
from megatron_doremi.model.sizes import parameters_by_layer
from megatron_doremi.model.unpipelined import GPT, make_gpt
from megatron_doremi.parallel.context import ParallelContext
from megatron_doremi.parallel.deepspeed_internals import new_groups_replaced, pipeline_mpu, silence_memory_reports
from megatron_doremi.parallel.groups import TensorGroup
from megatron_doremi.plan import RunPlan


def data_group(context: ParallelContext) -> dist.ProcessGroup:
    """The data group; that of a single replica has one rank."""
    return context.groups.data if context.topology.data_size > 1 else context.groups.alone()


@dataclass(frozen=True)
class Layout:
    """DeepSpeed's `mpu` for a layout with tensor parallelism and no pipeline; its methods have Megatron-LM's names."""

    context: ParallelContext

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return data_group(self.context)

    def get_data_parallel_world_size(self) -> int:
        return self.context.topology.data_size

    def get_data_parallel_rank(self) -> int:
        return self.context.topology.data_rank

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.context.groups.model

    def get_model_parallel_world_size(self) -> int:
        return self.context.topology.tensor_size

    def get_model_parallel_rank(self) -> int:
        return self.context.topology.tensor_rank


def _optimizer(plan: RunPlan, module: GPT, context: ParallelContext) -> torch.optim.Optimizer:
    settings, parallel = plan.config.optimizer, plan.config.parallel
    if settings.optimizer == "muon":
        topology, tp = context.topology, context.tensor_parallel.group
        replicas = None
        if parallel.zero_stage > 0:
            group = context.groups.data if topology.data_size > 1 else None
            replicas = TensorGroup(group, topology.data_size, topology.data_rank)
        return make_muon(module.model_parameters(), settings, plan.gpt, tp, replicas)
    in_buckets = parallel.zero_stage == 2 and not parallel.cpu_offload
    return make_optimizer(module.model_parameters(), settings, in_buckets)


def make_engine(
    plan: RunPlan, objective: Objective, context: ParallelContext, to_be_loaded: bool = False
) -> TrainingEngine:
    """Builds this rank's part of the model and the DeepSpeed engine that trains it.

    Args:
        objective: the loss that it minimizes.
        to_be_loaded: weights are about to be loaded, so that no initial values are drawn: for 8B these take minutes.
    """
    deepspeed_logger.setLevel(logging.WARNING)
    silence_memory_reports()
    config, gpt, parallel = plan.config, plan.gpt, plan.config.parallel
    parameters = sum(parameters_by_layer(gpt, context.topology.tensor_size))
    entry = deepspeed_config(plan, parameters)
    kind: type[TrainingEngine] = PipelinedEngine if context.topology.pipe_size > 1 else OneStageEngine
    # Without one DeepSpeed knows the data group only: all ranks.
    mpu = Layout(context) if context.topology.tensor_size > 1 else None

    def partition(layer: nn.Module) -> None:
        deepspeed.zero.Init(layer, data_group(context), config_dict_or_path=entry, dtype=plan.dtype, mpu=mpu)

    module = make_gpt(
        gpt,
        context,
        None if to_be_loaded else config.data.seed,
        plan.execution(objective.before_backward),
        partition if parallel.zero_stage == 3 else None,
        plan.dtype,
    )
    if isinstance(module, GPTPipeline):
        mpu = pipeline_mpu(module, data_group(context))
    with new_groups_replaced(context.groups.instead_of_new_group):
        return kind(
            objective=objective,
            context=context,
            clip_grad=config.optimizer.clip_grad,
            z_loss=config.training.z_loss,
            args=None,
            model=module,
            optimizer=_optimizer(plan, module, context),
            mpu=mpu,
            dist_init_required=False,
            config=entry,
            config_class=DeepSpeedConfig(entry, mpu),
        )
