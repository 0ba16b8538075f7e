"""The format of a checkpoint, the search for the newest complete one, and the checks of its content.

    SAVE/checkpoints/iter_0000100/
        weights/*.safetensors    the model (weights.py)
        optimizer/*              the optimizer's state (optimizer_state.py)
        state.json               iteration, the run's identity, the state of the blend and of the mixture controller by
                                 domain, size and checksum of every other file
    SAVE/checkpoints/latest      name of the newest checkpoint, for users; the program does not read it

Checkpoints are layout-independent and contain no pickles: a checkpoint of unknown origin cannot execute code. writer.py
writes each under a temporary name, so that a folder named iter_* is complete; the sizes reveal a truncated copy.
"""

from __future__ import annotations

import heapq
import json
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, model_validator

from megatron_doremi.checkpoint.run_config import IdentityEntry
from megatron_doremi.errors import ConfigError, Fault, raise_if_any
from megatron_doremi.parallel.exchange import gather_json
from megatron_doremi.storage.files import sha256_of
from megatron_doremi.storage.formats import Count, Name, Schema, format_fault, read_checked

FORMAT = "megatron-doremi-checkpoint/2"
_NAME = re.compile(r"iter_(\d{7,})")
# Bound on a domain's credit in windows, which is less than 1 with fixed weights and a few with changing weights.
_MAX_CREDIT = 1e6
# The identity entries that version 0.1 recorded, at the top level of state.json.
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
# Files of a checkpoint whose checksums a rank computes at a time.
_HASHED_AT_ONCE = 4
# Errors of reading an arbitrary file as JSON.
UNREADABLE = (OSError, ValueError, RecursionError)


def checkpoints_folder(save: Path) -> Path:
    """The folder of a run's checkpoints."""
    return save / "checkpoints"


def checkpoint_name(iteration: int) -> str:
    """Folder name of a checkpoint."""
    return f"iter_{iteration:07d}"


def checkpoints(save: Path) -> list[tuple[int, Path]]:
    """The checkpoints of a run, complete or not, oldest first, with their iterations."""
    folder = checkpoints_folder(save)
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted((int(match.group(1)), path) for path in paths if (match := _NAME.fullmatch(path.name)))


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


class CheckpointState(Schema):
    """state.json of a checkpoint. Version 0.1 wrote no `identity`; it recorded some of its entries at the top level."""

    FORMAT: ClassVar[str] = FORMAT
    SEALED: ClassVar[bool] = True
    SEAL_OPTIONAL: ClassVar[bool] = True
    model_config = ConfigDict(extra="allow")

    iteration: Count
    files: dict[Name, Count]
    # SHA-256 of each file; none in checkpoints of version 0.1.
    checksums: dict[Name, str] = Field(default_factory=dict)
    blend: BlendEntry
    identity: IdentityEntry | None = None
    overrides: list[dict[str, Any]] = Field(default_factory=list)
    # Size of metrics.jsonl when the checkpoint was taken.
    metrics_bytes: Count | None = None
    # Taken for --save-interval-in-mins alone; deleted when a newer one is complete.
    ephemeral: bool = False

    @model_validator(mode="after")
    def _one_step(self) -> CheckpointState:
        if self.identity is not None and "sha256" not in (self.model_extra or {}):
            raise ValueError("sha256 is missing: every state that holds an identity is sealed")
        self._early_identity()
        if self.blend.step != self.iteration:
            raise ValueError(f"blend.step {self.blend.step} must equal iteration {self.iteration}")
        return self

    def entry(self, name: str) -> Any:
        """An entry that is not in this schema, such as a mixture controller's state; None if it is missing."""
        return (self.model_extra or {}).get(name)

    def recorded_identity(self) -> dict[str, Any]:
        """The identity of the run that wrote the checkpoint; only some entries if version 0.1 wrote it."""
        if self.identity is not None:
            return self.identity.entries()
        return self._early_identity().entries() | {"domains": list(self.blend.cursors)}

    def _early_identity(self) -> IdentityEntry:
        extra = self.model_extra or {}
        return IdentityEntry.model_validate({key: extra[key] for key in _EARLY_IDENTITY if key in extra})


def newest_checkpoint(save: Path, report: Callable[[str], None] = lambda _: None) -> Path | None:
    """The newest complete checkpoint of a run, or None.

    Args:
        report: called with a message for each incomplete checkpoint that is skipped.

    Raises:
        ConfigError: the newest complete checkpoint is invalid, or was written by a newer version of this program. It is
            never silently replaced by an older one.
    """
    for _, path in reversed(checkpoints(save)):
        reason = incompleteness(path)
        if reason is None:
            read_state(path)
            return path
        report(f"skipping {path}: {reason}")
    return None


