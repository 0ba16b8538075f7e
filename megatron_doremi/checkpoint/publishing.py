"""Rank 0's work on checkpoint folders: publishing one that every rank has written, and deleting old ones.

Only publishing can fail. If a file cannot be deleted, here or in the cleanup at the start, that is a warning.
"""

from __future__ import annotations

import json
import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_doremi.checkpoint.folder import (
    FORMAT,
    UNREADABLE,
    checkpoints,
    checkpoints_folder,
    incompleteness,
    unchecked_state,
)
from megatron_doremi.checkpoint.optimizer_state import write_index
from megatron_doremi.console import warn
from megatron_doremi.errors import RunError
from megatron_doremi.storage.files import atomic_write_text, make_durable, sha256_of
from megatron_doremi.storage.formats import sealed

# Prefixes of folders that are being written, replaced by a new one of the same name, or deleted.
WRITING, REPLACED, DELETING = ".writing-", ".replaced-", ".deleting-"
_LATEST = ".latest."
# On a shared file system the files of other ranks may become visible to rank 0 with a delay.
VISIBILITY_TIMEOUT_SECONDS = 10.0


def publish_checkpoint(
    temporary: Path,
    name: str,
    state: Mapping[str, Any],
    reports: Sequence[Mapping[str, Any]],
    before_publishing: Callable[[], None] = lambda: None,
) -> Path:
    """Completes a checkpoint that every rank has written under a temporary name, and renames it to `name`.

    Args:
        state: content of state.json, except the list of files.
        reports: of each rank, from `_write` in writer.py. They, not the folder, define which files belong to the
            checkpoint.
        before_publishing: called when everything is written, before the rename.

    Returns:
        the checkpoint's folder.

    Raises:
        RunError: a file is missing or its size differs from what its rank wrote; nothing was replaced or deleted.
    """
    folder, final = temporary.parent, temporary.parent / name
    files = {file: int(size) for report in reports for file, size in report["files"].items()}
    _check_sizes(temporary, reports)
    for path in temporary.rglob("*"):
        if path.is_file() and str(path.relative_to(temporary)) not in files:
            # Left by a killed run of another layout.
            path.unlink()
    index = write_index(temporary / "optimizer", [report["optimizer"] for report in reports])
    files[str(index.relative_to(temporary))] = index.stat().st_size
    checksums = {file: str(value) for report in reports for file, value in report["checksums"].items()}
    checksums[str(index.relative_to(temporary))] = sha256_of(index)
    state = {**state, "files": dict(sorted(files.items())), "checksums": dict(sorted(checksums.items()))}
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


def _check_sizes(temporary: Path, reports: Sequence[Mapping[str, Any]]) -> None:
    """Raises RunError if a file is missing or its size differs from the one that its rank reports."""
    deadline = time.monotonic() + VISIBILITY_TIMEOUT_SECONDS
    while True:
        mismatches = []
        for rank, report in enumerate(reports):
            for name, size in report["files"].items():
                actual = _size(temporary / name)
                if actual != size:
                    mismatches.append(f"{name} has {actual:,} bytes, but rank {rank} wrote {size:,}")
        if not mismatches:
            return
        if time.monotonic() >= deadline:
            raise RunError(
                f"rank 0 does not see what other ranks wrote to {temporary}: {mismatches[0]} ({len(mismatches)} files "
                "in total); every rank must see the same --save folder"
            )
        time.sleep(min(0.2, VISIBILITY_TIMEOUT_SECONDS))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


class Retention:
    """Deletes old checkpoints of a run each time a new one has been published.

    - A checkpoint that was taken for --save-interval-in-mins alone is deleted once a newer one is complete.
    - --keep-checkpoints N keeps the newest N complete checkpoints. An incomplete one, left by a failing disk or an
      interrupted copy, is neither counted nor deleted, and is reported once.
    - If a checkpoint is a symbolic link, only the link is deleted.
    """

    def __init__(self, save: Path, keep: int):
        """
        Args:
            keep: number of complete checkpoints to keep; 0: all.
        """
        self.save, self.keep = save, keep
        self._reported: set[Path] = set()
        # Known not to be ephemeral: their state.json need not be read again.
        self._permanent: set[Path] = set()

    def apply(self, iteration: int) -> None:
        """Deletes old checkpoints after the one of `iteration` has been published. Never raises."""
        try:
            older = [path for number, path in reversed(checkpoints(self.save)) if number < iteration]
        except OSError as error:
            warn(f"old checkpoints cannot be deleted: {error}")
            return
        older = [path for path in older if not self._deleted_as_ephemeral(path)]
        complete = 1
        for path in older if self.keep else ():
            reason = incompleteness(path)
            if reason is None and _state(path).get("format") != FORMAT:
                reason = "state.json is of another format"
            if reason is None:
                complete += 1
                if complete > self.keep:
                    _remove_or_warn(path)
            elif path not in self._reported:
                self._reported.add(path)
                warn(f"{path} is incomplete ({reason}): --keep-checkpoints neither counts nor deletes it")

    def _deleted_as_ephemeral(self, path: Path) -> bool:
        if path in self._permanent:
            return False
        if _state(path).get("ephemeral") is True:
            _remove_or_warn(path)
            return True
        self._permanent.add(path)
        return False


def _state(checkpoint: Path) -> dict[str, Any]:
    """state.json, unchecked; empty if it cannot be read."""
    try:
        state = unchecked_state(checkpoint)
    except UNREADABLE:
        return {}
    return state if isinstance(state, dict) else {}


def clear_leftovers(save: Path) -> None:
    """Removes partly written and partly deleted files of a killed run from its --save folder; warns on failure.

    The caller holds the run's lock: no other process writes these files.
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
            # The run was killed between two renames: the new checkpoint is lost, the replaced one is complete.
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
    """Removes a folder, or a link to one, if it exists."""
    if path.is_symlink() or path.is_file():
        path.unlink()
        return
    if not path.exists():
        return
    if not path.name.startswith((WRITING, REPLACED, DELETING)):
        # Renamed first: if the process is killed meanwhile, no partly deleted folder has a checkpoint's name.
        path = path.rename(path.with_name(f"{DELETING}{path.name}-{secrets.token_hex(4)}"))
    shutil.rmtree(path)
