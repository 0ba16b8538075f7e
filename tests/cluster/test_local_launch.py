"""--nproc-per-node: what the launcher passes on, and the exit code that it takes from its ranks.

Run alone: python -m pytest tests/cluster/test_local_launch.py
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_doremi.cluster.launch import LOCAL, find_launch
from megatron_doremi.cluster.local_launch import exit_code, rank_environment, without_flag

HERE = Path(__file__).resolve().parent
LAUNCHER = """
import os, sys
from megatron_doremi.cluster.local_launch import launch_ranks
from megatron_doremi.cluster.signals import Signals
signals = Signals(os.environ)
signals.install()
sys.exit(launch_ranks([sys.executable, *sys.argv[1:]], 2, os.environ, signals))
"""
# Each rank reports who it is to the listener of rank 0, which every rank can reach.
RANKS = """
import os, socket, sys
rank, environ = int(os.environ["RANK"]), os.environ
if rank == 0:
    listener = socket.socket(fileno=int(environ["MEGATRON_DOREMI_LISTENER"]))
    connection, _ = listener.accept()
    sys.stdout.write(connection.recv(99).decode())
else:
    connection = socket.create_connection((environ["MASTER_ADDR"], int(environ["MASTER_PORT"])))
    connection.sendall(f"rank {rank} of {environ['WORLD_SIZE']}".encode())
    connection.close()
"""


def launch(*command: str) -> subprocess.Popen:
    # Unbuffered, a line and its end are written one after the other, and another rank's may come between.
    left_out = ("RANK", "WORLD_SIZE", "PYTHONUNBUFFERED")
    environ = {name: value for name, value in os.environ.items() if name not in left_out}
    launcher = [sys.executable, "-c", LAUNCHER, *command]
    return subprocess.Popen(launcher, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ)


def test_the_ranks_meet_at_the_listener_that_rank_0_inherits():
    stdout, stderr = (process := launch("-c", RANKS)).communicate(timeout=20)
    assert (process.returncode, stdout, stderr) == (0, "rank 1 of 2", "")


@pytest.mark.parametrize(
    ("codes", "code"),
    [([0, 0], 0), ([3, 3], 3), ([2, 2], 2), ([0, 3], 3), ([2, 3], 2), ([1, 2], 1), ([3, -9], 137), ([1, -15], 143)],
)
def test_the_exit_code_of_a_run(codes, code):
    assert exit_code(codes) == code


def test_a_killed_rank_is_named():
    program = "import os, signal; os.environ['RANK'] == '1' and os.kill(os.getpid(), signal.SIGKILL)"
    stdout, stderr = (process := launch("-c", program)).communicate(timeout=20)
    assert (process.returncode, stdout) == (137, "")
    assert stderr.startswith("error: rank 1 (process ")
    assert stderr.endswith("was killed by SIGKILL; the kernel does so when memory runs out\n")


def test_a_signal_reaches_every_rank_and_a_saved_run_exits_with_3():
    process = launch(str(HERE / "worker.py"), "training", "0.1")
    assert [process.stdout.readline().split()[0] for _ in range(2)] == ["ready", "ready"]
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=20)
    assert (process.returncode, stderr) == (3, "")
    assert sorted(stdout.split()) == ["saved", "saved", "saving", "saving"]


def test_a_rank_that_is_told_to_stop_before_it_catches_signals_has_stopped():
    process = launch("-c", "import time; print('started', flush=True); time.sleep(20)")
    assert [process.stdout.readline().strip() for _ in range(2)] == ["started", "started"]
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[1] == ""
    assert process.returncode == 3


def test_what_a_rank_reads_from_its_environment():
    shared = rank_environment({"OMP_NUM_THREADS": "5", "HOME": "/h"}, 4, 1234)
    assert shared["OMP_NUM_THREADS"] == "5"
    assert int(rank_environment({}, 1 << 20, 1)["OMP_NUM_THREADS"]) == 1
    own = {**shared, "RANK": "0", "LOCAL_RANK": "0", "MEGATRON_DOREMI_LISTENER": "7"}
    found, faults = find_launch(own)
    assert (found.launcher, found.rendezvous, found.listener, faults) == (LOCAL, "tcp://127.0.0.1:1234", 7, [])
    assert found.run_id == shared["MEGATRON_DOREMI_RUN_ID"] != ""


def test_the_ranks_do_not_launch_ranks():
    argv = ["--lr", "1", "--nproc-per-node", "2", "--save", "s"]
    assert without_flag(argv, "--nproc-per-node") == ["--lr", "1", "--save", "s"]
    assert without_flag(["--nproc-per-node=2", "--bf16"], "--nproc-per-node") == ["--bf16"]
