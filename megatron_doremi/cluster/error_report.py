"""One voice: what the ranks of a run have to say about an error is gathered, and rank 0 says it once."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from megatron_doremi.cluster.launch import MPIRUN, SRUN, Launch, launcher_of, local_rank_of, rank_of
from megatron_doremi.errors import EXIT_USER_ERROR, ConfigError, Fault, ReportedElsewhere, RunError

if TYPE_CHECKING:
    from megatron_doremi.cluster.rendezvous import Rendezvous

# For ranks that may have died, where this one knows already that the run cannot begin.
_SECONDS_FOR_OTHERS = 60.0
# For a rank that fails with the others, or alone.
_SECONDS_FOR_THE_SAME = 8.0
_SECONDS_FOR_RANK_0 = 5.0


def command_line_error(launch: Launch, argv: Sequence[str], faults: Sequence[Fault]) -> Exception:
    """What a rank shall raise whose command line is wrong.

    Rank 0 says it at once. The others have the same command line as a rule, and leave silently; where rank 0 has
    another and waits for them, it is told, and says it.
    """
    if launch.rank == 0:
        return ConfigError(faults)
    from megatron_doremi.cluster.rendezvous import refuse

    placed = _placed(faults, f"rank {launch.rank} on {socket.gethostname()}: ")
    return ReportedElsewhere(EXIT_USER_ERROR) if refuse(launch, argv, placed) else ConfigError(placed)


def raise_faults_of_all_ranks(meeting: Rendezvous, faults: Sequence[Fault], seconds: float) -> None:
    """Ends the start on all ranks together where one of them has found a fault; all ranks call it once.

    Args:
        faults: this rank's.
        seconds: to wait for ranks that still look.

    Raises:
        ConfigError: on rank 0, with every rank's faults.
        ReportedElsewhere: on the others.
        RunError: rank 0 does not answer.
    """
    if meeting.launch.world_size == 1:
        if faults:
            raise ConfigError(faults)
        return
    own = [meeting.host, [asdict(fault) for fault in faults]]
    patience = min(seconds, _SECONDS_FOR_OTHERS) if faults else seconds
    everyone = meeting.exchange("faults", own, patience)
    if meeting.launch.rank == 0:
        union = merge_faults(everyone)
        meeting.answer("faults", len(union))
        if union:
            raise ConfigError(union)
        return
    count = meeting.answered("faults")
    if count:
        raise ReportedElsewhere(EXIT_USER_ERROR)
    if count is None:
        if faults:
            raise ConfigError(_placed(faults, f"rank {meeting.launch.rank} on {meeting.host}: "))
        raise RunError(f"rank {meeting.launch.rank} on {meeting.host}: rank 0 never said whether the run may begin")


def merge_faults(everyone: Sequence[tuple[str, list[dict[str, str]]] | None]) -> list[Fault]:
    """Every fault once, in the order of ranks; those that only some ranks have name them.

    Args:
        everyone: (host, faults as dictionaries) by rank; None for a rank that said nothing.
    """
    holders: dict[Fault, list[int]] = {}
    spoke = [rank for rank, entry in enumerate(everyone) if entry is not None]
    for rank in spoke:
        for fault in everyone[rank][1]:  # type: ignore[index]
            holders.setdefault(Fault(**fault), []).append(rank)
    union = []
    for fault, ranks in holders.items():
        ranks = sorted(set(ranks))
        prefix = ""
        if ranks != spoke:
            shown = ", ".join(map(str, ranks[:4])) + (", ..." if len(ranks) > 4 else "")
            hosts = sorted({everyone[rank][0] for rank in ranks})  # type: ignore[index]
            places = ", ".join(hosts[:4]) + (", ..." if len(hosts) > 4 else "")
            prefix = f"rank{'s' if len(ranks) > 1 else ''} {shown} on {places}: "
        union += _placed([fault], prefix)
    return union


def _placed(faults: Sequence[Fault], prefix: str) -> list[Fault]:
    return [
        fault if fault.what.startswith(prefix[:-2]) else replace(fault, what=prefix + fault.what) for fault in faults
    ]


def merged_error(meeting: Rendezvous, error: ConfigError | RunError) -> Exception:
    """What this rank shall raise in place of an error: rank 0 speaks for all that fail with it.

    A rank that fails while rank 0 does not speaks for itself.
    """
    from megatron_doremi.cluster.store import in_time

    launch = meeting.launch
    if launch.world_size == 1:
        return error
    code = EXIT_USER_ERROR if isinstance(error, ConfigError) else 1
    faults = [asdict(fault) for fault in error.faults] if isinstance(error, ConfigError) else []
    entry: dict[str, Any] = {"place": [meeting.host, faults], "text": "" if faults else str(error)}

    def ask() -> Any:
        everyone = meeting.exchange("errors", entry, _SECONDS_FOR_THE_SAME)
        if launch.rank:
            return meeting.answered("errors")
        meeting.answer("errors", 1)
        return everyone

    try:
        # A store whose machine is lost answers nothing, not even an error.
        everyone = in_time(ask, 2 * _SECONDS_FOR_THE_SAME)
    except (RuntimeError, ValueError, TimeoutError):
        # The store is gone, and rank 0 with it.
        return error if launch.rank < 2 else ReportedElsewhere(code)
    if launch.rank:
        return (
            _prefixed(error, f"rank {launch.rank} on {meeting.host}: ") if everyone is None else ReportedElsewhere(code)
        )
    union = merge_faults([None if entry is None else tuple(entry["place"]) for entry in everyone])
    texts = list(dict.fromkeys(entry["text"] for entry in everyone if entry is not None and entry["text"]))
    if texts:
        return RunError("\n".join([*texts, *map(str, union)]))
    return ConfigError(union)


def _prefixed(error: ConfigError | RunError, prefix: str) -> Exception:
    if isinstance(error, ConfigError):
        return ConfigError(_placed(error.faults, prefix))
    text, rank = str(error), prefix.split(" on ")[0]
    if text.startswith((f"{rank} on ", f"{rank}, ")):
        return error
    return RunError(prefix + text.removeprefix(f"{rank}: "))


def error_without_peers(error: ConfigError | RunError, environ: Mapping[str, str]) -> Exception:
    """What a rank shall raise that has met no other: rank 0 at once, others where nobody else can have said it.

    srun and mpirun give all of a node's ranks the same command and environment, so that the first one speaks of a wrong
    input for all of them; a machine's failure may be one rank's. Other launchers end the ranks that are left once one
    has failed: one that is still there after a moment has found a fault of its own.
    """
    rank = rank_of(environ)
    if not rank:
        return error
    if isinstance(error, ConfigError) and local_rank_of(environ) and launcher_of(environ) in (SRUN, MPIRUN):
        return ReportedElsewhere(EXIT_USER_ERROR)
    time.sleep(_SECONDS_FOR_RANK_0)
    return _prefixed(error, f"rank {rank} on {socket.gethostname()}: ")
