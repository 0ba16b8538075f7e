"""Starts the ranks of a run on one machine: `pretrain_doremi.py --nproc-per-node N`.

torchrun prints a traceback of its own below every message of its workers, and exits with 1 whatever they exit with.
This launcher prints nothing, passes signals on, and exits with its workers' exit code: 2 for a wrong input, 3 for a run
that was stopped and has saved.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
import uuid
from collections.abc import Mapping, Sequence

from megatron_doremi.cluster.launch import LISTENER, RUN_ID
from megatron_doremi.cluster.signals import EXIT_STOPPED, Signals
from megatron_doremi.console import print_stderr
from megatron_doremi.errors import EXIT_USER_ERROR

# From the first failure of a rank until the others, which report it and exit by themselves, are killed.
_SECONDS_FOR_OTHERS = 90.0
_POLL_SECONDS = 0.05


def launch_ranks(command: Sequence[str], ranks: int, environ: Mapping[str, str], signals: Signals) -> int:
    """Starts `ranks` processes of a command and waits for all of them; returns the exit code of the run.

    Args:
        command: executable and arguments, the same for every rank.
        signals: of this process, installed; every stop signal is passed on to the ranks.
    """
    pids: list[int] = []
    received: list[int] = []

    def pass_on(number: int) -> None:
        received.append(number)
        for pid in list(pids):
            _kill(pid, number)

    signals.pass_on = pass_on
    # Bound and listening before any rank starts: no other program can take the port.
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        shared = rank_environment(environ, ranks, listener.getsockname()[1])
        for rank in range(ranks):
            os.set_inheritable(listener.fileno(), rank == 0)
            of_rank = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                LISTENER: str(listener.fileno() if rank == 0 else -1),
            }
            pids.append(os.posix_spawn(command[0], list(command), {**shared, **of_rank}))
    for number in received:
        pass_on(number)
    codes = _wait(pids)
    for pid, code in codes.items():
        if -code in received:
            # It was told to stop before it could catch the signal, so there was nothing to save.
            codes[pid] = EXIT_STOPPED
        elif code < 0:
            print_stderr(f"error: rank {pids.index(pid)} (process {pid}) was killed by {_signal_name(-code)}")
    return exit_code(list(codes.values()))


def rank_environment(environ: Mapping[str, str], ranks: int, port: int) -> dict[str, str]:
    """What all ranks of this machine have in common. They share its cores, unless OMP_NUM_THREADS says otherwise."""
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    return {
        "OMP_NUM_THREADS": str(threads),
        **environ,
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        RUN_ID: uuid.uuid4().hex,
    }


def exit_code(codes: Sequence[int]) -> int:
    """The exit code of a run by those of its ranks, negative where a signal killed one: a failure counts more than a
    wrong input, and that more than a requested stop."""
    failures = [code for code in codes if code not in (0, EXIT_USER_ERROR, EXIT_STOPPED)]
    if failures:
        return max(code if code > 0 else 128 - code for code in failures)
    return next((code for code in (EXIT_USER_ERROR, EXIT_STOPPED) if code in codes), 0)


def without_flag(argv: Sequence[str], flag: str) -> list[str]:
    """The arguments without a flag and its value."""
    kept, skip = [], False
    for word in argv:
        if not (skip or word == flag or word.startswith(f"{flag}=")):
            kept.append(word)
        skip = word == flag
    return kept


def _wait(pids: Sequence[int]) -> dict[int, int]:
    """Waits for all processes; returns their exit codes, negative for signals, in the order in which they ended."""
    codes: dict[int, int] = {}
    deadline = None
    while len(codes) < len(pids):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in pids:
            codes[pid] = os.waitstatus_to_exitcode(status)
            if codes[pid] not in (0, EXIT_STOPPED) and deadline is None:
                deadline = time.monotonic() + _SECONDS_FOR_OTHERS
            continue
        if deadline is not None and time.monotonic() > deadline:
            deadline = None
            for left in set(pids) - codes.keys():
                _kill(left, signal.SIGKILL)
        time.sleep(_POLL_SECONDS)
    return codes


def _kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _signal_name(number: int) -> str:
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    return name + ("; the kernel does so when memory runs out" if number == signal.SIGKILL else "")
