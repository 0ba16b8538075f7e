"""Writing checkpoints in the background while training continues.

Training pauses only for the copy to host memory. A thread of each rank then writes its files and makes them durable;
the step's flags (step_flags.py) tell when every rank has finished. Then the ranks send the names and sizes of their
files to rank 0, which publishes the checkpoint by a single rename (publishing.py).
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
from megatron_doremi.storage.tensor_file import TensorFile

OPTIMIZER = "optimizer"
# Between two collectives while the ranks wait for each other's files.
_POLL_SECONDS = 20.0
# How long a failing run waits until a checkpoint that every rank has written is published.
SECONDS_TO_CLOSE = 20.0


class SaveTimer:
    """Decides on one rank when --save-interval-in-mins has elapsed; the step's flags tell the other ranks."""

    def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic):
        """
        Args:
            minutes: between two checkpoints; 0: never due.
            clock: monotonic, in seconds.
        """
        self._seconds, self._clock, self._last = 60.0 * minutes, clock, clock()

    def due(self) -> bool:
        """Whether the interval has elapsed since the last checkpoint."""
        return self._seconds > 0 and self._clock() - self._last >= self._seconds

    def restart(self) -> None:
        """Restarts the interval; called when a checkpoint is taken."""
        self._last = self._clock()


@dataclass
class _Pending:
    """A checkpoint in progress.

    Attributes:
        work: this rank's task in the checkpoint thread: write its files, then, on rank 0, publish.
        publish: called on rank 0 with the reports of all ranks once every rank has written.
        written_everywhere: whether every rank has written.
    """

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
            keep: number of the newest complete checkpoints to keep; 0: all.
            progress: called every few seconds while this rank waits for others.
            run_token: the same on all ranks, new at each start, so that two starts never write into the same folder.
            lost_to: returns the process that has taken over the run's lock, or None; from then on nothing is published.
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
        """Copies the state of model and optimizer to host memory and starts writing it; a collective call.

        Args:
            state: the rest of the run's state; rank 0 writes it as JSON.
            before_publishing: called on rank 0, in the thread, before the checkpoint is published; if it raises, the
                checkpoint is not published and the run ends.
        """
        self.finish()
        topology = self.topology
        temporary = checkpoints_folder(self.save) / f"{WRITING}{checkpoint_name(iteration)}{self._run_token}"
        files = [("weights", weights_file(engine.module, topology)), (OPTIMIZER, optimizer_file(engine, topology))]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        layout = {**asdict(topology), "zero_stage": int(engine.zero_optimization_stage())}
        del layout["rank"]
        content = {"format": FORMAT, "iteration": iteration, "layout": layout, **state}

        def last_check() -> None:
            before_publishing()
            if self._closed.is_set():
                raise RunError(f"the run ended before {checkpoint_name(iteration)} was published")

        def publish(reports: list[Any]) -> None:
            publish_checkpoint(temporary, checkpoint_name(iteration), content, reports, last_check)
            if not self._closed.is_set():
                self._retention.apply(iteration)

        self._pending = _Pending(self._thread.submit(_write, temporary, files), publish)

    def progress(self) -> tuple[bool, bool]:
        """(this rank is still writing, its writing failed), for the step's flags."""
        work = self._pending.work if self._pending else None
        writing = work is not None and not work.done()
        failed = work is not None and not writing and work.exception() is not None
        return writing, failed or self._lost_to() is not None

    def all_written(self) -> None:
        """Publishes the checkpoint in rank 0's thread; called once every rank has written. A collective call."""
        pending = self._pending
        if pending is not None and not pending.written_everywhere:
            self._publish(pending)
            self._pending = pending if self.topology.rank == 0 else None

    def _publish(self, pending: _Pending) -> None:
        reports = gather_json(pending.work.result())
        pending.written_everywhere = True
        if self.topology.rank == 0:
            pending.work = self._thread.submit(pending.publish, reports)

    def finish(self) -> None:
        """Waits until the last checkpoint is published; a collective call.

        Raises:
            RunError: on every rank, with the reason, if any rank failed to write.
        """
        pending = self._pending
        if pending is not None and not pending.written_everywhere:
            self._wait_everywhere(pending.work)
            self._publish(pending)
        self._wait_everywhere(pending.work if pending is not None else None)
        # Only now: if waiting fails, `close` still has to wait for a checkpoint that is being published.
        self._pending = None

    def close(self) -> None:
        """Stops writing before the run's lock is released; not a collective call.

        A checkpoint that every rank has written is still published if that takes at most `SECONDS_TO_CLOSE`; any other
        is discarded. After `finish` there is nothing to wait for.
        """
        pending, self._pending = self._pending, None
        if pending is not None and pending.written_everywhere:
            wait([pending.work], timeout=SECONDS_TO_CLOSE)
        self._closed.set()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _wait_everywhere(self, work: Future[Any] | None) -> None:
        """Waits for every rank's work, with collectives at intervals shorter than their timeout and the watchdog's."""
        waiting = True
        while waiting:
            if work is not None:
                wait([work], timeout=_POLL_SECONDS)
            self._progress()
            done = work is None or work.done()
            error = work.exception() if work is not None and done else None
            failure = None if error is None else f"rank {self.topology.rank}: {error}"
            if (lost_to := self._lost_to()) is not None:
                failure = lost_message(self.save, lost_to)
            statuses = gather_json((done, failure))
            failures = [text for _, text in statuses if text]
            if failures:
                published = checkpoints(self.save)
                newest = f"the newest checkpoint is {published[-1][1]}" if published else "there is no checkpoint yet"
                raise RunError(f"a checkpoint could not be written: {'; '.join(failures)}; {newest}")
            waiting = not all(is_done for is_done, _ in statuses)


def _write(temporary: Path, files: Sequence[tuple[str, TensorFile | None]]) -> dict[str, Any]:
    """Writes a rank's files into the folders of a checkpoint.

    Returns:
        the rank's report for rank 0: {"files": {path within the checkpoint: bytes}, "checksums": {path: SHA-256},
        "optimizer": its part of the index}.
    """
    report: dict[str, Any] = {"files": {}, "checksums": {}, "optimizer": None}
    for folder, file in files:
        (temporary / folder).mkdir(parents=True, exist_ok=True)
        if file is not None:
            report["checksums"][f"{folder}/{file.name}"] = file.write(temporary / folder)
            report["files"][f"{folder}/{file.name}"] = (temporary / folder / file.name).stat().st_size
            if folder == OPTIMIZER:
                report["optimizer"] = index_part(file)
    return report
