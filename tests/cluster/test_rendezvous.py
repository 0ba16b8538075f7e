"""Where ranks meet: strangers, names that do not resolve, IPv6, the dead, one report of all faults, number of requests.

Run alone: python -m pytest tests/cluster/test_rendezvous.py
"""

from __future__ import annotations

import json
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
    with socket.socket(family) as found:
        found.bind((host, 0))
        return found.getsockname()[1]


def on_threads(world_size, function):
    """function(rank) on all ranks at once: its results, or what it raised."""

    def outcome(rank):
        try:
            return function(rank)
        except Exception as error:
            return error

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(outcome, range(world_size)))


def launches(world_size, host="127.0.0.1", port=None, **entries):
    port = port or free_port()
    return [Launch(rank, world_size, rank, f"tcp://{host}:{port}", **entries) for rank in range(world_size)]


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "localhost"])
def test_ranks_meet_by_names_and_both_kinds_of_addresses(host):
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
    """Within a minute, also where the resolver never answers; version 0.1 took --distributed-timeout-minutes."""
    assert store._SECONDS_TO_RESOLVE < 60
    monkeypatch.setattr(store, "_SECONDS_TO_RESOLVE", 0.5)
    monkeypatch.setattr(store.socket, "getaddrinfo", resolver)
    with pytest.raises(ConfigError, match=r"MASTER_ADDR: no\.such\.host\.invalid"):
        Rendezvous(Launch(1, 2, 0, "tcp://no.such.host.invalid:29500"))


def test_who_listens_is_told_from_a_rendezvous(monkeypatch):
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
    ("theirs", "ours", "words"),
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
def test_the_store_of_a_strangers_run_is_noticed(theirs, ours, words):
    """Two jobs on a node with one port: neither hangs, and the other run is left alone."""
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

    first, stranger, second = on_threads(3, enter)
    assert isinstance(stranger, ConfigError)
    assert re.search(words, str(stranger))
    assert sorted(first.heartbeats) == sorted(second.heartbeats) == [0, 1]


def test_a_second_process_of_a_rank_is_noticed():
    port = free_port()
    place = f"tcp://127.0.0.1:{port}"
    two = [Launch(rank, 2, rank, place) for rank in (0, 0, 1)]
    two[1] = Launch(1, 2, 1, place)
    outcomes = on_threads(3, lambda number: Rendezvous(two[number], 0.1))
    assert sum(isinstance(o, RunError) and "a second rank 1 arrived" in str(o) for o in outcomes) == 1


def test_a_restarted_generation_does_not_meet_the_one_before(monkeypatch):
    """torchrun keeps its store: all keys of the first generation are still there."""
    hosted = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    place = f"tcp://127.0.0.1:{hosted.port}"
    for generation in (0, 1):
        options = {"run_id": "r", "generation": generation, "hosted": True}
        workers = [Launch(rank, 2, rank, place, "torchrun", **options) for rank in (0, 1)]
        met = on_threads(2, lambda rank, workers=workers: Rendezvous(workers[rank], 0.5, ["-a"]))
        assert [sorted(rendezvous.heartbeats) for rendezvous in met] == [[0, 1], [0, 1]]


def test_the_dead_are_seen_on_this_machine_only():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    own = current_heartbeat(1, 1, "in iteration 3")
    start = process_start(process.pid)
    peer = Heartbeat(1, 1, "in iteration 3", own.host, (process.pid, start), own.pid_scope)
    assert not is_dead(own)
    assert not is_dead(peer)
    process.kill()
    # Not waited for yet: a zombie is dead.
    limit = time.monotonic() + 10
    while not is_dead(peer):
        assert time.monotonic() < limit
    assert not is_dead(Heartbeat(1, 1, "exited", own.host, (process.pid, start), own.pid_scope))
    assert not is_dead(Heartbeat(1, 1, "in iteration 3", "elsewhere", (process.pid, start), "another boot"))
    process.wait()


