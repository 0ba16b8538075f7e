"""The stop request, the watchdog and the store of a run, passed to each phase as one value."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from megatron_doremi.cluster.preemption import StopRequest
from megatron_doremi.cluster.watchdog import Watchdog


@dataclass(frozen=True)
class RunControl:
    """A phase's means to notice stop requests, to report progress and to exchange values outside of collectives.

    Attributes:
        stop: this rank's reasons to save and exit.
        watchdog: receives this rank's progress.
        store: the run's key-value store, at which all ranks have met.
    """

    stop: StopRequest
    watchdog: Watchdog
    store: dist.Store
