"""Writing checkpoints while training goes on.

Training stops for the copy to the host's memory only. A thread of each rank then writes its files and makes them
durable; once every rank has said that it is done (the ranks agree on that with each step, see consensus.py) rank 0
publishes the checkpoint by a single rename.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine

from megatron_doremi.data.files import atomic_write_text, make_durable
from megatron_doremi.data.tensor_file import TensorFile
from megatron_doremi.errors import RunError
from megatron_doremi.model.weights import weights_file
from megatron_doremi.parallel.topology import Topology
from megatron_doremi.training.checkpoint import FORMAT, checkpoint_name, checkpoints, checkpoints_folder
from megatron_doremi.training.optimizer_state import optimizer_file, write_index

# Names of what is being written, given up for a newer one of the same name, or deleted.
_WRITING, _REPLACED, _DELETING = ".writing-", ".replaced-", ".deleting-"

_SECONDS_A_TURN = 20.0


@dataclass
class _Pending:
    """A checkpoint on its way: this rank's work on it, and what rank 0 does once all have done theirs."""

    work: Future[None]
    publish: Callable[[], None]
    written_everywhere: bool = False


class Checkpointer:
    """Writes a run's checkpoints in the background, one at a time."""

    def __init__(self, save: Path, keep: int, topology: Topology, progress: Callable[[], None] = lambda: None):
        """Clears what a killed run left half-written.

        Args:
            keep: delete all but this many of the newest checkpoints; 0 keeps all.
            progress: called now and then while others are waited for.
        """
        self.save, self.keep, self.topology, self._progress = save, keep, topology, progress
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: _Pending | None = None
        if topology.rank == 0:
            for prefix in (_WRITING, _REPLACED, _DELETING):
                for path in checkpoints_folder(save).glob(f"{prefix}*"):
                    shutil.rmtree(path)

    def start(
        self,
        engine: DeepSpeedEngine,
        iteration: int,
        state: Mapping[str, Any],
        before_publishing: Callable[[], None] = lambda: None,
    ) -> None:
        """Copies what is to be saved and begins to write it; a collective call.

        Args:
            state: the run's own state; written by rank 0 as JSON.
            before_publishing: called on rank 0, in the thread, before the checkpoint appears.
        """
        self.finish()
        topology = self.topology
        temporary = checkpoints_folder(self.save) / f"{_WRITING}{checkpoint_name(iteration)}"
        files = [(temporary / "weights", weights_file(engine.module, topology))]
        files.append((temporary / "optimizer", optimizer_file(engine, topology)))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        layout = {**asdict(topology), "zero_stage": int(engine.zero_optimization_stage())}
        del layout["rank"]
        entry = {"format": FORMAT, "iteration": iteration, "layout": layout, **state}

        def publish() -> None:
            before_publishing()
            publish_checkpoint(temporary, checkpoint_name(iteration), entry, self.keep)

        self._pending = _Pending(self._thread.submit(_write, files), publish)

    def progress(self) -> tuple[bool, bool]:
        """(this rank still writes, its writing failed): what the ranks have to agree on."""
        work = self._pending.work if self._pending else None
        if work is None or not work.done():
            return work is not None, False
        return False, work.exception() is not None

    def all_written(self) -> None:
        """Every rank has written its files: rank 0 publishes, in its thread."""
        if self._pending is None or self._pending.written_everywhere:
            return
        if self.topology.rank == 0:
            self._pending.work = self._thread.submit(self._pending.publish)
            self._pending.written_everywhere = True
        else:
            self._pending = None

    def finish(self) -> None:
        """Waits until the last checkpoint stands under its name; a collective call.

        Raises:
            RunError: on every rank, where one could not write, with its reason.
        """
        pending, self._pending = self._pending, None
        if pending is not None and not pending.written_everywhere:
            self._wait_everywhere(pending.work)
            pending.work = self._thread.submit(pending.publish) if self.topology.rank == 0 else pending.work
        self._wait_everywhere(pending.work if pending is not None else None)

    def _wait_everywhere(self, work: Future[None] | None) -> None:
        """Waits for every rank's work, in turns short enough for a collective's patience and the watchdog's."""
        waiting = True
        while waiting:
            if work is not None:
                wait([work], timeout=_SECONDS_A_TURN)
            self._progress()
            done = work is None or work.done()
            error = work.exception() if work is not None and done else None
            own = (done, None if error is None else f"rank {self.topology.rank}: {error}")
            everyone: list[Any] = [own] * self.topology.world_size
            if self.topology.world_size > 1:
                dist.all_gather_object(everyone, own)
            found = [said for _, said in everyone if said]
            if found:
                newest = checkpoints(self.save)
                last = f"the newest checkpoint is {newest[-1][1]}" if newest else "there is no checkpoint yet"
                raise RunError(f"a checkpoint could not be written: {'; '.join(found)}; {last}")
            waiting = not all(is_done for is_done, _ in everyone)


def _write(files: list[tuple[Path, TensorFile | None]]) -> None:
    for folder, file in files:
        folder.mkdir(parents=True, exist_ok=True)
        if file is not None:
            file.write(folder)


def publish_checkpoint(temporary: Path, name: str, entry: Mapping[str, Any], keep: int) -> None:
    """Completes a checkpoint that is there under a temporary name, and gives it its own.

    Args:
        entry: of state.json, but for the list of files.
        keep: delete all but this many of the newest checkpoints; 0 keeps all.
    """
    folder = temporary.parent
    write_index(temporary / "optimizer")
    files = {
        str(path.relative_to(temporary)): path.stat().st_size
        for path in sorted(temporary.rglob("*"))
        if path.is_file() and path.name != "state.json"
    }
    atomic_write_text(temporary / "state.json", json.dumps({**entry, "files": files}, indent=1))
    for path in (temporary / "weights", temporary / "optimizer", temporary):
        make_durable(path)
    final = folder / name
    if final.exists():
        final.rename(folder / f"{_REPLACED}{name}")
    temporary.rename(final)
    make_durable(folder)
    atomic_write_text(folder / "latest", name + "\n")
    shutil.rmtree(folder / f"{_REPLACED}{name}", ignore_errors=True)
    for _, path in checkpoints(folder.parent)[:-keep] if keep else ():
        # First out of sight: a kill in the middle leaves nothing torn under a checkpoint's name.
        hidden = path.rename(folder / f"{_DELETING}{path.name}")
        shutil.rmtree(hidden)
