"""Checkpoints on disk: what is in one, which is the newest complete one, and loading it at any layout.

    SAVE/checkpoints/iter_0000100/
        weights/*.safetensors    the model (checkpoint/weights.py)
        optimizer/*              the optimizer's state (optimizer_state.py)
        state.json               iteration, what the run was trained on, the blend's and the algorithm's state by
                                 domain, and every other file with its size
    SAVE/checkpoints/latest      name of the newest one; for people, nothing here reads it

Nothing in it belongs to a layout, and nothing is a pickle: a checkpoint of unknown origin is data. writer.py writes it
under a temporary name, so that a folder named iter_* is complete; a copy that was cut off shows by its sizes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from pydantic import ConfigDict, Field, model_validator

from megatron_doremi.checkpoint.optimizer_state import MASTER, OptimizerFolder, owned_state, start_state
from megatron_doremi.checkpoint.run_config import IdentityEntry
from megatron_doremi.checkpoint.weights import WeightsFolder
from megatron_doremi.errors import ConfigError, Fault, raise_if_any
from megatron_doremi.model.unpipelined import writable
from megatron_doremi.parallel.exchange import gather_json
from megatron_doremi.parallel.parameters import spec_of
from megatron_doremi.parallel.topology import Topology
from megatron_doremi.storage.files import sha256_of
from megatron_doremi.storage.formats import Count, Name, Schema, format_fault, read_checked

FORMAT = "megatron-doremi-checkpoint/2"
_NAME = re.compile(r"iter_(\d{7,})")
# Windows owed to a domain: less than one under weights that stay, a few where they move.
_MAX_CREDIT = 1e6
# Version 0.1 kept these of a run, beside the state.
_EARLY_IDENTITY = (
    "phase",
    "gpt",
    "data_fingerprint",
    "sampling_weights",
    "seq_length",
    "global_batch_size",
    "seed",
    "reference",
)
# Sums of as many float64 as a run has domains and steps.
_ROUNDING = 1e-6


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


class BlendEntry(Schema):
    """The blend's state by domain; see `BlendState`."""

    step: Count
    credits: dict[Name, Annotated[float, Field(gt=-_MAX_CREDIT, lt=_MAX_CREDIT)]]
    cursors: dict[Name, Count]

    @model_validator(mode="after")
    def _same_domains(self) -> BlendEntry:
        if self.credits.keys() != self.cursors.keys():
            raise ValueError("credits and cursors must name the same domains")
        return self


class DomainWeightsEntry(Schema):
    """A proxy's domain weights; see `DomainWeights`."""

    steps: Count
    weights: dict[Name, Annotated[float, Field(ge=0, le=1)]]
    excess: dict[Name, float]
    weight_sum: dict[Name, Annotated[float, Field(ge=0)]]

    @model_validator(mode="after")
    def _sums(self) -> DomainWeightsEntry:
        if not self.weights.keys() == self.excess.keys() == self.weight_sum.keys():
            raise ValueError("weights, excess and weight_sum must name the same domains")
        for name, total, expected in (("weights", self.weights, 1.0), ("weight_sum", self.weight_sum, self.steps)):
            found = math.fsum(total.values())
            if not math.isclose(found, expected, rel_tol=_ROUNDING, abs_tol=_ROUNDING):
                raise ValueError(f"{name} must sum to {expected:g}, not {found!r}")
        return self


class CheckpointState(Schema):
    """state.json of a checkpoint. What version 0.1 wrote of a run stands beside `identity`, which it lacks."""

    FORMAT: ClassVar[str] = FORMAT
    SEALED: ClassVar[bool] = True
    SEAL_OPTIONAL: ClassVar[bool] = True
    model_config = ConfigDict(extra="allow")

    iteration: Count
    files: dict[Name, Count]
    # SHA-256 of each file; version 0.1 took none.
    checksums: dict[Name, str] = Field(default_factory=dict)
    blend: BlendEntry
    doremi: DomainWeightsEntry | None = None
    identity: IdentityEntry | None = None
    overrides: list[dict[str, Any]] = Field(default_factory=list)
    # Size of metrics.jsonl when the checkpoint was taken.
    metrics_bytes: Count | None = None
    # Taken for --save-interval-in-mins alone; it goes when a newer one is complete.
    ephemeral: bool = False

    @model_validator(mode="after")
    def _one_step(self) -> CheckpointState:
        if self.identity is not None and "sha256" not in (self.model_extra or {}):
            raise ValueError("sha256 is missing: every state that holds an identity is sealed")
        self._early_identity()
        if self.blend.step != self.iteration:
            raise ValueError(f"blend.step {self.blend.step} must equal iteration {self.iteration}")
        if self.doremi is not None and self.doremi.steps != self.iteration:
            raise ValueError(f"doremi.steps {self.doremi.steps} must equal iteration {self.iteration}")
        return self

    def recorded_identity(self) -> dict[str, Any]:
        """The identity of the run that wrote the checkpoint; of version 0.1, as much of it as that recorded."""
        if self.identity is not None:
            return self.identity.entries()
        return self._early_identity().entries() | {"domains": list(self.blend.cursors)}

    def _early_identity(self) -> IdentityEntry:
        known = self.model_extra or {}
        return IdentityEntry.model_validate({key: known[key] for key in _EARLY_IDENTITY if key in known})


