"""The ranks of a run at their store: who came, and what they have to say before the run begins.

Everything here is counted for 512 ranks: a rank makes a few requests, however many there are, and waits for all of its
peers at once.
"""

from __future__ import annotations

import json
import os
import socket
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch.distributed as dist

from megatron_doremi.cluster.heartbeat import HEARTBEAT_TIMEOUT_SECONDS, WATCHED, Heartbeat, current_heartbeat, is_dead
from megatron_doremi.cluster.launch import Launch
from megatron_doremi.cluster.store import (
    get_all,
    in_time,
    is_extended,
    open_store,
    read_heartbeats,
    second_connection,
)
from megatron_doremi.errors import EXIT_USER_ERROR, ConfigError, Fault, ReportedElsewhere, RunError

_SECONDS_BETWEEN_LOOKS = 5.0
_LONGEST_NAP = 2.0
_SECONDS_TO_CONNECT_AGAIN = 30.0
# For a rank whose command line is wrong: longer than rank 0 may take to start besides.
_SECONDS_TO_REFUSE = 20.0
# For ranks that look now and then, to read whom the others miss, before their store ends with rank 0.
_SECONDS_TO_READ = 8.0
# For other ranks that refuse too.
_SECONDS_FOR_REFUSALS = 2.0


class Rendezvous:
    """The ranks of a run at its store.

    Attributes:
        store: the ranks' keys.
        signs: of the ranks on this machine, by rank.
        faults: of this rank's command line, as compared with another's.
    """

    def __init__(self, launch: Launch, minutes: float = 8.0, argv: Sequence[str] | None = None):
        """Joins; returns once all ranks have come.

        Args:
            minutes: to wait for peers; see --distributed-timeout-minutes.
            argv: the command line, which has to be the same on all ranks; None does not compare it.

        Raises:
            ConfigError: the host of the rendezvous does not resolve, or its store is another run's.
            RunError: peers did not come in time, or died meanwhile.
        """
        self.launch, self.host = launch, socket.gethostname()
        self._seconds = 60.0 * minutes
        self.root = open_store(launch, self._seconds)
        self.store: dist.Store = dist.PrefixStore(_prefix(launch), self.root)
        self.signs: dict[int, Heartbeat] = {}
        self.faults: list[Fault] = []
        self._came: set[int] = set()
        self._beat, self._watched_at = 0, time.monotonic()
        # (beat, when it was first seen) of the next ranks.
        self._heard: dict[int, tuple[int, float]] = {}
        if launch.world_size > 1:
            try:
                self._check_run(argv)
                self._arrive()
            except RuntimeError as error:
                reason = (str(error).strip().splitlines() or [repr(error)])[0]
                raise RunError(
                    f"rank {launch.rank}: the rendezvous at {launch.rendezvous} does not answer ({reason})"
                ) from error

    def connect_again(self) -> dist.Store:
        """A second connection to the same keys, which waits for nothing that the first one waits for."""
        again = in_time(lambda: second_connection(self.root), _SECONDS_TO_CONNECT_AGAIN)
        return dist.PrefixStore(_prefix(self.launch), again)

    def _check_run(self, argv: Sequence[str] | None) -> None:
        """Compares what is known of the run with the rank that came first."""
        launch = self.launch
        own = _identity(launch, argv)
        first = json.loads(_run_store(launch, self.root).compare_set("run", "", json.dumps(own)))
        if not _is_same_run(first, own):
            named = f"{first['run'] or 'a run without a name'} with {first['world_size']} ranks"
            rule = f"this run's ({launch.run_id or 'no name'}, {launch.world_size} ranks); "
            raise ConfigError(
                Fault(
                    f"MASTER_ADDR, MASTER_PORT (rank {launch.rank} on {self.host})",
                    f"{launch.rendezvous} is the rendezvous of {named}",
                    f"{rule}rank {first['rank']} of another run ({first['place']}) meets there",
                    "export another MASTER_PORT for one of the two runs",
                )
            )
        if first["argv"] != own["argv"] and first["argv"] is not None and own["argv"] is not None:
            mine, theirs = ([w for w in a["argv"] if w not in b["argv"]] for a, b in ((own, first), (first, own)))
            value = f"{' '.join(mine) or 'none'} against {' '.join(theirs) or 'none'} of rank {first['rank']} on "
            value += first["place"] + ("" if mine or theirs else ": the same words in another order")
            fault = Fault(
                f"rank {launch.rank} on {self.host}",
                value,
                "the same command line on every rank",
                "start all ranks with the same flags; if that is another run, export another MASTER_PORT",
            )
            if not _is_ours(launch):
                # Perhaps another run, which is none of our business.
                raise ConfigError(fault)
            self.faults.append(fault)

    def _arrive(self) -> None:
        launch, store = self.launch, self.store
        if store.add(f"rank/{launch.rank}", 1) > 1:
            raise RunError(f"a second rank {launch.rank} came to {launch.rendezvous}: are two runs using this port?")
        sign = current_heartbeat(0, 0, "starting")
        store.set(f"sign/{launch.rank}", sign.to_json())
        if is_extended(store):
            store.append("came", f"{launch.rank}@{_machine(sign)},")  # type: ignore[attr-defined]
        if store.add("arrived", 1) == launch.world_size:
            store.set("complete", "1")
        if not self._waited("complete", self._seconds, self._look_and_watch):
            missing = [rank for rank in range(launch.world_size) if rank not in self._came]
            raise RunError(
                f"rank {launch.rank} on {self.host}: of {launch.world_size} ranks these did not come to "
                f"{launch.rendezvous} within {self._seconds / 60:g} minutes (--distributed-timeout-minutes): {missing}"
            )
        self._look()

    def _waited(self, key: str, seconds: float, look: Callable[[], None] = lambda: None) -> bool:
        """Waits until a key is there; False where it is not in time.

        Asks now and then: the store's own wait writes to the console when it times out.

        Args:
            look: called every few seconds.
        """
        end, nap, looked = time.monotonic() + seconds, 0.02, time.monotonic()
        while not self._has(key):
            now = time.monotonic()
            if now >= end:
                look()
                return False
            if now - looked > _SECONDS_BETWEEN_LOOKS:
                look()
                looked = now
            time.sleep(min(nap, end - now))
            nap = min(2 * nap, _LONGEST_NAP)
        return True

    def _has(self, key: str) -> bool:
        """Whether a key is in the store. Raises RuntimeError where it gives no answer: its machine may be lost."""
        try:
            return in_time(lambda: bool(self.store.check([key])), HEARTBEAT_TIMEOUT_SECONDS)
        except TimeoutError as error:
            raise RuntimeError(f"no answer for {HEARTBEAT_TIMEOUT_SECONDS:g} s") from error

    def _look(self) -> None:
        """Learns who has come since the last look; raises where one of them has died, or refuses to start."""
        store = self.store
        new = []
        if is_extended(store):
            machine = _machine(current_heartbeat(0, 0, ""))
            for entry in store.get("came").decode().split(",")[:-1]:
                rank, _, where = entry.partition("@")
                if int(rank) not in self._came:
                    self._came.add(int(rank))
                    new += [int(rank)] if where == machine else []
        else:
            new = [r for r in range(self.launch.world_size) if r not in self._came and store.check([f"sign/{r}"])]
            self._came |= set(new)
        self.signs |= read_heartbeats(store, new)
        if store.check(["refused"]):
            self._follow_refusals()
        if store.check(["lost"]):
            self._end_with(json.loads(store.get("lost")))
        dead = [rank for rank, sign in self.signs.items() if is_dead(sign)]
        if dead:
            self._lose(dead[0], self.signs[dead[0]].host, "died")

    def _look_and_watch(self) -> None:
        """Gives a sign of life, and looks for those of the next ranks, which may be on other machines."""
        self._look()
        self._beat += 1
        self.store.set(f"sign/{self.launch.rank}", current_heartbeat(self._beat, 0, "starting").to_json())
        now = time.monotonic()
        if now - self._watched_at > HEARTBEAT_TIMEOUT_SECONDS / 2:
            # This process itself was stopped for a while, and so may have been the others.
            self._heard = {}
        self._watched_at = now
        after = sorted(self._came - {self.launch.rank}, key=lambda rank: (rank < self.launch.rank, rank))
        for rank, sign in read_heartbeats(self.store, after[:WATCHED]).items():
            if rank not in self._heard or self._heard[rank][0] != sign.beat:
                self._heard[rank] = (sign.beat, now)
            elif now - self._heard[rank][1] > HEARTBEAT_TIMEOUT_SECONDS:
                self._lose(rank, sign.host, f"gave no sign of life for {HEARTBEAT_TIMEOUT_SECONDS:g} s")

    def _lose(self, rank: int, host: str, how: str) -> None:
        """Ends the wait on all ranks: one of them is gone."""
        text = f"rank {rank} on {host} {how} before all ranks had met"
        entry = json.dumps({"by": self.launch.rank, "text": text})
        self._end_with(json.loads(self.store.compare_set("lost", "", entry)))

    def _end_with(self, lost: dict[str, Any]) -> None:
        """Raises RunError on rank 0, or on the rank that found out where rank 0 has not come or does not look any more.

        The others leave silently.
        """
        launch, store = self.launch, self.store
        if launch.rank:
            store.add("lost/read", 1)
            if lost["by"] != launch.rank or (0 in self._came and not store.check(["complete"])):
                raise ReportedElsewhere(1)
        elif not launch.hosted:
            end = time.monotonic() + _SECONDS_TO_READ
            # All that came but this rank and the one that is gone.
            while store.add("lost/read", 0) < len(self._came) - 2 and time.monotonic() < end:
                time.sleep(0.1)
        raise RunError(lost["text"])

    def _follow_refusals(self) -> None:
        if self.launch.rank:
            raise ReportedElsewhere(EXIT_USER_ERROR)
        time.sleep(_SECONDS_FOR_REFUSALS)
        lines = self.store.get("refused").decode().splitlines()
        faults = [Fault(**entry) for line in lines for entry in json.loads(line)]
        raise ConfigError(list(dict.fromkeys(faults)))

    def exchange(self, name: str, value: Any, seconds: float) -> list[Any]:
        """Every rank's value in the order of ranks, None for ranks that gave none in time; on rank 0 only.

        The others get an empty list, once rank 0 has answered or `seconds` are over.
        """
        launch, store = self.launch, self.store
        if launch.world_size == 1:
            return [value]
        store.set(f"{name}/{launch.rank}", json.dumps(value))
        if store.add(f"{name}/count", 1) == launch.world_size:
            store.set(f"{name}/complete", "1")
        if launch.rank:
            self._waited(f"{name}/answer", seconds)
            return []
        ranks = list(range(launch.world_size))
        if not self._waited(f"{name}/complete", seconds):
            ranks = [rank for rank in ranks if store.check([f"{name}/{rank}"])]
        texts = dict(zip(ranks, get_all(store, [f"{name}/{rank}" for rank in ranks]), strict=True))
        return [json.loads(texts[rank]) if rank in texts else None for rank in range(launch.world_size)]

    def answer(self, name: str, value: Any) -> None:
        """Rank 0's answer to what the others gave to `exchange`."""
        self.store.set(f"{name}/answer", json.dumps(value))

    def answered(self, name: str) -> Any:
        """Rank 0's answer; None where there is none."""
        key = f"{name}/answer"
        return json.loads(self.store.get(key)) if self.store.check([key]) else None


