"""Filling a model and its optimizer from a checkpoint that any layout wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from megatron_doremi.checkpoint.optimizer_state import MASTER, OptimizerFolder, owned_state, start_state
from megatron_doremi.checkpoint.weights import WeightsFolder
from megatron_doremi.parallel.deepspeed_internals import writable
from megatron_doremi.parallel.parameters import ParameterSpec, spec_of
from megatron_doremi.parallel.topology import Topology


def check_files(checkpoint: Path) -> None:
    """Raises ConfigError if a checkpoint's weights or optimizer state are damaged, as far as the headers tell."""
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
        progress: called with each parameter.

    Raises:
        ConfigError: a file is damaged or of another model.
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
