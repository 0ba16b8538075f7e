"""Ends a run in which a rank hangs or has died, and names that rank.

A collective does not tell which rank it waits for. Therefore a thread of each rank writes heartbeats with the main
thread's progress to the run's store, watches the processes on its own machine and the next few ranks, and checks
whether another rank has announced its exit. A rank whose heartbeats stop for a minute ends the run, unless a rank on
its machine vouches that its process lives: while a library holds Python's lock, no thread can send one.

If no rank makes progress for a while, the ranks without a heartbeat block the run, or, if all send heartbeats, the
ranks furthest behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_doremi.cluster.heartbeat import (
    EXITED,
    HEARTBEAT_TIMEOUT_SECONDS,
    WATCHED_RANKS,
    Heartbeat,
    current_heartbeat,
    describe_ranks,
    describe_stragglers,
    is_busy,
    is_dead,
    is_local,
)
from megatron_doremi.cluster.rendezvous import Rendezvous
from megatron_doremi.cluster.signals import EXIT_STOPPED
from megatron_doremi.cluster.store import call_with_timeout, read_heartbeats
from megatron_doremi.console import CONSOLE_ERRORS, below_bars, wrapped_lines
from megatron_doremi.errors import EXIT_USER_ERROR, ConfigError, ReportedElsewhere, RunError

EXIT_HUNG = 1
# If its connections break, the store's process is gone; if it does not answer, it may only be slow.
_SECONDS_WITHOUT_STORE = 20.0
_HEARTBEAT_SECONDS = 5.0
# For a rank whose peer has announced its exit: its own main thread may be about to report the same error.
_SECONDS_TO_FOLLOW = 10.0
# For another rank to report first, if the ranks cannot reach each other.
_SECONDS_FOR_ANOTHER_REPORT = 3.0
# What a store raises whose host is gone or hangs.
_STORE_ERRORS = (RuntimeError, ValueError, TimeoutError)
T = TypeVar("T")


def next_ranks(rank: int, ranks: Iterable[int]) -> list[int]:
    """The few of `ranks` that follow on `rank`, in a circle."""
    ring = sorted(set(ranks))
    place = ring.index(rank)
    return (ring[place + 1 :] + ring[:place])[:WATCHED_RANKS]


class _Peers:
    """How long other ranks have been silent, by this process's clock."""

    def __init__(self, limit: float, interval: float):
        """
        Args:
            limit: seconds of silence that are too long.
            interval: seconds between two looks.
        """
        self._limit, self._interval = limit, interval
        # By rank: (sequence number, when it was first seen) of the last heartbeat.
        self._beats: dict[int, tuple[int, float]] = {}
        self._vouched: dict[int, int] = {}
        self._now = 0.0

    def see(self, heartbeats: Mapping[int, Heartbeat], now: float) -> None:
        """Takes the last heartbeats of ranks; those that have exited on purpose are never silent."""
        self._now = now
        for rank, heartbeat in heartbeats.items():
            if rank not in self._beats or self._beats[rank][0] != heartbeat.beat or heartbeat.activity == EXITED:
                self._beats[rank] = (heartbeat.beat, now)

    def silence(self, rank: int) -> float:
        """Seconds since a new heartbeat of a rank was seen."""
        return self._now - self._beats[rank][1]

    def excuse(self, rank: int, vouched: int) -> bool:
        """Whether a rank that was silent for too long has been vouched for since it was last excused; it is then given
        time until the next few vouchers.

        Args:
            vouched: how often others have vouched for it.
        """
        if vouched <= self._vouched.get(rank, 0):
            return False
        self._vouched[rank] = vouched
        self._beats[rank] = (self._beats[rank][0], self._now - self._limit + 3 * self._interval)
        return True

    def forget(self) -> None:
        """Starts anew: this process was suspended, and others may have been."""
        self._beats = {}