def test_a_rank_that_dies_before_all_have_met_ends_the_wait(monkeypatch):
    monkeypatch.setattr(rendezvous, "_POLL_SECONDS", 0.2)
    places = launches(3)
    died = subprocess.Popen([sys.executable, "-c", ""])
    died.wait()

    def enter(rank):
        if rank == 0:
            return Rendezvous(places[0], 1.0)
        # Comes, and is gone; rank 2 never comes.
        if rank == 1:
            keys = dist.PrefixStore("doremi/0/3", store.open_store(places[1], 10.0))
            own = current_heartbeat(0, 0, "starting")
            keys.set("heartbeat/1", Heartbeat(0, 0, "starting", own.host, (died.pid, 1), own.pid_scope).to_json())
            keys.append("arrivals", f"1@{rendezvous._machine_id(own)},")

    outcome = on_threads(3, enter)[0]
    assert isinstance(outcome, RunError)
    assert "rank 1 on" in str(outcome)
    assert "died before all ranks had met" in str(outcome)


def on_machines(monkeypatch, quick=0.2):
    """A function that puts the calling thread on a machine of this name; looks follow each other quickly."""
    machine = threading.local()
    monkeypatch.setattr(heartbeat, "_pid_scope", lambda: f"machine {machine.name}")
    monkeypatch.setattr(rendezvous, "_POLL_SECONDS", quick)
    monkeypatch.setattr(rendezvous, "_LONGEST_PAUSE", quick)
    return lambda name: setattr(machine, "name", name)


def come(launch, heartbeat):
    """What a rank leaves that came and then died."""
    keys = dist.PrefixStore(f"doremi/0/{launch.world_size}", store.open_store(launch, 10.0))
    keys.set(f"heartbeat/{launch.rank}", heartbeat.to_json())
    keys.append("arrivals", f"{launch.rank}@{rendezvous._machine_id(heartbeat)},")


def test_a_death_before_all_have_met_ends_the_ranks_of_other_machines_too(monkeypatch):
    """Found out by a rank beside the dead one; the others waited for --distributed-timeout-minutes."""
    move = on_machines(monkeypatch)
    places = launches(5)

    def enter(rank):
        move("a" if rank in (0, 3) else "b")
        if rank == 2:
            own = current_heartbeat(0, 0, "starting")
            come(places[2], Heartbeat(0, 0, "starting", "host-b", (own.process[0], own.process[1] + 1), own.pid_scope))
        # Rank 4 never comes.
        elif rank != 4:
            return Rendezvous(places[rank], 0.5)

    said, *others = on_threads(5, enter)
    assert isinstance(said, RunError)
    assert str(said) == "rank 2 on host-b died before all ranks had met"
    assert [type(others[k]) for k in (0, 2)] == [ReportedElsewhere] * 2


def test_a_machine_that_is_lost_before_all_have_met_is_found_by_its_silence(monkeypatch):
    monkeypatch.setattr(rendezvous, "HEARTBEAT_TIMEOUT_SECONDS", 2.0)
    move = on_machines(monkeypatch)
    places = launches(4)

    def enter(rank):
        move(str(rank))
        if rank == 1:
            come(places[1], Heartbeat(0, 0, "starting", "host-1", (1, 1), "machine 1"))
        # Rank 3 never comes; rank 2 gives heartbeats of life.
        elif rank != 3:
            return Rendezvous(places[rank], 0.5)

    said, _, silent, _ = on_threads(4, enter)
    assert isinstance(said, RunError)
    assert str(said) == "rank 1 on host-1 sent no heartbeat for 2 s before all ranks had met"
    assert isinstance(silent, ReportedElsewhere)


BAD, WORSE = Fault("--lr", "fast", "a number", "give one"), Fault("x.bin", "4 bytes", "8", "copy it again")