def checkpoint_at(folder: Path, step: int, flag: str = "--load") -> Path:
    """The checkpoint of DIR@STEP, which `flag` names. Raises ConfigError if it is missing or incomplete."""
    subject, path = f"{flag} {folder}@{step}", checkpoints_folder(folder) / checkpoint_name(step)
    if not path.is_dir():
        steps = [f"{iteration:,}" for iteration, other in checkpoints(folder) if incompleteness(other) is None]
        rule = f"a step of a checkpoint in {folder}: {', '.join(steps) or 'there is none'}"
        remedy = "give one of these steps" if steps else "correct the path, or train the run first"
        raise ConfigError(Fault(subject, f"no checkpoint of step {step:,}", rule, remedy))
    reason = incompleteness(path)
    if reason is not None:
        raise ConfigError(Fault(subject, reason, "a complete checkpoint", "copy it again, or give another step"))
    read_state(path)
    return path


def unchecked_state(checkpoint: Path) -> Any:
    """The content of state.json as JSON, not validated. Raises one of `UNREADABLE`."""
    return json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))


def incompleteness(checkpoint: Path) -> str | None:
    """Why a checkpoint is incomplete: its first file that is missing or truncated. None if all files are complete."""
    try:
        state = unchecked_state(checkpoint)
    except UNREADABLE as error:
        return f"state.json: {' '.join(str(error).split())}"
    if not isinstance(state, dict) or format_fault(state, "", CheckpointState, "") is not None:
        return None
    files = state.get("files")
    for name, size in files.items() if isinstance(files, dict) else ():
        try:
            actual = (checkpoint / name).stat().st_size
        except (OSError, ValueError):
            # ValueError: a name with a NUL or a lone surrogate, which no run writes.
            actual = 0
        if actual != size:
            return f"{name} has {actual:,} of {size} bytes"
    return None


def read_state(checkpoint: Path) -> CheckpointState:
    """Reads and validates state.json of a checkpoint. Raises ConfigError with every fault."""
    path = checkpoint / "state.json"
    remedy = f"delete {checkpoint} to resume from an older one"
    state = read_checked(path, str(path), CheckpointState, remedy)
    if checkpoint_name(state.iteration) != checkpoint.name:
        rule = f"the iteration of its folder, {checkpoint.name}"
        raise ConfigError(Fault(str(path), f"iteration: {state.iteration}", rule, remedy))
    return state


def changed_files(
    checkpoint: Path, state: CheckpointState, part: int = 0, parts: int = 1, progress: Callable[[], None] = lambda: None
) -> list[str]:
    """Names of files whose content does not match its checksum in state.json, `_HASHED_AT_ONCE` at a time.

    Args:
        part, parts: reads share number `part` of `parts`, see `shares_of_files`.
        progress: called, by any thread, before each file and after each block of it.
    """
    names = shares_of_files({name: state.files.get(name, 0) for name in state.checksums}, parts)[part]

    def is_changed(name: str) -> bool:
        progress()
        return sha256_of(checkpoint / name, progress) != state.checksums[name]

    with ThreadPoolExecutor(_HASHED_AT_ONCE, thread_name_prefix="checksum") as pool:
        return sorted(name for name, changed in zip(names, pool.map(is_changed, names), strict=True) if changed)


def shares_of_files(sizes: Mapping[str, int], parts: int) -> list[list[str]]:
    """Divides files into `parts` shares of about as many bytes: each, the largest first, to the smallest share.

    Args:
        sizes: bytes by name.
    """
    shares: list[list[str]] = [[] for _ in range(parts)]
    smallest = [(0, part) for part in range(parts)]
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        total, part = heapq.heappop(smallest)
        shares[part].append(name)
        heapq.heappush(smallest, (total + sizes[name], part))
    return shares


def changed_file(path: Path, remedy: str) -> Fault:
    """The fault of a file whose content does not match its checksum in state.json."""
    return Fault(str(path), "changed after it was written", "the checksum in state.json", remedy)


def check_contents(
    checkpoint: Path, state: CheckpointState, rank: int, world_size: int, progress: Callable[[], None] = lambda: None
) -> None:
    """Verifies the checksum of every file of a checkpoint; a collective call that splits the files over the ranks.

    Args:
        progress: called before each file and after each block of it.

    Raises:
        ConfigError: on every rank, with every file that was changed after it was written.
    """
    remedy = f"copy {checkpoint} again, or delete it to resume from an older one"
    raise_if_any(
        [
            changed_file(checkpoint / name, remedy)
            for part in gather_json(changed_files(checkpoint, state, rank, world_size, progress))
            for name in part
        ]
    )
