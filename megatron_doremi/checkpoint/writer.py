"""Writing checkpoints while training goes on.

Training stops for the copy to the host's memory only. A thread of each rank then writes its files and makes them
durable; whether every rank has done so is among the flags of each step (step_flags.py). Then the ranks tell rank 0 the
names and sizes of what they wrote, and rank 0 publishes the checkpoint by a single rename (publishing.py).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from megatron_doremi.checkpoint.folder import FORMAT, checkpoint_name, checkpoints, checkpoints_folder
from megatron_doremi.checkpoint.optimizer_state import index_part, optimizer_file
from megatron_doremi.checkpoint.publishing import WRITING, Retention, publish_checkpoint
from megatron_doremi.checkpoint.weights import weights_file
from megatron_doremi.cluster.run_lock import lost_message
from megatron_doremi.errors import RunError
from megatron_doremi.parallel.exchange import gather_json
from megatron_doremi.parallel.topology import Topology
from megatron_doremi.storage.files import sha256_of
from megatron_doremi.storage.tensor_file import TensorFile

OPTIMIZER = "optimizer"
_SECONDS_A_TURN = 20.0
# How long a run that ends by an error waits for a checkpoint that every rank has written.
SECONDS_TO_CLOSE = 20.0


class SaveTimer:
    """Decides on one rank when a checkpoint is due by time; the step's flags carry it to the others."""

    def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic):
        """
        Args:
            minutes: between two checkpoints; 0: never due.
            clock: seconds that never go back.
        """
        self._seconds, self._clock, self._last = 60.0 * minutes, clock, clock()

    def due(self) -> bool:
        """Whether the last checkpoint was taken so long ago."""
        return self._seconds > 0 and self._clock() - self._last >= self._seconds

    def restart(self) -> None:
        """A checkpoint is being taken."""
        self._last = self._clock()


@dataclass
class _Pending:
    """A checkpoint on its way: this rank's work on it, and what rank 0 does once all have done theirs."""

    work: Future[Any]
    publish: Callable[[list[Any]], None]
    written_everywhere: bool = False


class Checkpointer:
    """Writes a run's checkpoints in the background, one at a time."""

    def __init__(
        self,
        save: Path,
        keep: int,
        topology: Topology,
        progress: Callable[[], None] = lambda: None,
        run_token: str = "",
        lost_to: Callable[[], str | None] = lambda: None,
    ):
        """
        Args:
            keep: keep this many of the newest complete checkpoints; 0 keeps all.
            progress: called now and then while others are waited for.
            run_token: the same on all ranks, of this start only: two starts never write into one folder.
            lost_to: asked on rank 0: who has taken the run's lock over, in which case nothing is published any more.
        """
        self.save, self.topology, self._progress, self._run_token = save, topology, progress, run_token
        self._lost_to = lost_to
        self._retention = Retention(save, keep)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: _Pending | None = None
        self._closed = threading.Event()

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
            before_publishing: called on rank 0, in the thread, before the checkpoint appears; where it raises, the
                checkpoint is not published, and the run ends.
        """
        self.finish()
        topology = self.topology
        temporary = checkpoints_folder(self.save) / f"{WRITING}{checkpoint_name(iteration)}{self._run_token}"
        files = [("weights", weights_file(engine.module, topology)), (OPTIMIZER, optimizer_file(engine, topology))]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        layout = {**asdict(topology), "zero_stage": int(engine.zero_optimization_stage())}
        del layout["rank"]
        entry = {"format": FORMAT, "iteration": iteration, "layout": layout, **state}

        def last_check() -> None:
            before_publishing()
            if self._closed.is_set():
                raise RunError(f"the run ended before {checkpoint_name(iteration)} was published")

        def publish(parts: list[Any]) -> None:
            publish_checkpoint(temporary, checkpoint_name(iteration), entry, parts, last_check)
            if not self._closed.is_set():
                self._retention.apply(iteration)

        self._pending = _Pending(self._thread.submit(_write, temporary, files), publish)

    def progress(self) -> tuple[bool, bool]:
        """(this rank still writes, its writing failed): what the ranks have to agree on."""
        work = self._pending.work if self._pending else None
        writing = work is not None and not work.done()
        failed = work is not None and not writing and work.exception() is not None
        return writing, failed or self._lost_to() is not None

    def all_written(self) -> None:
        """Every rank has written its files: rank 0 publishes, in its thread. A collective call."""
        pending = self._pending
        if pending is not None and not pending.written_everywhere:
            self._publish(pending)
            self._pending = pending if self.topology.rank == 0 else None

    def _publish(self, pending: _Pending) -> None:
        parts = gather_json(pending.work.result())
        pending.written_everywhere = True
        if self.topology.rank == 0:
            pending.work = self._thread.submit(pending.publish, parts)

    def finish(self) -> None:
        """Waits until the last checkpoint stands under its name; a collective call.

        Raises:
            RunError: on every rank, where one could not write, with its reason.
        """
        pending = self._pending
        if pending is not None and not pending.written_everywhere:
            self._wait_everywhere(pending.work)
            self._publish(pending)
        self._wait_everywhere(pending.work if pending is not None else None)
        # Only now: where waiting failed, `close` waits for what is being published.
        self._pending = None

    def close(self) -> None:
        """Ends the work before the run's lock is released; not a collective call.

        A checkpoint that every rank has written is published if that takes up to `SECONDS_TO_CLOSE`. Any other is
        never published. After `finish` there is nothing to wait for.
        """
        pending, self._pending = self._pending, None
        if pending is not None and pending.written_everywhere:
            wait([pending.work], timeout=SECONDS_TO_CLOSE)
        self._closed.set()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _wait_everywhere(self, work: Future[Any] | None) -> None:
        """Waits for every rank's work, in turns short enough for a collective's patience and the watchdog's."""
        waiting = True
        while waiting:
            if work is not None:
                wait([work], timeout=_SECONDS_A_TURN)
            self._progress()
            done = work is None or work.done()
            error = work.exception() if work is not None and done else None
            failure = None if error is None else f"rank {self.topology.rank}: {error}"
            if (lost_to := self._lost_to()) is not None:
                failure = lost_message(self.save, lost_to)
            everyone = gather_json((done, failure))
            found = [said for _, said in everyone if said]
            if found:
                newest = checkpoints(self.save)
                last = f"the newest checkpoint is {newest[-1][1]}" if newest else "there is no checkpoint yet"
                raise RunError(f"a checkpoint could not be written: {'; '.join(found)}; {last}")
            waiting = not all(is_done for is_done, _ in everyone)


def _write(temporary: Path, files: Sequence[tuple[str, TensorFile | None]]) -> dict[str, Any]:
    """Writes a rank's files into folders of a checkpoint.

    Returns:
        what rank 0 has to know of them: {"files": {path within the checkpoint: bytes}, "checksums": {path: SHA-256},
        "optimizer": part of the index}.
    """
    part: dict[str, Any] = {"files": {}, "checksums": {}, "optimizer": None}
    for folder, file in files:
        (temporary / folder).mkdir(parents=True, exist_ok=True)
        if file is not None:
            file.write(temporary / folder)
            path = temporary / folder / file.name
            part["files"][f"{folder}/{file.name}"] = path.stat().st_size
            part["checksums"][f"{folder}/{file.name}"] = sha256_of(path)
            if folder == OPTIMIZER:
                part["optimizer"] = index_part(file)
    return part
