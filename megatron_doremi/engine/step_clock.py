"""What the time of a step is spent on: data, forward, backward, reduction, optimizer.

A step is a sequence of parts; entering one ends the part before it. On a CPU the host's clock is read there. On a GPU
an event is recorded in the stream, and the times between events are read when they are asked for, so that nothing waits
for the device in between: they are the device's own times, and that of `data` is what reading delays the device by.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Protocol

import torch

# Reading the next batch, and copying it to the device.
DATA = "data"
# The forward passes of an online reference.
REFERENCE = "reference"
FORWARD = "forward"
# With the forward passes that are computed again, and with reductions that it overlaps.
BACKWARD = "backward"
# Sending to the stages beside this one, and waiting for what they send.
PIPELINE = "pipeline"
# Exchange with the replicas, and waiting for them: gradients, sums by domain, the norm, the step's flags.
REDUCTION = "reduction"
OPTIMIZER = "optimizer"
PARTS = (DATA, REFERENCE, FORWARD, BACKWARD, PIPELINE, REDUCTION, OPTIMIZER)


class StepClock:
    """Adds up the time of each part by the host's clock."""

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        """
        Args:
            now: gives the time in seconds.
        """
        self._now = now
        self._seconds: dict[str, float] = {}
        self._part, self._began = "", 0.0

    def enter(self, part: str) -> None:
        """Begins one of PARTS, and ends the part before it."""
        now = self._now()
        self._add(self._part, now - self._began)
        self._part, self._began = part, now

    def stop(self) -> None:
        """Ends the part before; what follows belongs to none."""
        self.enter("")

    def lap(self) -> dict[str, float]:
        """Seconds of each part since the last lap, in the order of PARTS, without parts that were not entered.

        May wait for the device.
        """
        seconds, self._seconds = self._seconds, {}
        return {part: seconds[part] for part in PARTS if part in seconds}

    def _add(self, part: str, seconds: float) -> None:
        if part:
            self._seconds[part] = self._seconds.get(part, 0.0) + seconds


class Event(Protocol):
    """What is used of `torch.cuda.Event`."""

    def record(self) -> None: ...
    def query(self) -> bool: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, end_event: Any) -> float: ...


def _timing_event() -> Event:
    return torch.cuda.Event(enable_timing=True)


class DeviceClock(StepClock):
    """Adds up the time of each part on the device, by events in the current stream."""

    def __init__(self, make_event: Callable[[], Event] = _timing_event, most_pending: int = 4096):
        """
        Args:
            make_event: gives an event that measures time.
            most_pending: more events than that are read before a lap, as far as the device has reached them.
        """
        super().__init__()
        self._make_event, self._most_pending = make_event, most_pending
        # (part that begins there, event), in order; and events to use again.
        self._pending: list[tuple[str, Event]] = []
        self._free: list[Event] = []

    def enter(self, part: str) -> None:
        if len(self._pending) > self._most_pending:
            self._read()
        event = self._free.pop() if self._free else self._make_event()
        event.record()
        self._pending.append((part, event))

    def lap(self) -> dict[str, float]:
        if self._pending:
            self._pending[-1][1].synchronize()
            self._read()
        return super().lap()

    def _read(self) -> None:
        """Adds up what lies between events that the device has reached; the last of these begins what is left."""
        done = 0
        for (part, start), (_, end) in pairwise(self._pending):
            if not end.query():
                break
            self._add(part, start.elapsed_time(end) / 1e3)
            done += 1
        self._free += [event for _, event in self._pending[:done]]
        del self._pending[:done]


def make_clock(device: torch.device) -> StepClock:
    """The clock of steps on a device."""
    return DeviceClock() if device.type == "cuda" else StepClock()