def newest_checkpoint(save: Path, say: Callable[[str], None] = lambda _: None) -> Path | None:
    """The newest complete checkpoint of a run, or None; `say` is told of each that is passed over.

    Raises:
        ConfigError: it is complete, but of another version of this program, or holds what no run writes. An older one
            is not taken silently in its place.
    """
    for _, path in reversed(checkpoints(save)):
        lack = incompleteness(path)
        if lack is None:
            read_state(path)
            return path
        say(f"passing over {path}: {lack}")
    return None


def incompleteness(checkpoint: Path) -> str | None:
    """The first file of a checkpoint that is missing or cut off; None where it is complete, whatever it holds."""
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return f"state.json: {' '.join(str(error).split())}"
    if not isinstance(state, dict) or format_fault(state, "", CheckpointState, "") is not None:
        return None
    files = state.get("files")
    for name, size in files.items() if isinstance(files, dict) else ():
        try:
            found = (checkpoint / name).stat().st_size
        except (OSError, ValueError):
            # ValueError: a name with a NUL or a lone surrogate, which no run writes.
            found = 0
        if found != size:
            return f"{name} has {found:,} of {size} bytes"
    return None


def read_state(checkpoint: Path) -> CheckpointState:
    """The run's own state in a checkpoint. Raises ConfigError with everything that is wrong with it."""
    path = checkpoint / "state.json"
    remedy = f"delete {checkpoint} to resume from an older one"
    state = read_checked(path, str(path), CheckpointState, remedy)
    if checkpoint_name(state.iteration) != checkpoint.name:
        rule = f"the iteration of its folder, {checkpoint.name}"
        raise ConfigError(Fault(str(path), f"iteration: {state.iteration}", rule, remedy))
    return state


def check_files(checkpoint: Path) -> None:
    """Raises ConfigError where a checkpoint's weights or optimizer state are damaged, as far as headers tell."""
    WeightsFolder(checkpoint / "weights")
    OptimizerFolder(checkpoint / "optimizer").check_files()


def changed_files(
    checkpoint: Path, state: CheckpointState, part: int = 0, parts: int = 1, progress: Callable[[], None] = lambda: None
) -> list[str]:
    """Files whose content is not what was written, by the checksums in state.json.

    Args:
        part, parts: which share of the files is read.
        progress: called with each file and each block of it.
    """
    changed = []
    for name, value in sorted(state.checksums.items())[part::parts]:
        progress()
        if sha256_of(checkpoint / name, progress) != value:
            changed.append(name)
    return changed


def check_contents(
    checkpoint: Path, state: CheckpointState, rank: int, world_size: int, progress: Callable[[], None] = lambda: None
) -> None:
    """Reads every file of a checkpoint and compares its checksum; a collective call in which ranks share the files.

    Raises:
        ConfigError: on every rank, with every file whose content changed after it was written.
    """
    remedy = f"copy {checkpoint} again, or delete it to resume from an older one"
    raise_if_any(
        [
            Fault(str(checkpoint / name), "changed after it was written", "the checksum in state.json", remedy)
            for part in gather_json(changed_files(checkpoint, state, rank, world_size, progress))
            for name in part
        ]
    )


@torch.no_grad()
def load_training(
    engine: DeepSpeedEngine,
    checkpoint: Path,
    topology: Topology,
    iteration: int,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Fills model and optimizer from a checkpoint that any layout wrote; a collective call.

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
