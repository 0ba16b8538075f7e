"""One run per folder: the lock, which exactly one process takes over from a dead one.

Run alone: python -m pytest tests/cluster/test_run_lock.py
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from cluster.test_survival import lines_in, wait_for
from phases.small import MODEL, train
from ranks import on_ranks, program, start_ranks

from megatron_doremi.cluster.lock_holder import Holder, is_dead, this_process
from megatron_doremi.cluster.process_identity import process_start
from megatron_doremi.cluster.run_lock import RunLock
from megatron_doremi.errors import ConfigError, RunError

CONTENDERS = 12
ROUNDS = 4 * int(os.environ.get("MEGATRON_DOREMI_FUZZ", "1"))
QUICK = {"interval": 0.05, "timeout": 0.5, "poll": 0.1}
_CONTEXT = multiprocessing.get_context("forkserver")


def files(save: Path) -> list[Path]:
    return sorted((save / ".lock").glob("run-*.json"))


def edit(path: Path, **changes) -> None:
    """Changes a lock file but keeps its modification time."""
    before = path.stat()
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def fail_if_waiting() -> None:
    raise AssertionError("the lock should be taken without waiting")


def test_the_running_holder_is_named_and_a_released_lock_is_free(tmp_path):
    environ = {"SLURM_JOB_ID": "41", "SLURM_STEP_ID": "2"}
    with RunLock(tmp_path, environ, **QUICK):
        with pytest.raises(ConfigError) as caught:
            RunLock(tmp_path, {}, **QUICK)
        (fault,) = caught.value.faults
        host = os.uname().nodename
        assert fault.value == f"in use by process {os.getpid()} on host {host}, SLURM job 41 step 2"
        # A lock of another name is independent.
        RunLock(tmp_path, {}, "shard-3", **QUICK).release()
    with RunLock(tmp_path, {}, progress=fail_if_waiting) as lock:
        lock.check()
    assert [path.name for path in files(tmp_path)] == ["run-0000002.json"]


def die_holding(folder: str) -> None:
    RunLock(Path(folder), {})
    os._exit(0)


def dead_holder_file(save: Path) -> Path:
    """The lock file of a process that died without releasing the lock."""
    process = _CONTEXT.Process(target=die_holding, args=(str(save),))
    process.start()
    process.join()
    return files(save)[-1]


def test_a_dead_holder_on_this_host_is_detected_immediately(tmp_path):
    dead_holder_file(tmp_path)
    RunLock(tmp_path, {}, progress=fail_if_waiting).release()
    # A process with the same id that started at another time.
    edit(dead_holder_file(tmp_path), pid=os.getpid())
    RunLock(tmp_path, {}, progress=fail_if_waiting).release()


def test_which_holders_are_dead():
    reader = this_process({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"})
    remote = reader.model_copy(update={"host": "other", "boot": "b"})
    assert is_dead(reader, reader) is False
    assert is_dead(reader.model_copy(update={"started": reader.started + 1}), reader) is True
    assert is_dead(remote, reader) is None
    assert is_dead(reader.model_copy(update={"pid_namespace": "pid:[1]", "pid": 1}), reader) is None
    # An earlier start of the reader's requeued job has ended, on whatever host it ran.
    assert is_dead(remote.model_copy(update={"restart": 0}), reader) is True
    assert is_dead(remote.model_copy(update={"restart": 0, "job": "8"}), reader) is None
    assert process_start(os.getpid()) == reader.started > 0


def test_a_zombie_is_dead():
    child = subprocess.Popen([sys.executable, "-c", ""])
    # The child ends and is not yet reaped.
    deadline = time.monotonic() + 30.0
    while process_start(child.pid) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child.wait()


@pytest.mark.parametrize("damage", ["none", "text", "empty"])
def test_a_holder_on_another_host_without_heartbeats_is_dead_after_the_timeout(damage, tmp_path):
    path = dead_holder_file(tmp_path)
    if damage == "none":
        edit(path, host="other")
    else:
        path.write_text("{" if damage == "text" else "")
    marks = []
    start = time.monotonic()
    with RunLock(tmp_path, {}, progress=lambda: marks.append(0), **QUICK) as lock:
        assert time.monotonic() - start >= 0.45
        lock.check()
    assert len(marks) == 5


def test_a_holder_on_another_host_that_sends_heartbeats_is_alive(tmp_path):
    """Its clock may be wrong by hours: only a change of the modification time counts."""
    path = dead_holder_file(tmp_path)
    edit(path, host="other", job="9")
    stop = threading.Event()

    def beat() -> None:
        number = 0
        while not stop.wait(0.05):
            number += 1
            os.utime(path, (1000.0 + number, 1000.0 + number))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(ConfigError, match="on host other, SLURM job 9"):
            RunLock(tmp_path, {}, **QUICK)
    finally:
        stop.set()
        thread.join()


def test_a_holder_with_an_flock_is_alive_whatever_its_file_says(tmp_path):
    with RunLock(tmp_path, {}, **QUICK):
        edit(files(tmp_path)[0], host="other")
        with pytest.raises(ConfigError, match="on host other"):
            RunLock(tmp_path, {}, interval=10.0, timeout=10**6, poll=10**6)


def race(folder, start, done, results, dies) -> None:
    start.wait()
    try:
        lock = RunLock(Path(folder), {}, **QUICK)
        results.put("won")
    except ConfigError:
        lock = None
        results.put("refused")
    # The winner holds the lock until all others have tried.
    done.wait()
    if lock is not None:
        lock.check()
        if not dies:
            lock.release()
    results.put("end")
    results.close()
    results.join_thread()
    os._exit(0)


def test_of_many_contenders_exactly_one_takes_the_lock(tmp_path):
    """A new lock, a released one, one of a dead holder on this host, and one of a dead holder on another host."""
    for number in range(ROUNDS):
        start, done, results = _CONTEXT.Barrier(CONTENDERS), _CONTEXT.Barrier(CONTENDERS), _CONTEXT.Queue()
        arguments = (str(tmp_path), start, done, results, number % 2 == 0)
        processes = [_CONTEXT.Process(target=race, args=arguments) for _ in range(CONTENDERS)]
        for process in processes:
            process.start()
        outcomes = [results.get(timeout=60.0) for _ in range(2 * CONTENDERS)]
        for process in processes:
            process.join()
        assert outcomes.count("won") == 1, f"round {number}: {outcomes}"
        assert outcomes.count("end") == CONTENDERS
        if number % 4 == 2:
            edit(files(tmp_path)[-1], host="other")


def test_a_suspended_holder_detects_a_takeover_before_it_writes(tmp_path):
    lock = RunLock(tmp_path, {}, interval=10**6)
    successor = files(tmp_path)[0].with_name("run-0000002.json")
    holder = {**lock.holder.model_dump(), "host": "other", "job": "5", "token": "another"}
    assert lock.lost_to() is None
    successor.write_text(json.dumps({"format": Holder.FORMAT, **holder}))
    with pytest.raises(RunError, match=r"process \d+ on host other, SLURM job 5 has taken over"):
        lock.check()
    assert "host other" in lock.lost_to()
    before = successor.stat().st_mtime_ns
    lock.release()
    assert successor.stat().st_mtime_ns == before
    assert files(tmp_path)[0].stat().st_mtime_ns > 0


def test_a_stale_descriptor_does_not_hide_a_successor(tmp_path, monkeypatch):
    """On NFS, when the successor has deleted the file to which the old holder sends heartbeats."""
    lock, fstat = RunLock(tmp_path, {}, interval=10**6), os.fstat

    def stale(*_, **__):
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(os, "utime", stale)
        patch.setattr(os, "fstat", lambda file: stale() if file == lock._descriptor else fstat(file))
        # The holder keeps the lock if the server reports a stale handle only temporarily.
        lock._send_heartbeat()
    assert lock.lost_to() is None
    (held,) = files(tmp_path)
    other = {**lock.holder.model_dump(), "host": "other", "token": "another"}
    held.with_name("run-0000002.json").write_text(json.dumps({"format": Holder.FORMAT, **other}))
    held.unlink()
    monkeypatch.setattr(os, "utime", stale)
    with pytest.raises(RunError, match="on host other has taken"):
        lock.check()
    monkeypatch.undo()
    lock.release()


def test_a_released_lock_raises(tmp_path):
    lock = RunLock(tmp_path, {}, **QUICK)
    lock.release()
    for method in (lock.check, lock.lost_to):
        with pytest.raises(RunError, match="has released its lock"):
            method()


def test_renaming_the_folder_does_not_lose_the_lock(tmp_path):
    lock = RunLock(tmp_path / "a", {}, **QUICK)
    (tmp_path / "a").rename(tmp_path / "b")
    lock.check()
    # Another run in a new folder of the old name takes over.
    with RunLock(tmp_path / "a", {}, **QUICK), pytest.raises(RunError, match="has taken"):
        lock.check()
    lock.release()


def test_without_hard_links(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", unsupported)
    with RunLock(tmp_path, {}, **QUICK), pytest.raises(ConfigError, match="in use by process"):
        RunLock(tmp_path, {}, **QUICK)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / ".lock").write_text("a file")
    with pytest.raises(ConfigError, match="File exists"):
        RunLock(tmp_path, {}, **QUICK)


def arguments_of(data: Path, save: Path, iters: int, *flags: str) -> list[str]:
    argv = ["--phase", "main", "--domains", str(data), "--save", str(save), "--load", str(save)]
    return [*argv, "--train-iters", str(iters), "--log-interval", "1", *MODEL, *flags]


def config_error(launch, argv):
    with pytest.raises(ConfigError) as caught:
        program(launch, argv)
    return str(caught.value)


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_killed(data, tmp_path):
    """Fault 22; on the same host the lock of a killed run is free immediately."""
    save = tmp_path / "run"
    (first,), _ = start_ranks(1, str(tmp_path), program, arguments_of(data, save, 100_000))
    try:
        wait_for(lambda: lines_in(save) >= 1)
        for message in on_ranks(2, config_error, arguments_of(data, save, 100_000)):
            assert f"in use by process {first.pid} on host" in message
        assert first.is_alive()
    finally:
        first.kill()
        first.join()
    assert len(train(1, "main", data, save, 3, "--load", str(save))) == 2


def test_a_run_whose_lock_was_taken_over_exits_without_a_checkpoint(data, tmp_path):
    save = tmp_path / "run"
    argv = arguments_of(data, save, 100_000, "--save-interval", "1")
    (run,), (pipe,) = start_ranks(1, str(tmp_path), program, argv)
    try:
        wait_for(lambda: lines_in(save) >= 3)
        os.kill(run.pid, signal.SIGSTOP)
        held = files(save)[0]
        other = {**json.loads(held.read_text()), "host": "other", "token": "another"}
        held.with_name("run-0000002.json").write_text(json.dumps(other))
        published = len(list((save / "checkpoints").glob("iter_*")))
        os.kill(run.pid, signal.SIGCONT)
        assert pipe.poll(60)
        kind, message = pickle.loads(pipe.recv_bytes())
    finally:
        run.kill()
        run.join()
    assert kind == "error"
    assert f"has taken over {save}" in message
    # At most the one that was being renamed when the process was suspended.
    assert len(list((save / "checkpoints").glob("iter_*"))) <= published + 1


def fail_while_publishing(launch, argv, seconds, seconds_to_close):
    """A run that fails while its thread takes `seconds` to publish a checkpoint.

    Returns:
        the number of checkpoints at each release of a lock, and at the end.
    """
    from megatron_doremi.checkpoint import writer
    from megatron_doremi.checkpoint.folder import checkpoints
    from megatron_doremi.checkpoint.publishing import publish_checkpoint
    from megatron_doremi.cluster import run_lock

    writer.SECONDS_TO_CLOSE = seconds_to_close
    at_release, threads = [], []
    start, all_written, release = writer.Checkpointer.start, writer.Checkpointer.all_written, run_lock.RunLock.release

    def start_once(self, *arguments):
        # A second checkpoint would wait for the first.
        if self._pending is None:
            start(self, *arguments)

    def publish_slowly(*arguments):
        threads.append(threading.current_thread())
        time.sleep(seconds)
        return publish_checkpoint(*arguments)

    def all_written_then_fail(self):
        all_written(self)
        if self._pending is not None and self._pending.written_everywhere:
            raise RunError("another error")

    def count_and_release(self):
        at_release.append(len(checkpoints(self._save)))
        release(self)

    writer.publish_checkpoint = publish_slowly
    writer.Checkpointer.start = start_once
    writer.Checkpointer.all_written = all_written_then_fail
    run_lock.RunLock.release = count_and_release
    with pytest.raises(RunError, match="another error"):
        program(launch, argv)
    for thread in threads:
        thread.join(5.0)
    save = Path(argv[argv.index("--save") + 1])
    return at_release, len(checkpoints(save))


@pytest.mark.parametrize(("seconds_to_close", "published"), [(20.0, 1), (0.1, 0)])
def test_nothing_is_published_after_the_lock_was_released(seconds_to_close, published, data, tmp_path):
    argv = arguments_of(data, tmp_path / "run", 100_000, "--save-interval", "1")
    assert on_ranks(1, fail_while_publishing, argv, 1.0, seconds_to_close) == [([published], published)]
