"""When a run should save and leave before its end: a signal, a time limit, the end of its SLURM allocation."""

from __future__ import annotations

import time
from collections.abc import Mapping

from megatron_doremi.cluster.signals import EXIT_STOPPED, Signals
from megatron_doremi.config import RunConfig
from megatron_doremi.errors import ConfigError, Fault

__all__ = ["EXIT_STOPPED", "KEEP_RUNNING", "REASONS", "StopRequest"]
# Reasons, in the order of which one is said where ranks know of several.
KEEP_RUNNING, DURATION, ALLOCATION, SIGNAL = range(4)
REASONS = {
    DURATION: "--exit-duration-in-mins is over",
    ALLOCATION: "the SLURM allocation ends soon",
    SIGNAL: "a signal asked for it",
}


class StopRequest:
    """What this rank knows of reasons to stop; ranks agree on them with each step (step_flags.py)."""

    def __init__(self, run: RunConfig, environ: Mapping[str, str], signals: Signals):
        """Starts the clock of --exit-duration-in-mins, and reads the allocation's end from SLURM_JOB_END_TIME.

        Raises:
            ConfigError: the environment's time is not a number.
        """
        self.signals = signals
        self._leave_at = time.monotonic() + 60.0 * run.exit_duration_in_mins if run.exit_duration_in_mins else None
        self._allocation_at: float | None = None
        end = environ.get("SLURM_JOB_END_TIME")
        if end and run.exit_margin_in_mins:
            try:
                left = float(end) - time.time()
            except ValueError as error:
                rule, remedy = "seconds since 1970, as SLURM sets it", "unset it, or give --exit-margin-in-mins 0"
                raise ConfigError(Fault("SLURM_JOB_END_TIME", end, rule, remedy)) from error
            # Of a short allocation the margin must not be all.
            self._allocation_at = time.monotonic() + left - min(60.0 * run.exit_margin_in_mins, left / 10)

    def reason(self) -> int:
        """One of the reasons above; KEEP_RUNNING where there is none."""
        now = time.monotonic()
        if self.signals.asked:
            return SIGNAL
        if self._allocation_at is not None and now >= self._allocation_at:
            return ALLOCATION
        return DURATION if self._leave_at is not None and now >= self._leave_at else KEEP_RUNNING