class Watchdog:
    """The thread that watches the other ranks; the main thread reports its progress to it."""

    def __init__(self, rendezvous: Rendezvous, seconds: float):
        """Starts the thread.

        Args:
            seconds: the run ends if no rank makes progress for this time.
        """
        self.launch, self.seconds = rendezvous.launch, seconds
        self.rank, self.world_size = self.launch.rank, self.launch.world_size
        self._interval = min(_HEARTBEAT_SECONDS, seconds / 8)
        self._heartbeat_timeout = min(HEARTBEAT_TIMEOUT_SECONDS, seconds)
        # Its own connection: that of the process group blocks while a collective waits.
        self._store = rendezvous.new_connection()
        self._store.set_timeout(timedelta(seconds=4 * self._interval))
        self._progress, self._activity, self._beat = 0, "starting", 0
        self._stopped, self._exits, self._sending = threading.Event(), False, threading.Lock()
        self._last_seen = {rank: heartbeat for rank, heartbeat in rendezvous.heartbeats.items() if rank != self.rank}
        self._watched = next_ranks(self.rank, range(self.world_size))
        # Those whose processes this rank sees, and for which it vouches while they are busy.
        local = [rank for rank, heartbeat in self._last_seen.items() if is_local(heartbeat)]
        self._vouched_for = next_ranks(self.rank, [self.rank, *local])
        self._peers = _Peers(self._heartbeat_timeout, self._interval)
        # A store whose host hangs does not answer, not even with an error: its thread can be abandoned.
        self._store_thread = ThreadPoolExecutor(1, thread_name_prefix="heartbeat")
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def mark(self, activity: str) -> None:
        """Reports that the main thread has made progress and what it does next."""
        self._activity = activity
        self._progress += 1

    @property
    def activity(self) -> str:
        """What the main thread does, as it was last marked."""
        return self._activity

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops watching. Replaces an error of a collective that a dead rank has caused by a RunError."""
        # torch.distributed raises a plain RuntimeError when a peer is gone.
        failed = isinstance(error, RuntimeError) and self.world_size > 1
        dead_peers = reported = None
        try:
            dead_peers = self._describe_dead_peers() if failed else None
        except ReportedElsewhere as elsewhere:
            reported = elsewhere
        self._stopped.set()
        self._thread.join(6 * self._interval)
        with contextlib.suppress(*_STORE_ERRORS):
            call_with_timeout(self._send_last_heartbeat, 2.0)
            if error is not None:
                # For ranks that would wait for this one.
                code = EXIT_USER_ERROR if isinstance(error, ConfigError) else EXIT_HUNG
                announcement = json.dumps({"rank": self.rank, "code": code})
                call_with_timeout(lambda: self._store.compare_set("exit", "", announcement), 2.0)
        if reported is not None:
            raise reported from error
        if dead_peers:
            assert error is not None
            reason = str(error).strip().splitlines()[0]
            raise RunError(f"rank {self.rank}, {self._activity}: {dead_peers} ({reason})") from error

    def announce_exit(self, code: int) -> None:
        """Tells the other ranks that this process exits with this code, so that they do, too.

        The process that hosts the store waits a moment until they have read it.
        """
        announcement = {"rank": self.rank, "code": code, "text": ""}
        call_with_timeout(lambda: self._store.set("exit", json.dumps(announcement)), 2.0)
        if not self.rank and not self.launch.hosted:
            end = time.monotonic() + 2 * self._interval
            while time.monotonic() < end and self._store.add("exit_followed", 0) < self.world_size - 1:
                time.sleep(0.05)
        elif self.rank:
            call_with_timeout(lambda: self._store.add("exit_followed", 1), 2.0)

    def _describe_dead_peers(self) -> str | None:
        """Names the ranks that have died; takes a few heartbeats. Raises ReportedElsewhere if another rank reports."""
        try:
            dead = self._dead_local_ranks()
            if dead:
                return describe_ranks(dead, self._last_seen, "no heartbeat")
            before = self._query(self._read_all)
            for _ in range(3):
                time.sleep(self._interval)
                announcement = self._query(self._announced_exit)
                if announcement is not None:
                    if announcement["code"] != EXIT_STOPPED and not self.rank and not self.launch.hosted:
                        # That rank needs the store until it has reported.
                        time.sleep(_SECONDS_TO_FOLLOW)
                    raise ReportedElsewhere(announcement["code"])
            now = self._query(self._read_all)
        except _STORE_ERRORS as error:
            return self._describe_lost_store(error)
        peers = [rank for rank in range(self.world_size) if rank != self.rank]
        silent = [rank for rank in peers if rank not in now or now[rank] == before.get(rank)]
        return describe_ranks(silent, now, "no heartbeat") if silent else None

    def _watch(self) -> None:
        last_progress, stalled_since, polled = -1, time.monotonic(), time.monotonic()
        # The heartbeats of all ranks after this rank had stalled for half of the timeout.
        before: dict[int, Heartbeat] = {}
        store_answered = time.monotonic()
        while True:
            slept = time.monotonic()
            if self._stopped.wait(self._interval):
                return
            now = time.monotonic()
            if now - slept > 3 * self._interval:
                # This process was suspended for a while; others may have been, too.
                self._peers.forget()
                store_answered = now
            if self._progress != last_progress:
                last_progress, stalled_since, polled, before = self._progress, now, now, {}
            stalled = now - stalled_since
            try:
                self._query(self._send_heartbeat)
                self._follow_exit(self._query(self._announced_exit))
                self._exit_if_a_peer_died()
                heartbeats = {}
                # Rarely: every rank reads the heartbeats of all ranks.
                if stalled > self.seconds / 2 and now - polled > self.seconds / 10:
                    heartbeats, polled = self._query(self._read_all), now
            except _STORE_ERRORS as error:
                limit = self._heartbeat_timeout
                if isinstance(error, dist.DistNetworkError):
                    limit = min(_SECONDS_WITHOUT_STORE, limit)
                if now - store_answered > limit:
                    self._end_process(self._describe_lost_store(error))
                continue
            store_answered = time.monotonic()
            if any(beat.progress != before[rank].progress for rank, beat in heartbeats.items() if rank in before):
                stalled_since, before = time.monotonic(), {}
            elif stalled > self.seconds and before and heartbeats:
                stragglers = describe_stragglers(before, heartbeats, self.world_size)
                minutes = f"{self.seconds / 60:g} minutes (--distributed-timeout-minutes)"
                self._end_process(f"no progress for {minutes}: {stragglers}")
            else:
                before = before or heartbeats

    def _exit_if_a_peer_died(self) -> None:
        """Ends this process if a rank on this machine has died, or if one of the next ranks stopped its heartbeats.

        Vouches for ranks on this machine that are busy.
        """
        dead = self._dead_local_ranks()
        followed = sorted({*self._watched, *self._vouched_for})
        if not dead and followed:
            heartbeats = self._query(lambda: read_heartbeats(self._store, followed))
            self._peers.see(heartbeats, time.monotonic())
            for rank in self._vouched_for:
                if self._peers.silence(rank) > self._heartbeat_timeout / 2 and is_busy(heartbeats[rank]):
                    self._query(partial(self._store.add, f"busy/{rank}", 1))
            for rank in self._watched:
                if self._peers.silence(rank) > self._heartbeat_timeout:
                    vouched = self._query(partial(self._store.add, f"busy/{rank}", 0))
                    if not self._peers.excuse(rank, vouched):
                        dead.append(rank)
                        self._last_seen[rank] = heartbeats[rank]
        if dead:
            self._end_process(describe_ranks(dead, self._last_seen, "no heartbeat"))

    def _dead_local_ranks(self) -> list[int]:
        suspects = [rank for rank, heartbeat in self._last_seen.items() if is_dead(heartbeat)]
        if suspects:
            # Their last heartbeats: those that exited on purpose say so.
            self._last_seen |= self._query(lambda: read_heartbeats(self._store, suspects))
        return [rank for rank in suspects if is_dead(self._last_seen[rank])]

    def _query(self, query: Callable[[], T]) -> T:
        return self._store_thread.submit(query).result(6 * self._interval)

    def _send_heartbeat(self) -> None:
        # One at a time: a heartbeat that waited for a slow store would replace the last one.
        with self._sending:
            self._beat += 1
            heartbeat = current_heartbeat(self._beat, self._progress, EXITED if self._exits else self._activity)
            self._store.set(f"heartbeat/{self.rank}", heartbeat.to_json())

    def _send_last_heartbeat(self) -> None:
        """Says that this process exits because the run ends, so that nobody takes it for the one that has failed."""
        self._exits = True
        self._send_heartbeat()

    def _read_all(self) -> dict[int, Heartbeat]:
        return read_heartbeats(self._store, range(self.world_size))

    def _announced_exit(self) -> dict[str, Any] | None:
        return json.loads(self._store.get("exit")) if self._store.check(["exit"]) else None

    def _describe_lost_store(self, error: Exception) -> str:
        reason = str(error).strip().splitlines()
        host = "the launcher's rendezvous" if self.launch.hosted else "rank 0, which hosts the rendezvous,"
        return f"{host} does not answer ({reason[0] if reason else type(error).__name__})"

    def _follow_exit(self, announcement: dict[str, Any] | None) -> None:
        """Ends this process if another has announced its exit."""
        if announcement is None:
            return
        if announcement["code"] != EXIT_STOPPED and self._stopped.wait(_SECONDS_TO_FOLLOW):
            return
        with contextlib.suppress(*_STORE_ERRORS):
            call_with_timeout(self._send_last_heartbeat, 2.0)
            call_with_timeout(lambda: self._store.add("exit_followed", 1), 2.0)
        os._exit(announcement["code"])

    def _end_process(self, reason: str) -> None:
        text = f"error: rank {self.rank}, {self._activity}: {reason}"
        announcement = json.dumps({"rank": self.rank, "code": EXIT_HUNG, "text": text})
        try:
            first = call_with_timeout(lambda: self._store.compare_set("exit", "", announcement), 2 * self._interval)
            reports = json.loads(first)["rank"] == self.rank
            with contextlib.suppress(*_STORE_ERRORS):
                call_with_timeout(self._send_last_heartbeat, 2.0)
        except _STORE_ERRORS:
            # The ranks cannot reach each other: rank 0 and 1 and a machine's first rank report at once, others later.
            reports = True
            time.sleep(_SECONDS_FOR_ANOTHER_REPORT if self.rank > 1 and self.launch.local_rank else 0.0)
        if self._stopped.is_set():
            return
        if reports:
            with contextlib.suppress(*CONSOLE_ERRORS):
                print(below_bars() + wrapped_lines(text), file=sys.stderr, flush=True)
        # Not sys.exit: the main thread is blocked in a collective.
        os._exit(EXIT_HUNG)
