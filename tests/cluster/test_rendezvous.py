"""The rendezvous: foreign runs, names that do not resolve, IPv6, dead ranks, merged reports, number of requests.

Run alone: python -m pytest tests/cluster/test_rendezvous.py
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from megatron_doremi.cluster import error_report, heartbeat, rendezvous, store, watchdog
from megatron_doremi.cluster.error_report import (
    error_without_peers,
    merge_faults,
    merged_error,
    raise_faults_of_all_ranks,
)
from megatron_doremi.cluster.heartbeat import Heartbeat, current_heartbeat, is_dead
from megatron_doremi.cluster.launch import NO_LAUNCHER, SRUN, Launch
from megatron_doremi.cluster.process_identity import process_start
from megatron_doremi.cluster.rendezvous import Rendezvous, reject_command_line
from megatron_doremi.errors import ConfigError, Fault, ReportedElsewhere, RunError


def free_port(family: int = socket.AF_INET, host: str = "127.0.0.1") -> int:
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def on_threads(world_size, function):
    """Calls function(rank) for all ranks concurrently; returns their results, or the exceptions that they raised."""

    def outcome(rank):
        try:
            return function(rank)
        except Exception as error:
            return error

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(outcome, range(world_size)))


def launches(world_size, host="127.0.0.1", port=None, **fields):
    port = port or free_port()
    return [Launch(rank, world_size, rank, f"tcp://{host}:{port}", **fields) for rank in range(world_size)]


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "localhost"])
def test_ranks_meet_at_names_and_addresses_of_both_families(host):
    port = free_port(socket.AF_INET6, "::1") if host == "[::1]" else free_port()
    places = launches(3, host, port)
    met = on_threads(3, lambda rank: Rendezvous(places[rank], 1.0, ["--a"]))
    assert [sorted(rendezvous.heartbeats) for rendezvous in met] == [[0, 1, 2]] * 3


def hang(*_, **__):
    time.sleep(30.0)


def fail(*_, **__):
    raise socket.gaierror(-2, "Name or service not known")


@pytest.mark.parametrize("resolver", [hang, fail])
def test_a_host_that_does_not_resolve_is_named(resolver, monkeypatch):
    """Within a minute, even if the resolver never answers; version 0.1 took --distributed-timeout-minutes."""
    assert store._SECONDS_TO_RESOLVE < 60
    monkeypatch.setattr(store, "_SECONDS_TO_RESOLVE", 0.5)
    monkeypatch.setattr(store.socket, "getaddrinfo", resolver)
    with pytest.raises(ConfigError, match=r"MASTER_ADDR: no\.such\.host\.invalid"):
        Rendezvous(Launch(1, 2, 0, "tcp://no.such.host.invalid:29500"))


def test_a_foreign_program_or_nothing_at_the_port_is_reported(monkeypatch):
    monkeypatch.setattr(store, "_SECONDS_TO_ANSWER", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(RunError, match="does not answer as the rendezvous"):
            Rendezvous(Launch(1, 2, 1, f"tcp://127.0.0.1:{port}"), 0.1)
        with pytest.raises(RunError, match=rf"port {port} of .* is in use: export another MASTER_PORT"):
            Rendezvous(Launch(0, 2, 0, f"tcp://127.0.0.1:{port}"), 0.1)
    with pytest.raises(RunError, match=r"nothing listens .*is rank 0 on that host"):
        Rendezvous(Launch(1, 2, 1, f"tcp://127.0.0.1:{free_port()}"), 0.01)
    with pytest.raises(RunError, match="torchrun, which hosts the rendezvous, is gone"):
        Rendezvous(Launch(1, 2, 1, f"tcp://127.0.0.1:{free_port()}", hosted=True), 0.01)


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        (
            (SRUN, "SLURM job 7 step 0", ["-a"]),
            (SRUN, "SLURM job 8 step 0", ["-a"]),
            "rendezvous of SLURM job 7 step 0",
        ),
        ((SRUN, "SLURM job 7 step 0", ["-a"]), (NO_LAUNCHER, "", ["-a"]), r"of this run \(no id, 2 ranks\)"),
        ((NO_LAUNCHER, "", ["--save", "x"]), (NO_LAUNCHER, "", ["--save", "y"]), "rank 1 on .*: y against x of rank 0"),
    ],
)
def test_the_store_of_another_run_is_detected(theirs, ours, message):
    """Two jobs on a node with the same port: neither hangs, and the other run is not affected."""
    port = free_port()

    def enter(number):
        if number == 1:
            time.sleep(0.5)
        launcher, run_id, argv = ours if number == 1 else theirs
        rank = (0, 1, 1)[number]
        launch = Launch(rank, 2, rank, f"tcp://127.0.0.1:{port}", launcher, run_id)
        if number == 2:
            time.sleep(1.0)
        return Rendezvous(launch, 1.0, argv)

    first, error, second = on_threads(3, enter)
    assert isinstance(error, ConfigError)
    assert re.search(message, str(error))
    assert sorted(first.heartbeats) == sorted(second.heartbeats) == [0, 1]


def test_a_second_process_of_the_same_rank_is_detected():
    url = f"tcp://127.0.0.1:{free_port()}"
    processes = [Launch(rank, 2, rank, url) for rank in (0, 1, 1)]
    outcomes = on_threads(3, lambda number: Rendezvous(processes[number], 0.1))
    assert sum(isinstance(o, RunError) and "a second rank 1 arrived" in str(o) for o in outcomes) == 1


def test_a_restarted_generation_does_not_see_the_keys_of_the_previous_one(monkeypatch):
    """torchrun keeps its store, with all keys of the first generation."""
    hosted = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    url = f"tcp://127.0.0.1:{hosted.port}"
    for generation in (0, 1):
        options = {"run_id": "r", "generation": generation, "hosted": True}
        workers = [Launch(rank, 2, rank, url, "torchrun", **options) for rank in (0, 1)]
        met = on_threads(2, lambda rank, workers=workers: Rendezvous(workers[rank], 0.5, ["-a"]))
        assert [sorted(rendezvous.heartbeats) for rendezvous in met] == [[0, 1], [0, 1]]


def test_only_processes_of_this_machine_can_be_seen_to_be_dead():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    local = current_heartbeat(1, 1, "in iteration 3")
    start = process_start(process.pid)
    peer = Heartbeat(1, 1, "in iteration 3", local.host, (process.pid, start), local.pid_scope)
    assert not is_dead(local)
    assert not is_dead(peer)
    process.kill()
    # Not reaped yet: a zombie counts as dead.
    deadline = time.monotonic() + 10
    while not is_dead(peer):
        assert time.monotonic() < deadline
    assert not is_dead(Heartbeat(1, 1, "exited", local.host, (process.pid, start), local.pid_scope))
    assert not is_dead(Heartbeat(1, 1, "in iteration 3", "elsewhere", (process.pid, start), "another boot"))
    process.wait()


def test_a_rank_that_dies_before_all_have_met_ends_the_wait(monkeypatch):
    monkeypatch.setattr(rendezvous, "_POLL_SECONDS", 0.2)
    places = launches(3)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()

    def enter(rank):
        if rank == 0:
            return Rendezvous(places[0], 1.0)
        # Rank 1 arrives and dies; rank 2 never arrives.
        if rank == 1:
            local = current_heartbeat(0, 0, "starting")
            arrive_and_die(places[1], Heartbeat(0, 0, "starting", local.host, (dead.pid, 1), local.pid_scope))

    outcome = on_threads(3, enter)[0]
    assert isinstance(outcome, RunError)
    assert "rank 1 on" in str(outcome)
    assert "died before all ranks had met" in str(outcome)


def on_machines(monkeypatch, poll_seconds=0.2):
    """Makes ranks poll quickly; returns a function that places the calling thread on the machine of a name."""
    machine = threading.local()
    monkeypatch.setattr(heartbeat, "_pid_scope", lambda: f"machine {machine.name}")
    monkeypatch.setattr(rendezvous, "_POLL_SECONDS", poll_seconds)
    monkeypatch.setattr(rendezvous, "_LONGEST_PAUSE", poll_seconds)
    return lambda name: setattr(machine, "name", name)


def arrive_and_die(launch, heartbeat):
    """Writes the keys of a rank that arrives and then dies."""
    keys = dist.PrefixStore(f"doremi/0/{launch.world_size}", store.open_store(launch, 10.0))
    keys.set(f"heartbeat/{launch.rank}", heartbeat.to_json())
    keys.append("arrivals", f"{launch.rank}@{rendezvous._machine_id(heartbeat)},")


def test_a_death_before_all_have_met_ends_the_ranks_of_other_machines_too(monkeypatch):
    """A rank on the same machine detects it; before, the others waited for --distributed-timeout-minutes."""
    move_to = on_machines(monkeypatch)
    places = launches(5)

    def enter(rank):
        move_to("a" if rank in (0, 3) else "b")
        if rank == 2:
            local = current_heartbeat(0, 0, "starting")
            process = (local.process[0], local.process[1] + 1)
            arrive_and_die(places[2], Heartbeat(0, 0, "starting", "host-b", process, local.pid_scope))
        # Rank 4 never arrives.
        elif rank != 4:
            return Rendezvous(places[rank], 0.5)

    error, *others = on_threads(5, enter)
    assert isinstance(error, RunError)
    assert str(error) == "rank 2 on host-b died before all ranks had met"
    assert [type(others[k]) for k in (0, 2)] == [ReportedElsewhere] * 2


def test_a_machine_that_is_lost_before_all_have_met_is_detected_by_missing_heartbeats(monkeypatch):
    monkeypatch.setattr(rendezvous, "HEARTBEAT_TIMEOUT_SECONDS", 2.0)
    move_to = on_machines(monkeypatch)
    places = launches(4)

    def enter(rank):
        move_to(str(rank))
        if rank == 1:
            arrive_and_die(places[1], Heartbeat(0, 0, "starting", "host-1", (1, 1), "machine 1"))
        # Rank 3 never arrives; rank 2 sends heartbeats.
        elif rank != 3:
            return Rendezvous(places[rank], 0.5)

    error, _, peer_error, _ = on_threads(4, enter)
    assert isinstance(error, RunError)
    assert str(error) == "rank 1 on host-1 sent no heartbeat for 2 s before all ranks had met"
    assert isinstance(peer_error, ReportedElsewhere)


FLAG_FAULT, FILE_FAULT = Fault("--lr", "fast", "a number", "give one"), Fault("x.bin", "4 bytes", "8", "copy it again")


def test_the_faults_of_all_ranks_are_merged():
    reports = [("n1", [FLAG_FAULT.__dict__]), ("n2", [FLAG_FAULT.__dict__, FILE_FAULT.__dict__]), None]
    assert [fault.subject for fault in merge_faults(reports)] == ["--lr", "rank 1 on n2: x.bin"]


def test_rank_0_reports_the_faults_of_all_ranks_and_all_exit_together():
    places = launches(3, launcher=SRUN, run_id="SLURM job 1 step 0")

    def enter(rank):
        rendezvous = Rendezvous(places[rank], 1.0, ["-a"] if rank < 2 else ["-b"])
        raise_faults_of_all_ranks(rendezvous, [*([FILE_FAULT] if rank == 1 else []), *rendezvous.faults], 10.0)

    error, *others = on_threads(3, enter)
    assert isinstance(error, ConfigError)
    assert [type(other) for other in others] == [ReportedElsewhere, ReportedElsewhere]
    assert {fault.subject.split(" on ")[0] for fault in error.faults} >= {"rank 1"}
    assert any("x.bin" in fault.subject for fault in error.faults)
    assert any("the same command line" in fault.rule for fault in error.faults)


def test_rank_0_reports_a_rank_whose_command_line_is_wrong(monkeypatch):
    """A rank of another run is not reported."""
    monkeypatch.setattr(rendezvous, "_POLL_SECONDS", 0.2)
    monkeypatch.setattr(rendezvous, "_SECONDS_FOR_MORE_REJECTIONS", 0.2)
    monkeypatch.setattr(rendezvous, "_SECONDS_TO_REJECT", 1.0)
    ours = launches(3, launcher=SRUN, run_id="SLURM job 1 step 0")
    foreign = Launch(2, 3, 2, ours[0].rendezvous, SRUN, "SLURM job 2 step 0")

    def enter(rank):
        if rank == 2:
            time.sleep(0.5)
            return (
                reject_command_line(foreign, ["-b"], [FILE_FAULT]),
                reject_command_line(ours[2], ["-b"], [FLAG_FAULT]),
            )
        return Rendezvous(ours[rank], 1.0, ["-a"])

    error, peer_error, reported = on_threads(3, enter)
    assert isinstance(error, ConfigError)
    assert error.faults == (FLAG_FAULT,)
    assert isinstance(peer_error, ReportedElsewhere)
    assert reported == (False, True)
    # Nothing listens: rank 0 has reported the same fault and exited.
    assert reject_command_line(launches(2)[1], [], [FLAG_FAULT])


def test_rank_0_reports_an_error_of_all_ranks_and_a_single_rank_its_own(monkeypatch):
    monkeypatch.setattr(error_report, "_SECONDS_FOR_PEER_ERRORS", 1.0)
    places = launches(2)
    met = on_threads(2, lambda rank: Rendezvous(places[rank], 1.0))
    same = on_threads(2, lambda rank: merged_error(met[rank], RunError("the disk is full")))
    assert (str(same[0]), type(same[1])) == ("the disk is full", ReportedElsewhere)
    places = launches(2)
    met = on_threads(2, lambda rank: Rendezvous(places[rank], 1.0))
    alone = merged_error(met[1], RunError("the disk is full"))
    assert re.fullmatch(r"rank 1 on \S+: the disk is full", str(alone))


def test_rank_0_does_not_end_before_its_reply_is_read(monkeypatch):
    """Otherwise the store is gone when a slow rank looks for the reply, and the same error is printed twice."""
    places = launches(2)
    met = on_threads(2, lambda rank: Rendezvous(places[rank], 1.0))
    seconds = []

    def slow_read(name, read=met[1].read_reply):
        time.sleep(0.5)
        return read(name)

    monkeypatch.setattr(met[1], "read_reply", slow_read)

    def report(rank):
        start = time.monotonic()
        error = merged_error(met[rank], RunError("the disk is full"))
        seconds.append((time.monotonic() - start, rank))
        return error

    results = on_threads(2, report)
    assert isinstance(results[1], ReportedElsewhere)
    assert min(seconds)[0] >= 0.5, seconds


def test_a_rank_without_peers_reports_machine_errors_and_the_first_of_a_node_also_faults(monkeypatch):
    """srun gives all ranks of a node the same flags; a RunError may concern one rank: that of local rank 3 was lost."""
    monkeypatch.setattr(error_report, "_SECONDS_FOR_RANK_0", 0.0)
    environ = {"SLURM_STEP_NUM_TASKS": "32", "SLURM_PROCID": "11", "SLURM_LOCALID": "3"}
    for text in ("no answer", "rank 11: no answer", f"rank 11 on {socket.gethostname()}: no answer"):
        error = error_without_peers(RunError(text), environ)
        assert isinstance(error, RunError)
        assert str(error) == f"rank 11 on {socket.gethostname()}: no answer"
    error = error_without_peers(RunError("rank 110 on n1 died"), environ)
    assert str(error) == f"rank 11 on {socket.gethostname()}: rank 110 on n1 died"
    assert isinstance(error_without_peers(ConfigError(FLAG_FAULT), environ), ReportedElsewhere)
    assert isinstance(error_without_peers(ConfigError(FLAG_FAULT), {**environ, "SLURM_LOCALID": "0"}), ConfigError)


class CountingStore:
    """A store in memory that counts requests and the keys in them."""

    def __init__(self, shared, prefix=""):
        self.shared, self.prefix = shared, prefix

    def _do(self, name, keys, work):
        with self.shared["lock"]:
            self.shared["requests"][name] += 1
            self.shared["keys"][name] += keys
            return work(self.shared["data"])

    def set_timeout(self, timeout):
        pass

    def has_extended_api(self):
        return True

    def clone(self):
        return self

    def set(self, key, value):
        self._do("set", 1, lambda d: d.__setitem__(self.prefix + key, value.encode()))

    def get(self, key):
        return self._do("get", 1, lambda d: d[self.prefix + key])

    def multi_get(self, keys):
        return self._do("multi_get", len(keys), lambda d: [d[self.prefix + key] for key in keys])

    def check(self, keys):
        return self._do("check", len(keys), lambda d: all(self.prefix + key in d for key in keys))

    def add(self, key, number):
        def work(d):
            d[self.prefix + key] = str(int(d.get(self.prefix + key, b"0")) + number).encode()
            return int(d[self.prefix + key])

        return self._do("add", 1, work)

    def append(self, key, value):
        self._do(
            "append", 1, lambda d: d.__setitem__(self.prefix + key, d.get(self.prefix + key, b"") + value.encode())
        )

    def compare_set(self, key, expected, value):
        return self._do("compare_set", 1, lambda d: d.setdefault(self.prefix + key, value.encode()))


@pytest.fixture
def counted(monkeypatch):
    shared = {"lock": threading.Lock(), "data": {}, "requests": Counter(), "keys": Counter()}
    monkeypatch.setattr(rendezvous, "open_store", lambda launch, timeout: CountingStore(shared))
    monkeypatch.setattr(
        rendezvous.dist, "PrefixStore", lambda name, base: CountingStore(shared, f"{base.prefix}{name}/")
    )
    return shared


def test_512_ranks_meet_and_watch_with_a_few_requests_each(counted, monkeypatch):
    """In version 0.1 each rank waited for 512 keys one by one, and read 1024 keys per heartbeat while it waited."""
    world = 512
    machine = threading.local()
    monkeypatch.setattr(heartbeat, "_pid_scope", lambda: f"machine {machine.number}")

    def enter(rank):
        machine.number = rank // 8
        return Rendezvous(Launch(rank, world, rank % 8, "tcp://n:1", SRUN, "r"), 1.0, ["-a"])

    met = on_threads(world, enter)
    assert all(len(rendezvous.heartbeats) == 8 for rendezvous in met)
    assert sum(counted["requests"].values()) <= 30 * world
    assert sum(counted["keys"].values()) <= 60 * world
    counted["requests"].clear()
    counted["keys"].clear()
    monkeypatch.setattr(heartbeat, "_pid_scope", lambda: "")
    monkeypatch.setattr(watchdog, "_HEARTBEAT_SECONDS", 3600.0)
    dogs = [watchdog.Watchdog(rendezvous, 8 * 3600.0) for rendezvous in met[:64]]
    for dog in dogs:
        dog._send_heartbeat()
        dog._follow_exit(dog._announced_exit())
        dog._exit_if_a_peer_died()
    assert sum(counted["requests"].values()) <= 3 * len(dogs)
    assert sum(counted["keys"].values()) <= (2 + watchdog.WATCHED_RANKS) * len(dogs)
    counted["requests"].clear()
    assert len(dogs[0]._read_all()) == world
    assert sum(counted["requests"].values()) == 1
    for dog in dogs:
        dog._stopped.set()


def test_a_store_that_never_answers_blocks_no_rank(counted, monkeypatch):
    """If rank 0's machine is lost, the store does not even return an error, neither at the rendezvous nor later."""
    places = [Launch(rank, 2, rank, "tcp://n:1") for rank in range(2)]
    met = on_threads(2, lambda rank: Rendezvous(places[rank], 1.0))
    monkeypatch.setattr(rendezvous, "HEARTBEAT_TIMEOUT_SECONDS", 0.3)
    monkeypatch.setattr(error_report, "_SECONDS_FOR_PEER_ERRORS", 0.3)
    monkeypatch.setattr(CountingStore, "check", hang)
    counted["data"].clear()
    start = time.monotonic()
    with pytest.raises(RunError, match=r"rendezvous at tcp://n:1 does not answer \(no answer for 0\.3 s\)"):
        Rendezvous(Launch(0, 3, 0, "tcp://n:1"), 1.0)
    error = RunError("the disk is full")
    assert merged_error(met[1], error) is error
    assert time.monotonic() - start < 10.0


