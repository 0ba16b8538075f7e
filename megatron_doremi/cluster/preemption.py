"""Reasons to save and exit before the last step: a signal, a time limit, the end of the SLURM allocation."""

from __future__ import annotations

import time
from collections.abc import Mapping

from megatron_doremi.cluster.signals import EXIT_STOPPED, Signals
from megatron_doremi.config import RunConfig
from megatron_doremi.errors import ConfigError, Fault

__all__ = ["EXIT_STOPPED", "KEEP_RUNNING", "REASONS", "StopRequest"]
# In rising priority: the step's flags take the maximum over all ranks.
KEEP_RUNNING, DURATION, ALLOCATION, SIGNAL = range(4)
REASONS = {
    DURATION: "--exit-duration-in-mins has elapsed",
    ALLOCATION: "the SLURM allocation ends soon",
    SIGNAL: "a signal requested it",
}


class StopRequest:
    """This rank's reasons to stop; the step's flags (step_flags.py) combine those of all ranks."""

    def __init__(self, run: RunConfig, environ: Mapping[str, str], signals: Signals):
        """Starts the clock of --exit-duration-in-mins and reads the end of the allocation from SLURM_JOB_END_TIME.

        Raises:
            ConfigError: SLURM_JOB_END_TIME is not a number.
        """
        self.signals = signals
        self._duration_ends = time.monotonic() + 60.0 * run.exit_duration_in_mins if run.exit_duration_in_mins else None
        self._allocation_ends: float | None = None
        end_time = environ.get("SLURM_JOB_END_TIME")
        if end_time and run.exit_margin_in_mins:
            try:
                remaining = float(end_time) - time.time()
            except ValueError as error:
                rule, remedy = "seconds since 1970, as SLURM sets it", "unset it, or give --exit-margin-in-mins 0"
                raise ConfigError(Fault("SLURM_JOB_END_TIME", end_time, rule, remedy)) from error
            # At most 10 %, so that the margin does not use up a short allocation.
            margin = min(60.0 * run.exit_margin_in_mins, remaining / 10)
            self._allocation_ends = time.monotonic() + remaining - margin

    def reason(self) -> int:
        """One of the reasons above; KEEP_RUNNING if there is none."""
        now = time.monotonic()
        if self.signals.requested_by:
            return SIGNAL
        if self._allocation_ends is not None and now >= self._allocation_ends:
            return ALLOCATION
        return DURATION if self._duration_ends is not None and now >= self._duration_ends else KEEP_RUNNING
