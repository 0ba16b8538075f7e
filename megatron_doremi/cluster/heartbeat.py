"""Heartbeats: what each rank writes into the store every few seconds, and what they reveal about stuck ranks."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache

from megatron_doremi.cluster.process_identity import boot_id, has_ended, is_stopped, pid_namespace, process_start

# Activity of a rank that has exited on purpose.
EXITED = "exited"
# Each rank watches that many of the next ranks: if a machine of 8 GPUs is lost, ranks of another machine notice.
WATCHED_RANKS = 8
HEARTBEAT_TIMEOUT_SECONDS = 60.0


@dataclass(frozen=True)
class Heartbeat:
    """A rank's heartbeat.

    Attributes:
        beat: sequence number.
        progress: how often the main thread has reported progress, of any kind (`Watchdog.mark`).
        activity: what the main thread is doing; EXITED at the end.
        host: name of the machine.
        process: process id, and start as in `process_start`.
        pid_scope: where the process id is valid: boot of the machine and pid namespace; "" if unknown.
    """

    beat: int
    progress: int
    activity: str
    host: str
    process: tuple[int, int] = (0, 0)
    pid_scope: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: bytes | str) -> Heartbeat:
        fields = json.loads(text)
        return Heartbeat(**{**fields, "process": tuple(fields["process"])})


def current_heartbeat(beat: int, progress: int, activity: str) -> Heartbeat:
    """A heartbeat of this process."""
    return Heartbeat(
        beat, progress, activity, socket.gethostname(), (os.getpid(), process_start(os.getpid()) or 0), _pid_scope()
    )


@cache
def _pid_scope() -> str:
    boot, namespace = boot_id(), pid_namespace()
    return boot + namespace if boot and namespace else ""


def is_dead(heartbeat: Heartbeat) -> bool:
    """Whether a rank on this machine has died; False for ranks on other machines, whose processes cannot be seen."""
    if not is_local(heartbeat) or heartbeat.activity == EXITED:
        return False
    return has_ended(*heartbeat.process)


def is_busy(heartbeat: Heartbeat) -> bool:
    """Whether a rank on this machine that sends no heartbeat is seen to live: its process exists and is not stopped.

    Something keeps its threads from running Python then, such as a library that loads from a slow disk. False for ranks
    on other machines.
    """
    if is_dead(heartbeat) or heartbeat.activity == EXITED or not is_local(heartbeat):
        return False
    return not is_stopped(heartbeat.process[0])


def is_local(heartbeat: Heartbeat) -> bool:
    """Whether the rank's process can be seen from here."""
    return bool(heartbeat.pid_scope) and heartbeat.pid_scope == _pid_scope()


def describe_stragglers(before: Mapping[int, Heartbeat], now: Mapping[int, Heartbeat], world_size: int) -> str:
    """Describes the ranks that the others wait for: those without a heartbeat, or else those furthest behind.

    Args:
        before: heartbeats by rank, some time ago.
        now: heartbeats by rank; ranks that never sent one are in neither.
    """
    silent = [rank for rank in range(world_size) if rank not in now or now[rank] == before.get(rank)]
    if silent:
        return describe_ranks(silent, now, "no heartbeat")
    least = min(heartbeat.progress for heartbeat in now.values())
    behind = [rank for rank, heartbeat in now.items() if heartbeat.progress == least]
    if len(behind) < world_size:
        return describe_ranks(behind, now, "alive, but behind the others")
    return f"every rank is alive and at the same point: {now[0].activity}"


def describe_ranks(ranks: Sequence[int], heartbeats: Mapping[int, Heartbeat], problem: str) -> str:
    """Names a problem and the ranks that have it, with their hosts and activities."""
    described = []
    for rank in ranks:
        beat = heartbeats.get(rank)
        described.append(f"rank {rank}" if beat is None else f"rank {rank} on {beat.host}, {beat.activity}")
    return f"{problem}: {'; '.join(described)}"