def test_ten_missing_ranks_cost_one_timeout_and_are_named(counted, monkeypatch):
    monkeypatch.setattr(rendezvous, "_POLL_SECONDS", 0.2)
    start = time.monotonic()
    outcomes = on_threads(22, lambda rank: Rendezvous(Launch(rank, 32, rank, "tcp://n:1"), 0.01))
    assert all(isinstance(outcome, RunError) for outcome in outcomes)
    assert str(list(range(22, 32))) in str(outcomes[0])
    assert time.monotonic() - start < 5.0


@pytest.mark.parametrize("machine", ["", "this one"])
def test_a_rank_without_heartbeats_is_detected_by_the_ranks_before_it(machine, counted, monkeypatch):
    """60 s after its last heartbeat, whatever --distributed-timeout-minutes is; not a rank that exited on purpose, nor
    one on this machine whose process is seen to live."""
    world = 32
    monkeypatch.setattr(heartbeat, "_pid_scope", lambda: machine)
    met = on_threads(world, lambda rank: Rendezvous(Launch(rank, world, rank, "tcp://n:1"), 1.0))
    clock = [1000.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock[0])
    ended = []
    dog = watchdog.Watchdog(met[3], 480.0)
    monkeypatch.setattr(dog, "_end_process", ended.append)
    counted["data"]["doremi/0/32/heartbeat/6"] = current_heartbeat(7, 1, "exited").to_json().encode()
    for beat in range(14):
        for rank in (4, 5, 7, 8, 9, 10):
            counted["data"][f"doremi/0/32/heartbeat/{rank}"] = (
                current_heartbeat(beat + 10, 1, "in iteration 5").to_json().encode()
            )
        dog._exit_if_a_peer_died()
        clock[0] += 5.0
    assert len(ended) == (0 if machine else 1)
    assert machine or ended[0].startswith("no heartbeat: rank 11 on")
    dog._stopped.set()