def test_faults_of_all_ranks_are_one_message():
    everyone = [("n1", [BAD.__dict__]), ("n2", [BAD.__dict__, WORSE.__dict__]), None]
    assert [fault.subject for fault in merge_faults(everyone)] == ["--lr", "rank 1 on n2: x.bin"]


def test_rank_0_says_the_union_and_all_leave_together():
    places = launches(3)

    def enter(rank):
        rendezvous = Rendezvous(places[rank], 1.0, ["-a"] if rank < 2 else ["-b"])
        raise_faults_of_all_ranks(rendezvous, [*([WORSE] if rank == 1 else []), *rendezvous.faults], 10.0)

    places = [Launch(p.rank, 3, p.rank, p.rendezvous, SRUN, "SLURM job 1 step 0") for p in places]
    said, *others = on_threads(3, enter)
    assert isinstance(said, ConfigError)
    assert [type(other) for other in others] == [ReportedElsewhere, ReportedElsewhere]
    assert {fault.subject.split(" on ")[0] for fault in said.faults} >= {"rank 1"}
    assert any("x.bin" in fault.subject for fault in said.faults)
    assert any("the same command line" in fault.rule for fault in said.faults)


def test_a_rank_whose_command_line_is_wrong_is_said_by_rank_0(monkeypatch):
    """Alone among others; of a run that is not its own it keeps away."""
    monkeypatch.setattr(rendezvous, "_POLL_SECONDS", 0.2)
    monkeypatch.setattr(rendezvous, "_SECONDS_FOR_MORE_REJECTIONS", 0.2)
    monkeypatch.setattr(rendezvous, "_SECONDS_TO_REJECT", 1.0)
    ours = launches(3, launcher=SRUN, run_id="SLURM job 1 step 0")
    stranger = Launch(2, 3, 2, ours[0].rendezvous, SRUN, "SLURM job 2 step 0")

    def enter(rank):
        if rank == 2:
            time.sleep(0.5)
            return reject_command_line(stranger, ["-b"], [WORSE]), reject_command_line(ours[2], ["-b"], [BAD])
        return Rendezvous(ours[rank], 1.0, ["-a"])

    said, silent, told = on_threads(3, enter)
    assert isinstance(said, ConfigError)
    assert said.faults == (BAD,)
    assert isinstance(silent, ReportedElsewhere)
    assert told == (False, True)
    # Nobody listens: rank 0 has said the same, and left.
    assert reject_command_line(launches(2)[1], [], [BAD])


def test_an_error_of_all_ranks_is_said_once_and_one_of_a_single_rank_by_itself(monkeypatch):
    monkeypatch.setattr(error_report, "_SECONDS_FOR_PEER_ERRORS", 1.0)
    places = launches(2)
    met = on_threads(2, lambda rank: Rendezvous(places[rank], 1.0))
    same = on_threads(2, lambda rank: merged_error(met[rank], RunError("the disk is full")))
    assert (str(same[0]), type(same[1])) == ("the disk is full", ReportedElsewhere)
    places = launches(2)
    met = on_threads(2, lambda rank: Rendezvous(places[rank], 1.0))
    alone = merged_error(met[1], RunError("the disk is full"))
    assert re.fullmatch(r"rank 1 on \S+: the disk is full", str(alone))


