"""What ends a run early, and what notices that it hangs: handed to each phase as one value."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from megatron_doremi.cluster.preemption import StopRequest
from megatron_doremi.cluster.watchdog import Watchdog


@dataclass(frozen=True)
class RunControl:
    """A run's connections to the outside.

    Attributes:
        stop: reasons to save and exit.
        watchdog: hears of this rank's progress.
        store: the key-value store at which all ranks have met.
    """

    stop: StopRequest
    watchdog: Watchdog
    store: dist.Store
