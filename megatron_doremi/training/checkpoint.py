"""Checkpoints: DeepSpeed's files, the model's weights without a layout, and the run's own state beside them.

    SAVE/checkpoints/iter_0000100/
        state.json            iteration, layout, data fingerprint, the blend's and the algorithm's state by domain
        weights/*.safetensors the model, readable at any layout (model/weights.py)
        ...                   what DeepSpeed needs to go on at the same layout
    SAVE/checkpoints/latest   name of the newest complete one

A checkpoint is written under a temporary name and appears under its final one by a single rename, so a folder
named iter_* is complete.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine

from megatron_doremi.data.files import atomic_write_text
from megatron_doremi.errors import ConfigError, Fault, raise_if_any
from megatron_doremi.model.weights import save_weights
from megatron_doremi.parallel.topology import Topology

FORMAT = "megatron-doremi-checkpoint/1"
_NAME = re.compile(r"iter_(\d{7,})")


def checkpoints(save: Path) -> list[tuple[int, Path]]:
    """The complete checkpoints of a run, oldest first, with their iterations."""
    folder = save / "checkpoints"
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and (path / "state.json").is_file():
            found.append((int(match.group(1)), path))
    return sorted(found)


def newest_checkpoint(save: Path) -> Path | None:
    """The newest complete checkpoint of a run, whatever the pointer says, or None."""
    found = checkpoints(save)
    return found[-1][1] if found else None


def save_checkpoint(
    engine: DeepSpeedEngine,
    save: Path,
    iteration: int,
    topology: Topology,
    state: Mapping[str, Any],
    keep: int,
) -> None:
    """Writes a checkpoint; a collective call.

    Args:
        state: the run's own state; written by rank 0 as JSON.
        keep: delete all but this many of the newest; 0 keeps all.
    """
    folder = save / "checkpoints"
    name = f"iter_{iteration:07d}"
    temporary = folder / f".writing-{name}"
    if topology.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / "weights").mkdir(parents=True)
    dist.barrier()
    engine.save_checkpoint(str(folder), tag=temporary.name, save_latest=False)
    save_weights(engine.module, temporary / "weights", topology)
    dist.barrier()
    if topology.rank == 0:
        entry = {"format": FORMAT, "iteration": iteration, "layout": _layout(engine, topology), **state}
        atomic_write_text(temporary / "state.json", json.dumps(entry, indent=1))
        shutil.rmtree(folder / name, ignore_errors=True)
        temporary.rename(folder / name)
        atomic_write_text(folder / "latest", name + "\n")
        for _, path in checkpoints(save)[:-keep] if keep else ():
            shutil.rmtree(path)
    dist.barrier()


def _layout(engine: DeepSpeedEngine, topology: Topology) -> dict[str, int]:
    layout = asdict(topology)
    del layout["rank"]
    return {**layout, "zero_stage": int(engine.zero_optimization_stage())}


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The run's own state in a checkpoint. Raises ConfigError where it cannot be read."""
    path = checkpoint / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            raise ValueError(f"format {state['format']!r}")
        int(state["iteration"])
        return state
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            Fault(
                str(path),
                str(error),
                f"a state of format {FORMAT}",
                f"delete {checkpoint} to go on from an older one",
            )
        ) from error


def check_state(
    state: Mapping[str, Any],
    checkpoint: Path,
    topology: Topology,
    zero_stage: int,
    expected: Mapping[str, Any],
) -> None:
    """Checks that a run may go on from a checkpoint.

    Args:
        expected: entries that have to be the same in the state (what the run was trained on).

    Raises:
        ConfigError: with everything that differs.
    """
    layout = {**asdict(topology), "zero_stage": zero_stage}
    del layout["rank"]
    faults = []
    if state["layout"] != layout:
        faults.append(
            Fault(
                f"--load: {checkpoint}",
                f"written at {_say(state['layout'])}",
                f"this run's layout, {_say(layout)}",
                "start at the checkpoint's layout",
            )
        )
    for key, value in expected.items():
        if state.get(key) != value:
            faults.append(
                Fault(
                    f"--load: {checkpoint}",
                    f"{key} {state.get(key)}",
                    f"this run's {key}, {value}",
                    "go on with the settings and data that the run began with, or start a new folder",
                )
            )
    raise_if_any(faults)


def load_engine(engine: DeepSpeedEngine, checkpoint: Path) -> None:
    """Loads model and optimiser from a checkpoint of the same layout; a collective call."""
    path, _ = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    if path is None:
        raise ConfigError(
            Fault(
                f"--load: {checkpoint}",
                "DeepSpeed found no files there",
                "a complete checkpoint",
                "delete it to go on from an older one",
            )
        )


def _say(layout: Mapping[str, Any]) -> str:
    return (
        f"tensor {layout.get('tensor_size')} x pipeline {layout.get('pipe_size')} x data {layout.get('data_size')}, "
        f"ZeRO {layout.get('zero_stage')}"
    )
