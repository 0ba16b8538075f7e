"""Ends a run whose ranks wait for one that hangs or has died, and names that rank.

A collective does not say whom it waits for. So a thread of each rank writes a sign of life and the main thread's
progress into the store at which the ranks met, watches the processes on its own machine and the next few ranks, and
reads what others have found out. When nobody has made progress for a while, the ranks without a sign of life, or else
those furthest behind, are the ones that the others wait for.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_doremi.cluster.heartbeat import (
    HEARTBEAT_TIMEOUT_SECONDS,
    LEFT,
    WATCHED,
    Heartbeat,
    current_heartbeat,
    describe_ranks,
    describe_stragglers,
    is_dead,
)
from megatron_doremi.cluster.rendezvous import Rendezvous
from megatron_doremi.cluster.signals import EXIT_STOPPED
from megatron_doremi.cluster.store import in_time, read_heartbeats
from megatron_doremi.console import CONSOLE_ERRORS
from megatron_doremi.errors import EXIT_USER_ERROR, ConfigError, ReportedElsewhere, RunError

EXIT_HUNG = 1
# A store whose connections break has lost its process; one that does not answer may only be slow.
_SECONDS_WITHOUT_STORE = 20.0
_SECONDS_BETWEEN_SIGNS = 5.0
# For a rank whose peer has said that it leaves: its own main thread may be about to say the same.
_SECONDS_TO_FOLLOW = 10.0
_SECONDS_FOR_THE_FIRST = 3.0
# What a store raises whose keeper is gone or hangs.
_NO_ANSWER = (RuntimeError, ValueError, TimeoutError)
T = TypeVar("T")


class Watchdog:
    """The thread, and what the main thread tells it."""

    def __init__(self, meeting: Rendezvous, seconds: float):
        """Begins to watch.

        Args:
            seconds: without progress on any rank after which the run ends.
        """
        self.launch, self.seconds = meeting.launch, seconds
        self.rank, self.world_size = self.launch.rank, self.launch.world_size
        self._interval = min(_SECONDS_BETWEEN_SIGNS, seconds / 8)
        self._silence = min(HEARTBEAT_TIMEOUT_SECONDS, seconds)
        # A connection of its own, for that of the process group waits where a collective does.
        self._store = meeting.connect_again()
        self._store.set_timeout(timedelta(seconds=4 * self._interval))
        self._progress, self._doing, self._beat = 0, "starting", 0
        self._stopped = threading.Event()
        self._neighbors = {rank: sign for rank, sign in meeting.signs.items() if rank != self.rank}
        self._next = [(self.rank + k) % self.world_size for k in range(1, min(WATCHED, self.world_size - 1) + 1)]
        # A store whose keeper hangs answers nothing, not even an error: a thread asks it that may be left behind.
        self._asking = ThreadPoolExecutor(1, thread_name_prefix="signs")
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
        whom = self._whom_to_blame() if failed else None
        self._stopped.set()
        self._thread.join(6 * self._interval)
        was, self._doing = self._doing, LEFT
        with contextlib.suppress(*_NO_ANSWER):
            in_time(self._give_sign, 2.0)
            if error is not None:
                # For ranks that would wait for this one.
                entry = {"rank": self.rank, "code": EXIT_USER_ERROR if isinstance(error, ConfigError) else EXIT_HUNG}
                in_time(lambda: self._store.compare_set("ended", "", json.dumps(entry)), 2.0)
        if whom:
            assert error is not None
            reason = str(error).strip().splitlines()[0]
            raise RunError(f"rank {self.rank}, {was}: {whom} ({reason})") from error

    def tell(self, code: int) -> None:
        """Tells the others that this process leaves with an exit code of its own, so that they do too.

        A process that hosts the store stays for a moment, until they have read it.
        """
        entry = {"rank": self.rank, "code": code, "text": ""}
        in_time(lambda: self._store.set("ended", json.dumps(entry)), 2.0)
        if not self.rank and not self.launch.hosted:
            end = time.monotonic() + 2 * self._interval
            while time.monotonic() < end and self._store.add("followed", 0) < self.world_size - 1:
                time.sleep(0.05)
        elif self.rank:
            in_time(lambda: self._store.add("followed", 1), 2.0)

    def _whom_to_blame(self) -> str | None:
        """Words for the ranks that have died; takes some beats. Raises ReportedElsewhere where another rank spoke."""
        try:
            dead = self._dead_neighbors()
            if dead:
                return describe_ranks(dead, self._neighbors, "no sign of life")
            before = self._ask(self._read_all)
            for _ in range(3):
                time.sleep(self._interval)
                ended = self._ask(self._ended)
                if ended is not None:
                    raise ReportedElsewhere(ended["code"])
            now = self._ask(self._read_all)
        except _NO_ANSWER as error:
            return self._no_answer(error)
        silent = [r for r in range(self.world_size) if r != self.rank and (r not in now or now[r] == before.get(r))]
        return describe_ranks(silent, now, "no sign of life") if silent else None

    def _watch(self) -> None:
        own, quiet_since, looked = -1, time.monotonic(), time.monotonic()
        seen: dict[int, Heartbeat] = {}
        heard: dict[int, tuple[int, float]] = {}
        answered = time.monotonic()
        while True:
            asleep = time.monotonic()
            if self._stopped.wait(self._interval):
                return
            now = time.monotonic()
            if now - asleep > 3 * self._interval:
                # This process itself was stopped for a while, and so may have been the others.
                heard, answered = {}, now
            if self._progress != own:
                own, quiet_since, looked, seen = self._progress, now, now, {}
            quiet = now - quiet_since
            try:
                self._ask(self._give_sign)
                self._follow(self._ask(self._ended))
                self._end_with_the_dead(heard)
                signs = {}
                # All ranks asking for all, always, would be much.
                if quiet > self.seconds / 2 and now - looked > self.seconds / 10:
                    signs, looked = self._ask(self._read_all), now
            except _NO_ANSWER as error:
                gone = isinstance(error, dist.DistNetworkError)
                if now - answered > (min(_SECONDS_WITHOUT_STORE, self._silence) if gone else self._silence):
                    self._end(self._no_answer(error))
                continue
            answered = time.monotonic()
            if any(sign.progress != seen[rank].progress for rank, sign in signs.items() if rank in seen):
                quiet_since, seen = time.monotonic(), {}
            elif quiet > self.seconds and seen and signs:
                limit = f"no progress for {self.seconds / 60:g} minutes (--distributed-timeout-minutes)"
                self._end(f"{limit}: {describe_stragglers(seen, signs, self.world_size)}")
            else:
                seen = seen or signs

    def _end_with_the_dead(self, heard: dict[int, tuple[int, float]]) -> None:
        """Ends this process where a rank on this machine has ended, or one of the next ranks fell silent.

        Args:
            heard: (beat, when it was first seen) of the next ranks.
        """
        now = time.monotonic()
        dead = self._dead_neighbors()
        if not dead and self._next:
            signs = self._ask(lambda: read_heartbeats(self._store, self._next))
            for rank, sign in signs.items():
                if rank not in heard or heard[rank][0] != sign.beat or sign.doing == LEFT:
                    heard[rank] = (sign.beat, now)
                elif now - heard[rank][1] > self._silence:
                    dead.append(rank)
                    self._neighbors[rank] = sign
        if dead:
            self._end(describe_ranks(dead, self._neighbors, "no sign of life"))

    def _dead_neighbors(self) -> list[int]:
        suspects = [rank for rank, sign in self._neighbors.items() if is_dead(sign)]
        if suspects:
            # As it was last seen; one that left on purpose has said so.
            self._neighbors |= self._ask(lambda: read_heartbeats(self._store, suspects))
        return [rank for rank in suspects if is_dead(self._neighbors[rank])]

    def _ask(self, question: Callable[[], T]) -> T:
        return self._asking.submit(question).result(6 * self._interval)

    def _give_sign(self) -> None:
        self._beat += 1
        self._store.set(f"sign/{self.rank}", current_heartbeat(self._beat, self._progress, self._doing).to_json())

    def _read_all(self) -> dict[int, Heartbeat]:
        return read_heartbeats(self._store, range(self.world_size))

    def _ended(self) -> dict[str, Any] | None:
        return json.loads(self._store.get("ended")) if self._store.check(["ended"]) else None

    def _no_answer(self, error: Exception) -> str:
        reason = str(error).strip().splitlines()
        keeper = "the launcher's rendezvous" if self.launch.hosted else "rank 0, at which all ranks meet,"
        return f"{keeper} does not answer ({reason[0] if reason else type(error).__name__})"

    def _follow(self, ended: dict[str, Any] | None) -> None:
        """Ends this process where another has said that the run ends."""
        if ended is None:
            return
        if ended["code"] != EXIT_STOPPED and self._stopped.wait(_SECONDS_TO_FOLLOW):
            return
        with contextlib.suppress(*_NO_ANSWER):
            in_time(lambda: self._store.add("followed", 1), 2.0)
        os._exit(ended["code"])

    def _end(self, whom: str) -> None:
        text = f"error: rank {self.rank}, {self._doing}: {whom}"
        entry = json.dumps({"rank": self.rank, "code": EXIT_HUNG, "text": text})
        try:
            first = in_time(lambda: self._store.compare_set("ended", "", entry), 2 * self._interval)
            speaks = json.loads(first)["rank"] == self.rank
        except _NO_ANSWER:
            # Nobody can be told: one rank's word is enough; another speaks where the first cannot.
            speaks = True
            time.sleep(_SECONDS_FOR_THE_FIRST if self.rank > 1 and self.launch.local_rank else 0.0)
        if self._stopped.is_set():
            return
        if speaks:
            with contextlib.suppress(*CONSOLE_ERRORS):
                print(text, file=sys.stderr, flush=True)
        # The main thread waits in a collective that nothing interrupts.
        os._exit(EXIT_HUNG)
