"""What rank 0 does to checkpoint folders: publish one that every rank has written, and delete those no longer kept.

Only publishing may fail. Whatever is deleted, or tidied at the start, is a warning where it cannot be done.
"""

from __future__ import annotations

import json
import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_doremi.checkpoint.folder import FORMAT, checkpoints, checkpoints_folder, incompleteness
from megatron_doremi.checkpoint.optimizer_state import write_index
from megatron_doremi.console import warn
from megatron_doremi.errors import RunError
from megatron_doremi.storage.files import atomic_write_text, make_durable, sha256_of
from megatron_doremi.storage.formats import sealed

# Names of what is being written, given up for a newer one of the same name, or deleted.
WRITING, REPLACED, DELETING = ".writing-", ".replaced-", ".deleting-"
_LATEST = ".latest."
# Files that other ranks made durable may reach rank 0's view of a shared file system a little later.
PATIENCE_SECONDS = 10.0


def publish_checkpoint(
    temporary: Path,
    name: str,
    entry: Mapping[str, Any],
    parts: Sequence[Mapping[str, Any]],
    before_publishing: Callable[[], None] = lambda: None,
) -> Path:
    """Completes a checkpoint that every rank has written under a temporary name, and gives it its own.

    Args:
        entry: of state.json, but for the list of files.
        parts: what each rank says that it wrote; see `Checkpointer`. Complete is what they say, not what rank 0 sees.
        before_publishing: called when all is written, before the checkpoint appears.

    Raises:
        RunError: a file is missing or has another size than its rank wrote; nothing was replaced or deleted.
    """
    folder, final = temporary.parent, temporary.parent / name
    files = {file: int(size) for part in parts for file, size in part["files"].items()}
    _check_files(temporary, parts)
    for path in temporary.rglob("*"):
        if path.is_file() and str(path.relative_to(temporary)) not in files:
            # Of a killed run that had another layout.
            path.unlink()
    index = write_index(temporary / "optimizer", [part["optimizer"] for part in parts])
    files[str(index.relative_to(temporary))] = index.stat().st_size
    checksums = {file: str(value) for part in parts for file, value in part["checksums"].items()}
    checksums[str(index.relative_to(temporary))] = sha256_of(index)
    state = {**entry, "files": dict(sorted(files.items())), "checksums": dict(sorted(checksums.items()))}
    atomic_write_text(temporary / "state.json", json.dumps(sealed(state), indent=1))
    for path in (temporary / "weights", temporary / "optimizer", temporary):
        make_durable(path)
    before_publishing()
    replaced = folder / f"{REPLACED}{name}"
    if final.is_symlink() or final.exists():
        _remove(replaced)
        final.rename(replaced)
    temporary.rename(final)
    make_durable(folder)
    try:
        atomic_write_text(folder / "latest", name + "\n")
    except OSError as error:
        warn(f"{folder / 'latest'} cannot be written: {error}")
    _remove_or_warn(replaced)
    return final


def _check_files(temporary: Path, parts: Sequence[Mapping[str, Any]]) -> None:
    """Raises RunError where a file is missing or of another size than the rank that wrote it says."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        wrong = []
        for rank, part in enumerate(parts):
            for name, size in part["files"].items():
                found = _size(temporary / name)
                if found != size:
                    wrong.append(f"{name}, of which rank {rank} wrote {size:,} bytes, has {found:,}")
        if not wrong:
            return
        if time.monotonic() >= deadline:
            raise RunError(
                f"rank 0 does not see what other ranks wrote in {temporary}: {wrong[0]} ({len(wrong)} files in all); "
                "every rank must see the same --save folder"
            )
        time.sleep(min(0.2, PATIENCE_SECONDS))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


class Retention:
    """Which checkpoints of a run are deleted when a new one has been published.

    - One that was taken for --save-interval-in-mins alone goes as soon as a newer one is complete.
    - With --keep-checkpoints N the newest N complete ones stay. An incomplete one neither counts nor is deleted: it
      is named once, for it tells of a fault of the disk or of a copy.
    - Of a linked checkpoint only the link is deleted.
    """

    def __init__(self, save: Path, keep: int):
        """
        Args:
            keep: how many complete checkpoints stay; 0: all.
        """
        self.save, self.keep = save, keep
        self._named: set[Path] = set()
        # Read once.
        self._permanent: set[Path] = set()

    def apply(self, iteration: int) -> None:
        """Deletes what the checkpoint of `iteration`, complete and published, makes dispensable. Never fails."""
        try:
            older = [path for number, path in reversed(checkpoints(self.save)) if number < iteration]
        except OSError as error:
            warn(f"old checkpoints cannot be deleted: {error}")
            return
        older = [path for path in older if not self._deleted_as_ephemeral(path)]
        complete = 1
        for path in older if self.keep else ():
            missing = incompleteness(path)
            if missing is None and _state(path).get("format") != FORMAT:
                missing = "state.json is of another format"
            if missing is None:
                complete += 1
                if complete > self.keep:
                    _remove_or_warn(path)
            elif path not in self._named:
                self._named.add(path)
                warn(f"{path} is incomplete ({missing}): --keep-checkpoints neither counts nor deletes it")

    def _deleted_as_ephemeral(self, path: Path) -> bool:
        if path in self._permanent:
            return False
        if _state(path).get("ephemeral") is True:
            _remove_or_warn(path)
            return True
        self._permanent.add(path)
        return False


def _state(checkpoint: Path) -> dict[str, Any]:
    """state.json, unchecked; empty where it cannot be read."""
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return state if isinstance(state, dict) else {}


def clear_leftovers(save: Path) -> None:
    """Removes what a killed run left half-written or half-deleted in its --save, as far as that can be done.

    The caller holds the run's lock: nobody else writes these files.
    """
    for path in [*save.glob(".config.json.*.tmp"), *save.glob(".domain_weights.json.*.tmp")]:
        _remove_or_warn(path)
    folder = checkpoints_folder(save)
    try:
        hidden = [path for path in folder.iterdir() if path.name.startswith((WRITING, REPLACED, DELETING, _LATEST))]
    except FileNotFoundError:
        return
    except OSError as error:
        warn(f"{folder} cannot be read: {error}")
        return
    for path in hidden:
        final = folder / path.name.removeprefix(REPLACED)
        if path.name.startswith(REPLACED) and not final.exists() and incompleteness(path) is None:
            # Killed between two renames: the newer one is lost, this one is whole.
            try:
                path.rename(final)
                continue
            except OSError as error:
                warn(f"{path} cannot be renamed to {final}: {error}")
        else:
            _remove_or_warn(path)


def _remove_or_warn(path: Path) -> None:
    try:
        _remove(path)
    except OSError as error:
        warn(f"{path} cannot be deleted: {error}; delete it by hand")


def _remove(path: Path) -> None:
    """Removes a folder, or a link to one; does nothing where there is none."""
    if path.is_symlink() or path.is_file():
        path.unlink()
        return
    if not path.exists():
        return
    if not path.name.startswith((WRITING, REPLACED, DELETING)):
        # First out of sight: a kill in the middle leaves nothing torn under a checkpoint's name.
        path = path.rename(path.with_name(f"{DELETING}{path.name}-{secrets.token_hex(4)}"))
    shutil.rmtree(path)
