"""pretrain_doremi.py whose watchdog has a short limit of silence, and one rank of which is busy or goes silent.

usage: watched.py LIMIT DOING SECONDS RANK HOSTS FLAGS...

In the third step RANK does DOING for SECONDS: `python` (a loop), `released` or `held` (C code that gives up Python's
lock, or keeps it); or it `fails`, and rank 1 is the first to follow. HOSTS names a machine for each rank, such as
"aab": ranks of other machines see no processes of it.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time

limit, doing, seconds, rank, hosts = sys.argv[1:6]
sys.argv[1:] = sys.argv[6:]
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from megatron_doremi.cluster import error_report, heartbeat, watchdog  # noqa: E402
from megatron_doremi.errors import RunError  # noqa: E402
from megatron_doremi.phases.train import Trainer  # noqa: E402

watchdog.HEARTBEAT_TIMEOUT_SECONDS = float(limit)
watchdog._HEARTBEAT_SECONDS = float(limit) / 12
if doing == "fails":
    watchdog._SECONDS_TO_FOLLOW = 1.0 if os.environ["RANK"] == "1" else 6.0
    error_report._SECONDS_FOR_PEER_ERRORS = 4.0
scope = heartbeat._pid_scope()
heartbeat._pid_scope = lambda: scope + hosts[int(os.environ["RANK"])]
take_step = Trainer._take_step


def busy() -> None:
    end = time.monotonic() + float(seconds)
    if doing == "python":
        while time.monotonic() < end:
            pass
    elif doing == "released":
        ctypes.CDLL(None).sleep(int(float(seconds)))
    elif doing == "held":
        ctypes.PyDLL(None).sleep(int(float(seconds)))


def step(trainer, batch, lr):
    if trainer.iteration == 2 and os.environ["RANK"] == rank:
        if doing == "fails":
            raise RunError("this rank has failed")
        print("busy", flush=True)
        busy()
        print("no longer busy", flush=True)
    return take_step(trainer, batch, lr)


Trainer._take_step = step
from megatron_doremi.errors import run_or_exit  # noqa: E402
from pretrain_doremi import main  # noqa: E402

run_or_exit(main)
