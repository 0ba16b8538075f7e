"""The rendezvous of all ranks of a run: they meet at a key-value store, compare their command lines, and exchange
values before the process group exists.

Designed for 512 ranks: the number of requests of a rank does not grow with the number of ranks, and a rank waits for
all of its peers at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch.distributed as dist

from megatron_doremi.cluster.heartbeat import (
    HEARTBEAT_TIMEOUT_SECONDS,
    WATCHED_RANKS,
    Heartbeat,
    current_heartbeat,
    is_dead,
)
from megatron_doremi.cluster.launch import Launch
from megatron_doremi.cluster.store import (
    call_with_timeout,
    get_keys,
    has_extended_api,
    open_store,
    read_heartbeats,
    second_connection,
)
from megatron_doremi.errors import EXIT_USER_ERROR, ConfigError, Fault, ReportedElsewhere, RunError

_POLL_SECONDS = 5.0
_LONGEST_PAUSE = 2.0
_SECONDS_TO_CONNECT = 30.0
# For a rank whose command line is wrong: rank 0 may take that much longer to start.
_SECONDS_TO_REJECT = 20.0
# For peers that poll, to read which rank is lost before rank 0 exits and the store with it.
_SECONDS_FOR_PEERS_TO_READ = 8.0
# For other ranks whose command lines are wrong as well.
_SECONDS_FOR_MORE_REJECTIONS = 2.0


class Rendezvous:
    """This rank among all ranks of a run, which have met at the run's store.

    Attributes:
        store: keys of this run and generation.
        heartbeats: the first heartbeats of the ranks on this machine, by rank.
        faults: differences between this rank's command line and that of the first rank to arrive.
    """

    def __init__(self, launch: Launch, minutes: float = 8.0, argv: Sequence[str] | None = None):
        """Joins; returns once all ranks have arrived.

        Args:
            minutes: to wait for peers; see --distributed-timeout-minutes.
            argv: the command line, which must be the same on all ranks; None: not compared.

        Raises:
            ConfigError: the host of the rendezvous does not resolve, or its store belongs to another run.
            RunError: peers did not arrive in time, or died meanwhile.
        """
        self.launch, self.host = launch, socket.gethostname()
        self._seconds = 60.0 * minutes
        self.root = open_store(launch, self._seconds)
        self.store: dist.Store = dist.PrefixStore(_prefix(launch), self.root)
        self.heartbeats: dict[int, Heartbeat] = {}
        self.faults: list[Fault] = []
        self._arrived: set[int] = set()
        self._beat, self._watched_at = 0, time.monotonic()
        # (sequence number, when it was first seen) of the last heartbeat of each watched rank.
        self._last_beats: dict[int, tuple[int, float]] = {}
        if launch.world_size > 1:
            try:
                self._check_run(argv)
                self._arrive()
            except RuntimeError as error:
                reason = (str(error).strip().splitlines() or [repr(error)])[0]
                raise RunError(
                    f"rank {launch.rank}: the rendezvous at {launch.rendezvous} does not answer ({reason})"
                ) from error

    def new_connection(self) -> dist.Store:
        """Another connection to the same keys: a wait on one does not block the other."""
        connection = call_with_timeout(lambda: second_connection(self.root), _SECONDS_TO_CONNECT)
        return dist.PrefixStore(_prefix(self.launch), connection)

    def _check_run(self, argv: Sequence[str] | None) -> None:
        """Compares run and command line with those of the rank that arrived first."""
        launch = self.launch
        identity = _run_identity(launch, argv)
        first = json.loads(_run_store(launch, self.root).compare_set("run", "", json.dumps(identity)))
        if not _is_same_run(first, identity):
            other = f"{first['run'] or 'a run without an id'} with {first['world_size']} ranks"
            rule = f"the rendezvous of this run ({launch.run_id or 'no id'}, {launch.world_size} ranks); "
            raise ConfigError(
                Fault(
                    f"MASTER_ADDR, MASTER_PORT (rank {launch.rank} on {self.host})",
                    f"{launch.rendezvous} is the rendezvous of {other}",
                    f"{rule}rank {first['rank']} of another run ({first['place']}) is using it",
                    "export another MASTER_PORT for one of the two runs",
                )
            )
        if first["argv"] != identity["argv"] and first["argv"] is not None and identity["argv"] is not None:
            pairs = ((identity, first), (first, identity))
            ours, theirs = ([word for word in a["argv"] if word not in b["argv"]] for a, b in pairs)
            value = f"{' '.join(ours) or 'none'} against {' '.join(theirs) or 'none'} of rank {first['rank']} on "
            value += first["place"] + ("" if ours or theirs else ": the same arguments in another order")
            fault = Fault(
                f"rank {launch.rank} on {self.host}",
                value,
                "the same command line on every rank",
                "start all ranks with the same flags; if that is another run, export another MASTER_PORT",
            )
            if not _has_own_store(launch):
                # The first rank may belong to another run, which must not be stopped.
                raise ConfigError(fault)
            self.faults.append(fault)

    def _arrive(self) -> None:
        launch, store = self.launch, self.store
        if store.add(f"rank/{launch.rank}", 1) > 1:
            raise RunError(f"a second rank {launch.rank} arrived at {launch.rendezvous}: are two runs using this port?")
        heartbeat = current_heartbeat(0, 0, "starting")
        store.set(f"heartbeat/{launch.rank}", heartbeat.to_json())
        if has_extended_api(store):
            store.append("arrivals", f"{launch.rank}@{_machine_id(heartbeat)},")  # type: ignore[attr-defined]
        if store.add("arrival_count", 1) == launch.world_size:
            store.set("complete", "1")
        if not self._wait_for_key("complete", self._seconds, self._poll_and_send_heartbeat):
            missing = [rank for rank in range(launch.world_size) if rank not in self._arrived]
            raise RunError(
                f"rank {launch.rank} on {self.host}: of {launch.world_size} ranks these did not arrive at "
                f"{launch.rendezvous} within {self._seconds / 60:g} minutes (--distributed-timeout-minutes): {missing}"
            )
        self._poll()

    def _wait_for_key(self, key: str, seconds: float, poll: Callable[[], None] = lambda: None) -> bool:
        """Waits until a key is set; returns False if it is not in time.

        Polls, because the store's own wait writes to the console when it times out.

        Args:
            poll: called every `_POLL_SECONDS`.
        """
        end, pause, polled = time.monotonic() + seconds, 0.02, time.monotonic()
        while not self._has_key(key):
            now = time.monotonic()
            if now >= end:
                poll()
                return False
            if now - polled > _POLL_SECONDS:
                poll()
                polled = now
            time.sleep(min(pause, end - now))
            pause = min(2 * pause, _LONGEST_PAUSE)
        return True

    def _has_key(self, key: str) -> bool:
        """Whether a key is in the store. Raises RuntimeError if the store does not answer: its host may be lost."""
        try:
            return call_with_timeout(lambda: bool(self.store.check([key])), HEARTBEAT_TIMEOUT_SECONDS)
        except TimeoutError as error:
            raise RuntimeError(f"no answer for {HEARTBEAT_TIMEOUT_SECONDS:g} s") from error

    def _poll(self) -> None:
        """Notes which ranks have arrived since the last poll; raises if one has died or was started wrongly."""
        store = self.store
        new = []
        if has_extended_api(store):
            machine = _machine_id(current_heartbeat(0, 0, ""))
            for arrival in store.get("arrivals").decode().split(",")[:-1]:
                rank, _, rank_machine = arrival.partition("@")
                if int(rank) not in self._arrived:
                    self._arrived.add(int(rank))
                    new += [int(rank)] if rank_machine == machine else []
        else:
            absent = [rank for rank in range(self.launch.world_size) if rank not in self._arrived]
            new = [rank for rank in absent if store.check([f"heartbeat/{rank}"])]
            self._arrived |= set(new)
        self.heartbeats |= read_heartbeats(store, new)
        if store.check(["rejected"]):
            self._raise_rejection()
        if store.check(["lost"]):
            self._raise_lost_rank(json.loads(store.get("lost")))
        dead = [rank for rank, heartbeat in self.heartbeats.items() if is_dead(heartbeat)]
        if dead:
            self._report_lost_rank(dead[0], self.heartbeats[dead[0]].host, "died")

    def _poll_and_send_heartbeat(self) -> None:
        """Polls, sends a heartbeat, and checks those of the next ranks, which may be on other machines."""
        self._poll()
        self._beat += 1
        self.store.set(f"heartbeat/{self.launch.rank}", current_heartbeat(self._beat, 0, "starting").to_json())
        now = time.monotonic()
        if now - self._watched_at > HEARTBEAT_TIMEOUT_SECONDS / 2:
            # This process was suspended for a while; others may have been, too.
            self._last_beats = {}
        self._watched_at = now
        after = sorted(self._arrived - {self.launch.rank}, key=lambda rank: (rank < self.launch.rank, rank))
        for rank, heartbeat in read_heartbeats(self.store, after[:WATCHED_RANKS]).items():
            if rank not in self._last_beats or self._last_beats[rank][0] != heartbeat.beat:
                self._last_beats[rank] = (heartbeat.beat, now)
            elif now - self._last_beats[rank][1] > HEARTBEAT_TIMEOUT_SECONDS:
                self._report_lost_rank(rank, heartbeat.host, f"sent no heartbeat for {HEARTBEAT_TIMEOUT_SECONDS:g} s")

    def _report_lost_rank(self, rank: int, host: str, how: str) -> None:
        """Ends the wait on all ranks, because one is lost."""
        text = f"rank {rank} on {host} {how} before all ranks had met"
        report = json.dumps({"by": self.launch.rank, "text": text})
        self._raise_lost_rank(json.loads(self.store.compare_set("lost", "", report)))

    def _raise_lost_rank(self, lost: dict[str, Any]) -> None:
        """Raises RunError on rank 0, or, if rank 0 is absent or no longer polls, on the rank that reported the loss.

        The other ranks exit silently.
        """
        launch, store = self.launch, self.store
        if launch.rank:
            store.add("lost/read", 1)
            if lost["by"] != launch.rank or (0 in self._arrived and not store.check(["complete"])):
                raise ReportedElsewhere(1)
        elif not launch.hosted:
            # All ranks that arrived, except this one and the lost one.
            self._wait_for_readers("lost/read", len(self._arrived) - 2)
        raise RunError(lost["text"])

    def _raise_rejection(self) -> None:
        if self.launch.rank:
            raise ReportedElsewhere(EXIT_USER_ERROR)
        time.sleep(_SECONDS_FOR_MORE_REJECTIONS)
        lines = self.store.get("rejected").decode().splitlines()
        faults = [Fault(**fault) for line in lines for fault in json.loads(line)]
        raise ConfigError(list(dict.fromkeys(faults)))

    def gather(self, name: str, value: Any, seconds: float) -> list[Any]:
        """Gathers a value from every rank on rank 0, which then calls `reply`.

        Args:
            name: of the keys; used once in a run.
            value: anything that JSON can represent.
            seconds: to wait.

        Returns:
            on rank 0 the values in rank order, None for ranks that sent none in time; on other ranks an empty list,
            once rank 0 has replied or the time has elapsed.
        """
        launch, store = self.launch, self.store
        if launch.world_size == 1:
            return [value]
        store.set(f"{name}/{launch.rank}", json.dumps(value))
        if store.add(f"{name}/count", 1) == launch.world_size:
            store.set(f"{name}/complete", "1")
        if launch.rank:
            self._wait_for_key(f"{name}/reply", seconds)
            return []
        ranks = list(range(launch.world_size))
        if not self._wait_for_key(f"{name}/complete", seconds):
            ranks = [rank for rank in ranks if store.check([f"{name}/{rank}"])]
        texts = dict(zip(ranks, get_keys(store, [f"{name}/{rank}" for rank in ranks]), strict=True))
        return [json.loads(texts[rank]) if rank in texts else None for rank in range(launch.world_size)]

    def reply(self, name: str, value: Any, readers: int = 0) -> None:
        """Sends rank 0's reply to the values that it has gathered.

        Args:
            readers: the number of ranks to wait for until they have read it. A rank 0 that ends takes the store with
                it: a rank that finds no store would report its error once more.
        """
        self.store.set(f"{name}/reply", json.dumps(value))
        self._wait_for_readers(f"{name}/read", readers)

    def _wait_for_readers(self, key: str, readers: int) -> None:
        """Waits, for a limited time, until so many ranks have counted themselves in `key`."""
        end = time.monotonic() + _SECONDS_FOR_PEERS_TO_READ
        while readers > 0 and self.store.add(key, 0) < readers and time.monotonic() < end:
            time.sleep(0.1)

    def read_reply(self, name: str) -> Any:
        """Rank 0's reply; None if there is none."""
        key = f"{name}/reply"
        if not self.store.check([key]):
            return None
        value = json.loads(self.store.get(key))
        # Rank 0 may have ended after its own seconds.
        with contextlib.suppress(RuntimeError):
            self.store.add(f"{name}/read", 1)
        return value


