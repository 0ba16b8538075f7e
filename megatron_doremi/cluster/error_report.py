"""One report for all ranks: the errors of all ranks are gathered, and rank 0 reports each once."""

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

# For ranks that may have died, if this one already knows that the run cannot start.
_SECONDS_FOR_OTHERS = 60.0
# For other ranks that fail as well.
_SECONDS_FOR_PEER_ERRORS = 8.0
_SECONDS_FOR_RANK_0 = 5.0


def command_line_error(launch: Launch, argv: Sequence[str], faults: Sequence[Fault]) -> Exception:
    """The error to raise on a rank whose command line is wrong.

    Rank 0 reports it immediately. The other ranks usually have the same command line and exit silently. If rank 0 has
    another command line and waits for them, they send it their faults, which it reports.
    """
    if launch.rank == 0:
        return ConfigError(faults)
    from megatron_doremi.cluster.rendezvous import reject_command_line

    prefixed = _prefix_faults(faults, f"rank {launch.rank} on {socket.gethostname()}: ")
    if reject_command_line(launch, argv, prefixed):
        return ReportedElsewhere(EXIT_USER_ERROR)
    return ConfigError(prefixed)


def raise_faults_of_all_ranks(rendezvous: Rendezvous, faults: Sequence[Fault], seconds: float) -> None:
    """Stops all ranks together if any rank has found a fault; every rank calls it once.

    Args:
        faults: of this rank.
        seconds: to wait for ranks that are still checking their input.

    Raises:
        ConfigError: on rank 0, with the faults of all ranks.
        ReportedElsewhere: on the other ranks.
        RunError: rank 0 does not answer.
    """
    if rendezvous.launch.world_size == 1:
        if faults:
            raise ConfigError(faults)
        return
    report = [rendezvous.host, [asdict(fault) for fault in faults]]
    timeout = min(seconds, _SECONDS_FOR_OTHERS) if faults else seconds
    reports = rendezvous.gather("faults", report, timeout)
    if rendezvous.launch.rank == 0:
        merged = merge_faults(reports)
        rendezvous.reply("faults", len(merged), _others(reports) if merged else 0)
        if merged:
            raise ConfigError(merged)
        return
    count = rendezvous.read_reply("faults")
    if count:
        raise ReportedElsewhere(EXIT_USER_ERROR)
    if count is None:
        if faults:
            raise ConfigError(_prefix_faults(faults, f"rank {rendezvous.launch.rank} on {rendezvous.host}: "))
        raise RunError(
            f"rank {rendezvous.launch.rank} on {rendezvous.host}: rank 0 did not confirm that the run may start"
        )


def _others(reports: Sequence[Any]) -> int:
    """The number of ranks other than rank 0 that have sent a report."""
    return sum(report is not None for report in reports[1:])


def merge_faults(reports: Sequence[tuple[str, list[dict[str, str]]] | None]) -> list[Fault]:
    """Every fault once, in rank order; a fault of only some of the ranks names these ranks.

    Args:
        reports: (host, faults as dictionaries) by rank; None for a rank that sent no report.
    """
    ranks_by_fault: dict[Fault, list[int]] = {}
    reporting = [rank for rank, report in enumerate(reports) if report is not None]
    for rank in reporting:
        for fault in reports[rank][1]:  # type: ignore[index]
            ranks_by_fault.setdefault(Fault(**fault), []).append(rank)
    merged = []
    for fault, ranks in ranks_by_fault.items():
        ranks = sorted(set(ranks))
        prefix = ""
        if ranks != reporting:
            shown_ranks = ", ".join(map(str, ranks[:4])) + (", ..." if len(ranks) > 4 else "")
            hosts = sorted({reports[rank][0] for rank in ranks})  # type: ignore[index]
            shown_hosts = ", ".join(hosts[:4]) + (", ..." if len(hosts) > 4 else "")
            prefix = f"rank{'s' if len(ranks) > 1 else ''} {shown_ranks} on {shown_hosts}: "
        merged += _prefix_faults([fault], prefix)
    return merged


def _prefix_faults(faults: Sequence[Fault], prefix: str) -> list[Fault]:
    return [
        fault if fault.subject.startswith(prefix[:-2]) else replace(fault, subject=prefix + fault.subject)
        for fault in faults
    ]


def merged_error(rendezvous: Rendezvous, error: ConfigError | RunError) -> Exception:
    """The error to raise instead of `error`: rank 0 reports for all ranks that fail together.

    If rank 0 does not fail, each failing rank reports its own error.
    """
    from megatron_doremi.cluster.store import call_with_timeout

    launch = rendezvous.launch
    if launch.world_size == 1:
        return error
    code = EXIT_USER_ERROR if isinstance(error, ConfigError) else 1
    faults = [asdict(fault) for fault in error.faults] if isinstance(error, ConfigError) else []
    report: dict[str, Any] = {"place": [rendezvous.host, faults], "text": "" if faults else str(error)}

    def exchange() -> Any:
        gathered = rendezvous.gather("errors", report, _SECONDS_FOR_PEER_ERRORS)
        if launch.rank:
            return rendezvous.read_reply("errors")
        rendezvous.reply("errors", 1, _others(gathered))
        return gathered

    try:
        # A store whose host is lost does not answer, not even with an error.
        reports = call_with_timeout(exchange, 2 * _SECONDS_FOR_PEER_ERRORS)
    except (RuntimeError, ValueError, TimeoutError):
        # The store is gone, and rank 0 with it.
        return error if launch.rank < 2 else ReportedElsewhere(code)
    if launch.rank:
        if reports is None:
            return _prefix_error(error, f"rank {launch.rank} on {rendezvous.host}: ")
        return ReportedElsewhere(code)
    merged = merge_faults([None if report is None else tuple(report["place"]) for report in reports])
    texts = list(dict.fromkeys(report["text"] for report in reports if report is not None and report["text"]))
    if texts:
        return RunError("\n".join([*texts, *map(str, merged)]))
    return ConfigError(merged)


def _prefix_error(error: ConfigError | RunError, prefix: str) -> Exception:
    if isinstance(error, ConfigError):
        return ConfigError(_prefix_faults(error.faults, prefix))
    text, rank = str(error), prefix.split(" on ")[0]
    if text.startswith((f"{rank} on ", f"{rank}, ")):
        return error
    return RunError(prefix + text.removeprefix(f"{rank}: "))


def error_without_peers(error: ConfigError | RunError, environ: Mapping[str, str]) -> Exception:
    """The error to raise on a rank that has not met its peers: rank 0 reports immediately, others only if necessary.

    srun and mpirun give all ranks of a node the same command and environment, so the first rank of a node reports a
    wrong input for all of them; an error of the machine may concern a single rank. Other launchers end all ranks when
    one fails: a rank that still runs after a few seconds has an error of its own.
    """
    rank = rank_of(environ)
    if not rank:
        return error
    if isinstance(error, ConfigError) and local_rank_of(environ) and launcher_of(environ) in (SRUN, MPIRUN):
        return ReportedElsewhere(EXIT_USER_ERROR)
    time.sleep(_SECONDS_FOR_RANK_0)
    return _prefix_error(error, f"rank {rank} on {socket.gethostname()}: ")
