"""Loads a checkpoint of any layout: a model and its optimizer to train on, or a frozen model for forward passes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from megatron_doremi.checkpoint.filling import ReadRange, fill, fill_parameters
from megatron_doremi.checkpoint.optimizer_state import MASTER, OptimizerFolder, owned_state, start_state
from megatron_doremi.checkpoint.source import Weights
from megatron_doremi.checkpoint.weights import WeightsFolder
from megatron_doremi.config import GPTConfig
from megatron_doremi.execution import DEFAULT, Execution
from megatron_doremi.model.unpipelined import GPT, make_gpt
from megatron_doremi.parallel.context import ParallelContext
from megatron_doremi.parallel.exchange import on_all_ranks
from megatron_doremi.parallel.parameters import ParameterSpec, spec_of
from megatron_doremi.parallel.topology import Topology


def check_files(checkpoint: Path, rank: int = 0, world_size: int = 1) -> None:
    """Checks the headers of the weights and of the optimizer state; a collective call that splits the latter's.

    Raises:
        ConfigError: on every rank, if a header reveals damage.
    """

    def check() -> None:
        WeightsFolder(checkpoint / "weights")
        OptimizerFolder(checkpoint / "optimizer").check_files(rank, world_size)

    check() if world_size == 1 else on_all_ranks(check)


@torch.no_grad()
def load_training(
    engine: DeepSpeedEngine,
    checkpoint: Path,
    context: ParallelContext,
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
    topology = context.topology
    weights, states = WeightsFolder(checkpoint / "weights"), OptimizerFolder(checkpoint / "optimizer")

    def read(name: str, key: str, spec: ParameterSpec) -> ReadRange:
        if key == MASTER and MASTER not in states.keys:
            # The run trained in float32: its weights are the master weights.
            return partial(weights.blocks, name, spec, topology)
        return partial(states.blocks, name, key, spec, topology)

    def read_parameter(name: str, parameter: Tensor) -> ReadRange:
        spec = spec_of(parameter)
        if name in weights.names() and weights.dtype(name) == parameter.dtype:
            # Half the bytes of the master weights, whose rounded values these are.
            return partial(weights.blocks, name, spec, topology)
        return read(name, MASTER, spec)

    start_state(engine, iteration)
    jobs = [
        partial(fill, tensor, owned.start, read(owned.name, key, spec_of(owned.parameter)))
        for owned in owned_state(engine, topology.data_rank)
        for key, tensor in owned.tensors.items()
    ]
    parameters = [(parameter, read_parameter(name, parameter)) for name, parameter in engine.module.model_parameters()]
    fill_parameters(parameters, jobs, context, progress)


@torch.no_grad()
def load_weights(
    engine: DeepSpeedEngine, weights: Weights, context: ParallelContext, progress: Callable[[], None] = lambda: None
) -> None:
    """Fills the model of a new run, master weights included, with those of another; its moments stay zero. A
    collective call.

    Args:
        progress: called before each parameter.

    Raises:
        ConfigError: a file is damaged or belongs to another model.
    """
    start_state(engine, 0)
    topology = context.topology
    masters = [
        partial(fill, owned.tensors[MASTER], owned.start, _read(weights, owned.name, owned.parameter, topology))
        for owned in owned_state(engine, topology.data_rank)
        if MASTER in owned.tensors
    ]
    fill_parameters(_readers(engine.module, weights, topology), masters, context, progress)


def copy_weights(module: GPT, weights: Weights, context: ParallelContext) -> None:
    """Fills this rank's parameters; a collective call.

    Raises:
        ConfigError: a file is damaged or belongs to another model.
    """
    fill_parameters(_readers(module, weights, context.topology), [], context)


def _readers(module: GPT, weights: Weights, topology: Topology) -> list[tuple[Tensor, ReadRange]]:
    return [(parameter, _read(weights, name, parameter, topology)) for name, parameter in module.model_parameters()]


def _read(weights: Weights, name: str, parameter: Tensor, topology: Topology) -> ReadRange:
    return partial(weights.blocks, name, spec_of(parameter), topology)


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
    module = make_gpt(gpt, context, seed=None, execution=execution, dtype=dtype)
    module.requires_grad_(False).eval()
    copy_weights(module, weights, context)
    return module
