"""A trace of one step, by torch.profiler: what ran when, on the host and on the GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_doremi.cluster.watchdog import Watchdog
from megatron_doremi.console import say, warn
from megatron_doremi.engine.step_clock import StepClock
from megatron_doremi.phases.metrics import StepTimer
from megatron_doremi.run_settings import RunConfig


class StepProfile:
    """Records the step that --profile names, on one rank; every other step is left alone.

    Attributes:
        path: of the trace.
    """

    def __init__(self, run: RunConfig, rank: int, device: torch.device):
        """
        Args:
            rank: this one.
            device: that it computes on.
        """
        self.path = Path(run.save) / "profile" / f"step-{run.profile}-rank-{rank}.json.gz"
        self._step = run.profile if rank == run.profile_rank else 0
        self._activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            self._activities.append(ProfilerActivity.CUDA)

    def note_past(self, iteration: int) -> None:
        """Says that the step to record is one that an earlier start took without recording it.

        Args:
            iteration: steps that were taken before this start.
        """
        if 0 < self._step <= iteration and not self.path.exists():
            warn(f"--profile {self._step}: an earlier start took that step, and this one starts after {iteration:,}")

    @contextmanager
    def of_step(self, iteration: int, timer: StepTimer, clock: StepClock, watchdog: Watchdog) -> Iterator[None]:
        """Records a `with` block if it takes the step to record, writes the trace and says where it is.

        Args:
            iteration: number of the step, from 1.
            timer, clock: leave out the time of starting, ending and writing; the step itself is slower than others.
        """
        if not self._step or iteration != self._step:
            yield
            return
        # The step begins its parts itself.
        clock.stop()
        with timer.paused():
            profiler = profile(activities=self._activities)
            profiler.start()
        try:
            yield
        finally:
            with timer.paused():
                watchdog.mark(f"writing a trace of iteration {iteration}")
                profiler.stop()
        with timer.paused():
            try:
                self._write(profiler)
            except (OSError, RuntimeError) as error:
                warn(f"{self.path} cannot be written: {error}; training continues")

    def _write(self, profiler: profile) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # The profiler compresses if the name ends in .gz.
        temporary = self.path.with_name(f".{os.getpid()}-{self.path.name}")
        try:
            profiler.export_chrome_trace(str(temporary))
            os.replace(temporary, self.path)
        finally:
            with suppress(OSError):
                temporary.unlink()
        say(f"a trace of step {self._step:,} is in {self.path}; open it at https://ui.perfetto.dev")
