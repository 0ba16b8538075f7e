"""Signs of life of the ranks: what each puts into the store, and what can be told from them."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache

from megatron_doremi.cluster.process_identity import boot_id, has_ended, pid_namespace, process_start

# What a rank is doing that has left on purpose.
LEFT = "left"
# A rank watches this many: a machine that is lost as a whole is noticed by the ranks before it.
WATCHED = 8
HEARTBEAT_TIMEOUT_SECONDS = 60.0


@dataclass(frozen=True)
class Heartbeat:
    """A rank's sign of life.

    Attributes:
        beat: how many signs it has given.
        progress: how many steps its main thread has taken, of whatever kind.
        doing: what that thread is doing; LEFT once it is done.
        host: where.
        process: its id and start, as `process_start` gives it.
        space: tells where such an id means anything: a boot of a machine, and a namespace there; "" if unknown.
    """

    beat: int
    progress: int
    doing: str
    host: str
    process: tuple[int, int] = (0, 0)
    space: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: bytes | str) -> Heartbeat:
        entry = json.loads(text)
        return Heartbeat(**{**entry, "process": tuple(entry["process"])})


def current_heartbeat(beat: int, progress: int, doing: str) -> Heartbeat:
    """This process's."""
    return Heartbeat(
        beat, progress, doing, socket.gethostname(), (os.getpid(), process_start(os.getpid()) or 0), _space()
    )


@cache
def _space() -> str:
    boot, namespace = boot_id(), pid_namespace()
    return boot + namespace if boot and namespace else ""


def is_dead(sign: Heartbeat) -> bool:
    """Whether a rank on this machine has ended without saying so; False of other machines, where nobody can see it."""
    if not sign.space or sign.space != _space() or sign.doing == LEFT:
        return False
    return has_ended(*sign.process)


def describe_stragglers(before: Mapping[int, Heartbeat], now: Mapping[int, Heartbeat], world_size: int) -> str:
    """Words for the ranks that hold up the others.

    Args:
        before: signs by rank, some beats ago.
        now: signs by rank; ranks that never gave one are in neither.
    """
    silent = [rank for rank in range(world_size) if rank not in now or now[rank] == before.get(rank)]
    if silent:
        return describe_ranks(silent, now, "no sign of life")
    least = min(sign.progress for sign in now.values())
    behind = [rank for rank, sign in now.items() if sign.progress == least]
    if len(behind) < world_size:
        return describe_ranks(behind, now, "alive, but behind the others")
    return f"every rank is alive and at the same point: {now[0].doing}"


def describe_ranks(ranks: Sequence[int], signs: Mapping[int, Heartbeat], what: str) -> str:
    """`what` of these ranks, with their hosts and what they were doing."""
    places = [f"rank {r} on {signs[r].host}, {signs[r].doing}" if r in signs else f"rank {r}" for r in ranks]
    return f"{what}: {'; '.join(places)}"