def test_a_machines_failure_of_a_rank_alone_is_said_and_a_shared_command_lines_fault_once(monkeypatch):
    """srun gives a node's ranks the same flags, but not the same network: a RunError of local rank 3 was silent."""
    monkeypatch.setattr(error_report, "_SECONDS_FOR_RANK_0", 0.0)
    environ = {"SLURM_STEP_NUM_TASKS": "32", "SLURM_PROCID": "11", "SLURM_LOCALID": "3"}
    for text in ("no answer", "rank 11: no answer", f"rank 11 on {socket.gethostname()}: no answer"):
        told = error_without_peers(RunError(text), environ)
        assert isinstance(told, RunError)
        assert str(told) == f"rank 11 on {socket.gethostname()}: no answer"
    told = error_without_peers(RunError("rank 110 on n1 died"), environ)
    assert str(told) == f"rank 11 on {socket.gethostname()}: rank 110 on n1 died"
    assert isinstance(error_without_peers(ConfigError(BAD), environ), ReportedElsewhere)
    assert isinstance(error_without_peers(ConfigError(BAD), {**environ, "SLURM_LOCALID": "0"}), ConfigError)


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
    """Version 0.1: each rank waited for 512 keys one by one, and read 1024 keys a beat once it had to wait."""
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
        dog._exit_if_a_peer_died({})
    assert sum(counted["requests"].values()) <= 3 * len(dogs)
    assert sum(counted["keys"].values()) <= (2 + watchdog.WATCHED_RANKS) * len(dogs)
    counted["requests"].clear()
    assert len(dogs[0]._read_all()) == world
    assert sum(counted["requests"].values()) == 1
    for dog in dogs:
        dog._stopped.set()


def test_a_store_that_answers_nothing_holds_nobody(counted, monkeypatch):
    """As where rank 0's machine is lost: not even an error comes, before all have met or at an error's end."""
    places = [Launch(rank, 2, rank, "tcp://n:1") for rank in range(2)]
    met = on_threads(2, lambda rank: Rendezvous(places[rank], 1.0))
    monkeypatch.setattr(rendezvous, "HEARTBEAT_TIMEOUT_SECONDS", 0.3)
    monkeypatch.setattr(error_report, "_SECONDS_FOR_PEER_ERRORS", 0.3)
    monkeypatch.setattr(CountingStore, "check", hang)
    counted["data"].clear()
    began = time.monotonic()
    with pytest.raises(RunError, match=r"rendezvous at tcp://n:1 does not answer \(no answer for 0\.3 s\)"):
        Rendezvous(Launch(0, 3, 0, "tcp://n:1"), 1.0)
    error = RunError("the disk is full")
    assert merged_error(met[1], error) is error
    assert time.monotonic() - began < 10.0


def test_missing_ranks_are_waited_for_together(counted, monkeypatch):
    """Ten that never come cost one timeout, not ten, and are named."""
    monkeypatch.setattr(rendezvous, "_POLL_SECONDS", 0.2)
    began = time.monotonic()
    outcomes = on_threads(22, lambda rank: Rendezvous(Launch(rank, 32, rank, "tcp://n:1"), 0.01))
    assert all(isinstance(outcome, RunError) for outcome in outcomes)
    assert str(list(range(22, 32))) in str(outcomes[0])
    assert time.monotonic() - began < 5.0


def test_a_silent_rank_is_found_by_those_before_it(counted, monkeypatch):
    """60 s after its last heartbeat, whatever --distributed-timeout-minutes; not one that exited on purpose."""
    world = 32
    met = on_threads(world, lambda rank: Rendezvous(Launch(rank, world, rank, "tcp://n:1"), 1.0))
    clock = [1000.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock[0])
    ended = []
    dog = watchdog.Watchdog(met[3], 480.0)
    monkeypatch.setattr(dog, "_end_process", ended.append)
    last_beats: dict = {}
    left = json.dumps({**json.loads(current_heartbeat(7, 1, "exited").to_json())}).encode()
    counted["data"]["doremi/0/32/heartbeat/6"] = left
    for beat in range(14):
        for rank in (4, 5, 7, 8, 9, 10):
            counted["data"][f"doremi/0/32/heartbeat/{rank}"] = (
                current_heartbeat(beat + 10, 1, "in iteration 5").to_json().encode()
            )
        dog._exit_if_a_peer_died(last_beats)
        clock[0] += 5.0
    assert len(ended) == 1
    assert ended[0].startswith("no heartbeat: rank 11 on")
    dog._stopped.set()
