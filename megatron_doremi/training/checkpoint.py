"""Checkpoints on disk: what is in one, which is the newest complete one, and loading it at any layout.

    SAVE/checkpoints/iter_0000100/
        weights/*.safetensors    the model (model/weights.py)
        optimizer/*              the optimiser's state (optimizer_state.py)
        state.json               iteration, what the run was trained on, the blend's and the algorithm's state by
                                 domain, and every other file with its size
    SAVE/checkpoints/latest      name of the newest one; for people, nothing here reads it

Nothing in it belongs to a layout, and nothing is a pickle: a checkpoint of unknown origin is data. saving.py writes it
under a temporary name, so that a folder named iter_* is complete; a copy that was cut off shows by its sizes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from megatron_doremi.errors import MALFORMED, ConfigError, Fault
from megatron_doremi.model.weights import WeightsFolder
from megatron_doremi.model.whole import writable
from megatron_doremi.parallel.parameters import spec_of
from megatron_doremi.parallel.topology import Topology
from megatron_doremi.training.optimizer_state import MASTER, OptimizerFolder, owned_state, start_state

FORMAT = "megatron-doremi-checkpoint/2"
_NAME = re.compile(r"iter_(\d{7,})")


def checkpoints_folder(save: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return save / "checkpoints"


def checkpoint_name(iteration: int) -> str:
    """Folder name of a checkpoint."""
    return f"iter_{iteration:07d}"


def checkpoints(save: Path) -> list[tuple[int, Path]]:
    """The checkpoints of a run, complete or not, oldest first, with their iterations."""
    folder = checkpoints_folder(save)
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match:
            found.append((int(match.group(1)), path))
    return sorted(found)


def newest_checkpoint(save: Path, say: Callable[[str], None] = lambda _: None) -> Path | None:
    """The newest complete checkpoint of a run, or None; `say` is told of each that is passed over."""
    for _, path in reversed(checkpoints(save)):
        lack = _what_lacks(path)
        if lack is None:
            return path
        say(f"passing over {path}: {lack}")
    return None


def _what_lacks(checkpoint: Path) -> str | None:
    """The first file of a checkpoint that is not there as it was written; None where nothing lacks."""
    try:
        files = read_state(checkpoint)["files"]
        for name, size in files.items():
            path = checkpoint / name
            if not path.is_file() or path.stat().st_size != size:
                return f"{name} has {path.stat().st_size if path.is_file() else 0:,} of {size:,} bytes"
    except (ConfigError, OSError, *MALFORMED) as error:
        return " ".join(str(error).split())
    return None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The run's own state in a checkpoint. Raises ConfigError where it cannot be read."""
    path = checkpoint / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            raise ValueError(f"format {state['format']!r}")
        int(state["iteration"]), state["files"]
        return state
    except (OSError, *MALFORMED) as error:
        raise ConfigError(
            Fault(
                str(path),
                str(error),
                f"a state of format {FORMAT}",
                f"delete {checkpoint} to go on from an older one",
            )
        ) from error


def check_files(checkpoint: Path) -> None:
    """Raises ConfigError where a checkpoint's weights or optimiser state are damaged, as far as headers tell."""
    WeightsFolder(checkpoint / "weights")
    OptimizerFolder(checkpoint / "optimizer")


@torch.no_grad()
def load_training(
    engine: DeepSpeedEngine,
    checkpoint: Path,
    topology: Topology,
    iteration: int,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Fills model and optimiser from a checkpoint that any layout wrote; a collective call.

    Args:
        progress: called with each parameter.

    Raises:
        ConfigError: a file is damaged or of another model.
    """
    weights, states = WeightsFolder(checkpoint / "weights"), OptimizerFolder(checkpoint / "optimizer")
    # Where the run trained in float32, its weights are the master weights.
    masters = MASTER in states.keys
    start_state(engine, iteration)
    for name, parameter in engine.module.model_parameters():
        progress()
        spec = spec_of(parameter)
        shape = torch.Size(spec.local_shape(topology.tensor_size))
        if masters:
            own = states.part(name, MASTER, spec, topology, 0, shape.numel()).view(shape)
        else:
            own = weights.part(name, spec, topology)
        with writable(parameter):
            parameter.copy_(own)
    for owned in owned_state(engine, topology.data_rank):
        progress()
        spec = spec_of(owned.parameter)
        for key, tensor in owned.tensors.items():
            if key == MASTER and not masters:
                own = weights.part(owned.name, spec, topology).reshape(-1)
                tensor.copy_(own.narrow(0, owned.start, owned.count))
            else:
                tensor.copy_(states.part(owned.name, key, spec, topology, owned.start, owned.count))
