"""Python's garbage collection at chosen steps: at a moment of its own, one rank of many would let all others wait."""

from __future__ import annotations

import gc
from types import TracebackType


class GarbageCollection:
    """Within a `with` block, cyclic garbage is collected only by `collect_at`; reference counting works as ever.

    What exists at the start (modules, the model, the data set) lives as long as the run: it is frozen, so that no
    collection looks at it.
    """

    def __init__(self, interval: int):
        """
        Args:
            interval: steps from one collection to the next, on every rank at the same step.
        """
        self._interval = interval
        self._was_enabled = False

    def __enter__(self) -> GarbageCollection:
        self._was_enabled = gc.isenabled()
        gc.disable()
        gc.collect()
        gc.freeze()
        return self

    def collect_at(self, iteration: int) -> None:
        """Collects after a step that is a multiple of the interval."""
        if iteration % self._interval == 0:
            gc.collect()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        gc.unfreeze()
        if self._was_enabled:
            gc.enable()
