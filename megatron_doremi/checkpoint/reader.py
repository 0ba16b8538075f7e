"""Loads a checkpoint of any layout: a model and its optimizer to train on, or a frozen model for forward passes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from megatron_doremi.checkpoint.optimizer_state import MASTER, OptimizerFolder, owned_state, start_state
from megatron_doremi.checkpoint.source import Weights
from megatron_doremi.checkpoint.weights import WeightsFolder
from megatron_doremi.config import GPTConfig
from megatron_doremi.execution import DEFAULT, Execution
from megatron_doremi.model.unpipelined import GPT, make_gpt
from megatron_doremi.parallel.context import ParallelContext
from megatron_doremi.parallel.deepspeed_internals import writable
from megatron_doremi.parallel.parameters import ParameterSpec, spec_of
from megatron_doremi.parallel.topology import Topology


def check_files(checkpoint: Path) -> None:
    """Raises ConfigError if the headers of the weights or of the optimizer state reveal damage."""
    WeightsFolder(checkpoint / "weights")
    OptimizerFolder(checkpoint / "optimizer").check_files()


@torch.no_grad()
def load_training(
    engine: DeepSpeedEngine,
    checkpoint: Path,
    topology: Topology,
    iteration: int,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Fills model and optimizer from a checkpoint of any layout; a collective call.

    Args:
        iteration: optimizer steps taken.
        progress: called before each parameter.

    Raises:
        ConfigError: a file is damaged or belongs to another model.
    """
    weights, states = WeightsFolder(checkpoint / "weights"), OptimizerFolder(checkpoint / "optimizer")

    def read(name: str, key: str, spec: ParameterSpec, start: int, count: int) -> Tensor:
        if key == MASTER and MASTER not in states.keys:
            # The run trained in float32: its weights are the master weights.
            return weights.local_shard(name, spec, topology).reshape(-1).narrow(0, start, count)
        return states.local_range(name, key, spec, topology, start, count)

    start_state(engine, iteration)
    for name, parameter in engine.module.model_parameters():
        progress()
        spec = spec_of(parameter)
        shape = torch.Size(spec.local_shape(topology.tensor_size))
        values = read(name, MASTER, spec, 0, shape.numel()).view(shape)
        with writable(parameter):
            parameter.copy_(values)
    for owned in owned_state(engine, topology.data_rank):
        progress()
        for key, tensor in owned.tensors.items():
            tensor.copy_(read(owned.name, key, spec_of(owned.parameter), owned.start, owned.count))


@torch.no_grad()
def load_weights(
    engine: DeepSpeedEngine, weights: Weights, topology: Topology, progress: Callable[[], None] = lambda: None
) -> None:
    """Fills the model of a new run, master weights included, with those of another; its moments stay zero.

    Args:
        progress: called before each parameter.

    Raises:
        ConfigError: a file is damaged or belongs to another model.
    """
    start_state(engine, 0)
    masters = {each.name: each for each in owned_state(engine, topology.data_rank) if MASTER in each.tensors}
    for name, parameter in engine.module.model_parameters():
        progress()
        values = weights.local_shard(name, spec_of(parameter), topology)
        with writable(parameter):
            parameter.copy_(values)
        if name in masters:
            owned = masters[name]
            owned.tensors[MASTER].copy_(values.reshape(-1).narrow(0, owned.start, owned.count))


def copy_weights(module: GPT, weights: Weights, topology: Topology) -> None:
    """Fills this rank's parameters. Raises ConfigError if a file is damaged or belongs to another model."""
    for name, parameter in module.model_parameters():
        parameter.copy_(weights.local_shard(name, spec_of(parameter), topology))


@torch.no_grad()
def load_frozen(
    gpt: GPTConfig,
    weights: Weights,
    context: ParallelContext,
    dtype: torch.dtype,
    execution: Execution = DEFAULT,
) -> GPT:
    """This rank's stage of a trained model, for forward passes only.

    Args:
        weights: of any layout.
    """
    # Drawing the initial values of an 8B model takes minutes, and the weights overwrite them.
    module = make_gpt(gpt, context, seed=None, execution=execution)
    copy_weights(module, weights, context.topology)
    module.to(dtype).requires_grad_(False).eval()
    return module
