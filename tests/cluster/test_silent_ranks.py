"""Survivors end soon after a peer falls silent, long before --distributed-timeout-minutes; a busy rank is no such peer.

Run alone: python -m pytest tests/cluster/test_silent_ranks.py
"""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from cluster.test_survival import free_port, lines_in, wait_for
from phases.small import MODEL
from ranks import ROOT, Script

from megatron_doremi.cluster import watchdog
from megatron_doremi.cluster.heartbeat import Heartbeat, current_heartbeat
from megatron_doremi.cluster.launch import Launch
from megatron_doremi.cluster.watchdog import _Peers, next_ranks

# Of silence, in place of 60 s; the timeout of a run without progress stays at 8 minutes.
LIMIT = 6


def start(tmp_path, data, hosts, doing="nothing", seconds=0.0, rank=0, iters=8, flags=()):
    """A run of a rank for each letter of `hosts`; see watched.py. Gives the processes and their logs."""
    port = str(free_port())
    argv = ["--phase", "main", "--domains", str(data), "--save", str(tmp_path / "run"), "--train-iters", str(iters)]
    words = [str(LIMIT), doing, str(seconds), str(rank), hosts, *argv, *MODEL]
    words += ["--global-batch-size", "12", "--log-interval", "1", *flags]
    ranks, logs = [], [tmp_path / f"log.{number}" for number in range(len(hosts))]
    for number, log in enumerate(logs):
        launch = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(len(hosts)), "MASTER_PORT": port}
        variables = {**os.environ, **launch, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        ranks.append(Script(Path(__file__).with_name("watched.py"), words, log, log, variables, ROOT))
    return ranks, logs


def end_all(ranks):
    for process in ranks:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "hosts"),
    [(signal.SIGSTOP, "aaa"), (signal.SIGSTOP, "abc"), (signal.SIGKILL, "aaa"), (signal.SIGKILL, "abc")],
    ids=["stopped", "stopped on a machine of its own", "killed", "killed on a machine of its own"],
)
def test_survivors_end_and_name_the_silent_rank(number, hosts, data, tmp_path):
    ranks, logs = start(tmp_path, data, hosts, iters=100_000)
    try:
        wait_for(lambda: lines_in(tmp_path / "run") >= 2)
        ranks[2].send_signal(number)
        began = time.monotonic()
        codes = [process.wait(60) for process in ranks[:2]]
        took = time.monotonic() - began
        text = "".join(log.read_text() for log in logs[:2])
        assert codes == [1, 1], text
        # The limit, and time for the last one to follow. On another machine's rank they wait for all of the limit, or
        # where their connections break, for three of its heartbeats, of which the limit has twelve (watched.py).
        assert took < LIMIT + 25
        assert took > LIMIT / (2 if number == signal.SIGSTOP else 4) or hosts == "aaa"
        # Ranks whose connections break may find it together.
        assert set(re.findall(r"no heartbeat: (.*?) on ", text)) == {"rank 2"}
        assert "Traceback" not in text
    finally:
        end_all(ranks)


@pytest.mark.slow
def test_ranks_that_end_with_a_failed_one_are_not_named(data, tmp_path):
    """The last stage fails; the middle one ends because it did, which breaks the first one's connection."""
    stages = ["--pipeline-model-parallel-size", "3", "--num-layers", "3"]
    ranks, logs = start(tmp_path, data, "aaa", "fails", rank=2, flags=stages)
    try:
        codes = [process.wait(60) for process in ranks]
        text = "".join(log.read_text() for log in logs)
        assert codes == [1, 1, 1], text
        assert re.findall(r"error: .*", text) == [f"error: rank 2 on {socket.gethostname()}: this rank has failed"]
    finally:
        end_all(ranks)


BUSY = ("python", "released", "held")


@pytest.fixture(scope="module")
def busy_runs(data, tmp_path_factory):
    """{what rank 2 does: folder, ranks and logs}: runs that start together, because they sleep most of the time."""
    folders = {doing: tmp_path_factory.mktemp(doing) for doing in BUSY}
    runs = {
        doing: (folder, *start(folder, data, "abb", doing, 2.5 * LIMIT, rank=2)) for doing, folder in folders.items()
    }
    yield runs
    for _, ranks, _ in runs.values():
        end_all(ranks)


@pytest.mark.slow
@pytest.mark.parametrize("doing", BUSY)
def test_a_busy_rank_is_not_taken_for_dead(doing, busy_runs):
    """Rank 2 is busy for more than twice the limit; rank 1, on its machine, vouches for it where it has to, and rank 0
    on another one believes it."""
    folder, ranks, logs = busy_runs[doing]
    codes = [process.wait(120) for process in ranks]
    text = "".join(log.read_text() for log in logs)
    assert codes == [0, 0, 0], text
    assert "no longer busy" in logs[2].read_text()
    assert lines_in(folder / "run") >= 8


@pytest.mark.parametrize("queued", [True, False], ids=["a heartbeat that waits", "a heartbeat on its way"])
def test_the_last_heartbeat_stays_the_last(queued, monkeypatch):
    """The store answers late: what waited for it while the rank left does not undo that it has left."""
    monkeypatch.setattr(watchdog, "_HEARTBEAT_SECONDS", 0.05)
    store, answers, asked = dist.HashStore(), threading.Event(), threading.Event()
    rendezvous = SimpleNamespace(launch=Launch(0, 1, 0, ""), new_connection=lambda: store, heartbeats={})
    watched = watchdog.Watchdog(rendezvous, 60.0)

    def late(*arguments):
        asked.set()
        assert answers.wait(60)
        return current_heartbeat(*arguments)

    with watched:
        if queued:
            watched._store_thread.submit(answers.wait)
            watched._store_thread.submit(watched._send_heartbeat)
        else:
            monkeypatch.setattr(watchdog, "current_heartbeat", late)
            assert asked.wait(60)
            # While the main thread waits for its own last heartbeat.
            threading.Timer(1.0, answers.set).start()
    answers.set()
    watched._store_thread.submit(int).result(60)
    assert Heartbeat.from_json(store.get("heartbeat/0")).activity == "exited"


def test_a_circle_of_ranks():
    assert next_ranks(2, range(4)) == [3, 0, 1]
    assert next_ranks(0, range(1)) == []
    assert next_ranks(14, range(16)) == [15, *range(7)]
    # Of a machine that holds every third rank.
    assert next_ranks(3, [9, 6, 3, 0]) == [6, 9, 0]


def test_silence_by_hand():
    """A limit of 60 s, looks every 5 s."""
    peers = _Peers(60.0, 5.0)

    def see(beat, now, activity="training"):
        peers.see({7: Heartbeat(beat, 0, activity, "host")}, now)
        return peers.silence(7)

    assert see(1, 100.0) == 0.0
    assert see(1, 130.0) == 30.0
    assert see(2, 135.0) == 0.0
    assert see(2, 200.0) == 65.0
    assert not peers.excuse(7, 0)
    # Vouched for twice: until three more looks.
    assert peers.excuse(7, 2)
    assert see(2, 205.0) == 50.0
    assert see(2, 216.0) == 61.0
    assert not peers.excuse(7, 2)
    assert peers.excuse(7, 3)
    # A heartbeat of its own.
    assert see(3, 220.0) == 0.0
    assert see(3, 300.0, "exited") == 0.0
    peers.forget()
    assert see(3, 500.0) == 0.0