def reject_command_line(launch: Launch, argv: Sequence[str], faults: Sequence[Fault]) -> bool:
    """Tells rank 0, which may be waiting for its peers, that this rank's command line is wrong.

    Returns:
        whether rank 0 reports the faults, these or its own; False if the store may belong to another run.
    """
    try:
        root = open_store(launch, _SECONDS_TO_REJECT)
        runs = _run_store(launch, root)
        if runs.check(["run"]):
            first = json.loads(runs.get("run"))
            if not (_is_same_run(first, _run_identity(launch, argv)) and _has_own_store(launch)):
                return False
        store = dist.PrefixStore(_prefix(launch), root)
        line = json.dumps([asdict(fault) for fault in faults]) + "\n"
        if has_extended_api(store):
            store.append("rejected", line)  # type: ignore[attr-defined]
        else:
            store.set("rejected", line)
    except (RunError, RuntimeError):
        # Rank 0 has exited: it was started with the same flags.
        return True
    except ConfigError:
        return False
    return True


def _prefix(launch: Launch) -> str:
    # torchrun keeps its store when it restarts its workers: the keys of the earlier generation must not be read again.
    return f"doremi/{launch.generation}/{launch.world_size}"


def _run_store(launch: Launch, root: dist.Store) -> dist.Store:
    return dist.PrefixStore(f"doremi/{launch.generation}", root)


def _run_identity(launch: Launch, argv: Sequence[str] | None) -> dict[str, Any]:
    return {
        "run": launch.run_id,
        "world_size": launch.world_size,
        # The deepspeed launcher passes a different --local_rank to each rank.
        "argv": None if argv is None else [argument for argument in argv if not argument.startswith("--local_rank=")],
        "rank": launch.rank,
        "place": f"{socket.gethostname()}, process {os.getpid()}, folder {os.getcwd()}",
    }


def _is_same_run(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a["run"] == b["run"] and a["world_size"] == b["world_size"]


def _has_own_store(launch: Launch) -> bool:
    """Whether a store with this run's id and world size is certain to belong to this run."""
    return launch.hosted or bool(launch.run_id)


def _machine_id(heartbeat: Heartbeat) -> str:
    return f"{zlib.crc32(heartbeat.pid_scope.encode()):x}"
