"""Ranks wait for those that work as long as it takes, where a collective would time out.

Run alone: python -m pytest tests/cluster/test_store_collectives.py
"""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
from ranks import on_ranks

from megatron_doremi.errors import ConfigError, Fault, RunError, error_from_json, error_to_json

# Seconds: of a collective, of the watchdog, and of the last rank's work.
COLLECTIVE, WATCHDOG, WORK = 0.5, 2.0, 3.0


def wait_for_the_last(launch):
    """Rank 1 works for longer than a collective and the watchdog wait; what each rank met."""
    import torch
    import torch.distributed as dist

    from megatron_doremi.cluster.rendezvous import Rendezvous
    from megatron_doremi.cluster.store_collectives import barrier_via_store, run_on_rank_0_via_store
    from megatron_doremi.cluster.watchdog import Watchdog

    path = launch.rendezvous.removeprefix("file://")
    store, group = (dist.FileStore(f"{path}-{name}", launch.world_size) for name in ("wait", "group"))
    dist.init_process_group(
        "gloo", store=group, rank=launch.rank, world_size=launch.world_size, timeout=timedelta(seconds=COLLECTIVE)
    )
    began, heard = time.monotonic(), []
    with Watchdog(Rendezvous(launch), WATCHDOG) as watchdog:
        if launch.rank == 1:
            while time.monotonic() < began + WORK:
                time.sleep(0.1)
                watchdog.mark("working")
        barrier_via_store(store, "done", launch.rank, launch.world_size, lambda: heard.append(1))
        waited = time.monotonic() - began
        told = run_on_rank_0_via_store(store, "told", launch.rank, lambda: ["from", launch.rank])
        try:
            run_on_rank_0_via_store(store, "wrong", launch.rank, fail)
        except ConfigError as error:
            failure = str(error)
    # What version 0.1 waited with.
    timed_out = False
    if launch.rank == 0:
        try:
            dist.all_reduce(torch.zeros(1))
        except RuntimeError:
            timed_out = True
    return waited, bool(heard), told, failure, timed_out


def fail():
    raise ConfigError([Fault("--a", "1", "2", "b"), Fault("--c", "3", "4", "d")])


def test_who_is_done_waits_for_who_works():
    results = on_ranks(2, wait_for_the_last)
    assert all(waited >= WORK - 0.2 for waited, *_ in results)
    assert results[0][1]
    assert [told for *_, told, _, _ in results] == [["from", 0]] * 2
    assert all("[1] --a: 1" in failure and "[2] --c: 3" in failure for *_, failure, _ in results)
    assert results[0][-1]


@pytest.mark.parametrize("error", [RunError("a disk\nis full"), ConfigError(Fault("--x", "y", "z", "w"))])
def test_errors_travel(error):
    copy = error_from_json(error_to_json(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)


def test_an_error_of_the_machine_on_rank_0_reaches_the_others():
    import torch.distributed as dist

    from megatron_doremi.cluster.store_collectives import run_on_rank_0_via_store

    def full():
        raise OSError(28, "No space left on device", "scores.json")

    store = dist.HashStore()
    for rank in (0, 1):
        with pytest.raises(RunError, match=r"^scores.json: No space left on device$"):
            run_on_rank_0_via_store(store, "folder", rank, full)


def test_hashing_a_large_file_gives_signs_of_life(tmp_path, monkeypatch):
    """A file of gigabytes takes minutes from a slow disk: the watchdog hears of each block."""
    import hashlib
    from types import SimpleNamespace

    from megatron_doremi.checkpoint.folder import CheckpointState, changed_files
    from megatron_doremi.phases import score
    from megatron_doremi.storage import files

    monkeypatch.setattr(files, "_HASH_BLOCK", 1000)
    folder = tmp_path / "weights"
    folder.mkdir()
    content = bytes(range(256)) * 20
    (folder / "a.safetensors").write_bytes(content)
    checksum = hashlib.sha256(content).hexdigest()
    state = CheckpointState.model_construct(checksums={"weights/a.safetensors": checksum})
    marks = []
    assert changed_files(tmp_path, state, progress=lambda: marks.append(1)) == []
    assert len(marks) >= 6
    marks.clear()
    monkeypatch.setattr(score, "read_state", lambda _: state)
    expected = hashlib.sha256(f"a.safetensors {checksum}\n".encode()).hexdigest()
    assert score.weights_hash(folder, SimpleNamespace(mark=marks.append)) == expected
    assert len(marks) >= 6