def refuse(launch: Launch, argv: Sequence[str], faults: Sequence[Fault]) -> bool:
    """Tells rank 0, where it waits for its peers, that this rank's command line is wrong.

    Returns:
        whether rank 0 can be told, or says the same by itself; False where somebody else may listen there.
    """
    try:
        root = open_store(launch, _SECONDS_TO_REFUSE)
        runs = _run_store(launch, root)
        if runs.check(["run"]):
            first = json.loads(runs.get("run"))
            if not (_is_same_run(first, _identity(launch, argv)) and _is_ours(launch)):
                return False
        store = dist.PrefixStore(_prefix(launch), root)
        line = json.dumps([asdict(fault) for fault in faults]) + "\n"
        if is_extended(store):
            store.append("refused", line)  # type: ignore[attr-defined]
        else:
            store.set("refused", line)
    except (RunError, RuntimeError):
        # Rank 0 has left: it was started with the same flags.
        return True
    except ConfigError:
        return False
    return True


def _prefix(launch: Launch) -> str:
    # torchrun keeps its store over a restart: the keys of the workers before must not be met again.
    return f"doremi/{launch.generation}/{launch.world_size}"


def _run_store(launch: Launch, root: dist.Store) -> dist.Store:
    return dist.PrefixStore(f"doremi/{launch.generation}", root)


def _identity(launch: Launch, argv: Sequence[str] | None) -> dict[str, Any]:
    return {
        "run": launch.run_id,
        "world_size": launch.world_size,
        # The deepspeed launcher gives each rank one of its own.
        "argv": None if argv is None else [word for word in argv if not word.startswith("--local_rank=")],
        "rank": launch.rank,
        "place": f"{socket.gethostname()}, process {os.getpid()}, folder {os.getcwd()}",
    }


def _is_same_run(first: dict[str, Any], own: dict[str, Any]) -> bool:
    return first["run"] == own["run"] and first["world_size"] == own["world_size"]


def _is_ours(launch: Launch) -> bool:
    """Whether a store of the same name and size is this run's for sure."""
    return launch.hosted or bool(launch.run_id)


def _machine(sign: Heartbeat) -> str:
    return f"{zlib.crc32(sign.space.encode()):x}"
