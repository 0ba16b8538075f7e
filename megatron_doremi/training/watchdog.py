"""Ends a run whose ranks wait for one that hangs, and names that rank.

A collective does not say whom it waits for. So a thread of each rank writes a sign of life and the main thread's
progress into the store at which the ranks met. When nobody has made progress for a while, the ranks without a sign
of life, or else those furthest behind, are the ones that the others wait for.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import TracebackType
from typing import TypeVar

import torch.distributed as dist

from megatron_doremi.errors import RunError

EXIT_HUNG = 1
_SECONDS_FOR_THE_FIRST = 3.0
# What a store raises whose keeper is gone or hangs.
_NO_ANSWER = (RuntimeError, ValueError, TimeoutError)
T = TypeVar("T")


@dataclass(frozen=True)
class Sign:
    """A rank's sign of life.

    Attributes:
        beat: how many signs it has given.
        progress: how many steps its main thread has taken, of whatever kind.
        doing: what that thread is doing.
        host: where.
    """

    beat: int
    progress: int
    doing: str
    host: str


def whom_they_wait_for(before: Mapping[int, Sign], now: Mapping[int, Sign], world_size: int) -> str:
    """Words for the ranks that hold up the others.

    Args:
        before: signs by rank, some beats ago.
        now: signs by rank; ranks that never gave one are in neither.
    """
    silent = [rank for rank in range(world_size) if rank not in now or now[rank] == before.get(rank)]
    if silent:
        return _say(silent, now, "no sign of life")
    least = min(sign.progress for sign in now.values())
    behind = [rank for rank, sign in now.items() if sign.progress == least]
    if len(behind) < world_size:
        return _say(behind, now, "alive, but behind the others")
    return f"every rank is alive and at the same point: {now[0].doing}"


def _say(ranks: Sequence[int], signs: Mapping[int, Sign], what: str) -> str:
    places = [f"rank {r} on {signs[r].host}, {signs[r].doing}" if r in signs else f"rank {r}" for r in ranks]
    return f"{what}: {'; '.join(places)}"


def _no_answer(error: Exception) -> str:
    reason = str(error).strip().splitlines()
    return f"rank 0, at which all ranks meet, does not answer ({reason[0] if reason else type(error).__name__})"


class Watchdog:
    """The thread, and what the main thread tells it."""

    def __init__(self, store: dist.Store, rank: int, world_size: int, seconds: float):
        """Begins to watch.

        Args:
            store: the thread's own connection; where it does not answer, its keeper, rank 0, is gone.
            seconds: without progress on any rank after which the run ends.
        """
        self._store, self.rank, self.world_size, self.seconds = store, rank, world_size, seconds
        self._interval = min(5.0, seconds / 8)
        store.set_timeout(timedelta(seconds=4 * self._interval))
        self._progress, self._doing, self._beat = 0, "starting", 0
        self._host = socket.gethostname()
        self._stopped = threading.Event()
        # A store whose keeper hangs answers nothing, not even an error: a thread asks it that may be left behind.
        self._asking = ThreadPoolExecutor(1, thread_name_prefix="signs")
        self._ask(self._give_sign)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def mark(self, doing: str) -> None:
        """The main thread got on, and now does this."""
        self._doing = doing
        self._progress += 1

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the watch. Raises RunError in place of a collective's failure that a dead rank has caused."""
        # What torch.distributed raises when a peer goes is no more than a RuntimeError.
        failed = isinstance(error, RuntimeError) and self.world_size > 1
        whom = self._silent_ranks() if failed else None
        self._stopped.set()
        self._thread.join()
        if whom:
            reason = str(error).strip().splitlines()[0]
            raise RunError(f"rank {self.rank}, {self._doing}: {whom} ({reason})") from error

    def _silent_ranks(self) -> str | None:
        """Words for the ranks that have died; takes some beats."""
        try:
            before = self._ask(self._read)
            time.sleep(3 * self._interval)
            now = self._ask(self._read)
        except _NO_ANSWER as error:
            return _no_answer(error)
        silent = [r for r in range(self.world_size) if r != self.rank and (r not in now or now[r] == before.get(r))]
        return _say(silent, now, "no sign of life") if silent else None

    def _watch(self) -> None:
        own, quiet_since = -1, time.monotonic()
        seen: dict[int, Sign] = {}
        while not self._stopped.wait(self._interval):
            if self._progress != own:
                own, quiet_since, seen = self._progress, time.monotonic(), {}
            quiet = time.monotonic() - quiet_since
            try:
                self._ask(self._give_sign)
                # Only now ask for the others: all ranks asking for all, always, would be much.
                signs = self._ask(self._read) if quiet > self.seconds / 2 else {}
            except _NO_ANSWER as error:
                if quiet > self.seconds and not self._stopped.is_set():
                    self._end(_no_answer(error))
                continue
            if any(sign.progress != seen[rank].progress for rank, sign in signs.items() if rank in seen):
                quiet_since, seen = time.monotonic(), {}
            elif quiet > self.seconds and seen:
                self._end(whom_they_wait_for(seen, signs, self.world_size))
            else:
                seen = seen or signs

    def _ask(self, question: Callable[[], T]) -> T:
        return self._asking.submit(question).result(6 * self._interval)

    def _give_sign(self) -> None:
        self._beat += 1
        sign = Sign(self._beat, self._progress, self._doing, self._host)
        self._store.set(f"sign/{self.rank}", json.dumps(asdict(sign)))

    def _read(self) -> dict[int, Sign]:
        keys = {rank: f"sign/{rank}" for rank in range(self.world_size)}
        return {
            rank: Sign(**json.loads(self._store.get(key))) for rank, key in keys.items() if self._store.check([key])
        }

    def _end(self, whom: str) -> None:
        # One rank's word is enough; another speaks where the first cannot.
        time.sleep(_SECONDS_FOR_THE_FIRST if self.rank else 0.0)
        limit = f"{self.seconds / 60:g} minutes (--distributed-timeout-minutes)"
        text = f"error: rank {self.rank}, {self._doing}: no progress for {limit}: {whom}"
        print(text, file=sys.stderr, flush=True)
        # The main thread waits in a collective that nothing interrupts.
        os._exit(EXIT_HUNG)
