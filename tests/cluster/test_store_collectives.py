"""Collectives through the store have no timeout: ranks wait for working ranks longer than a collective could.

Run alone: python -m pytest tests/cluster/test_store_collectives.py
"""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
from ranks import on_ranks

from megatron_doremi.errors import ConfigError, Fault, RunError, error_from_json, error_to_json

COLLECTIVE_TIMEOUT, WATCHDOG_TIMEOUT, WORK_SECONDS = 0.5, 2.0, 3.0


def wait_for_rank_1(launch):
    """Rank 1 works for longer than the timeouts of a collective and of the watchdog; what each rank observes."""
    import torch
    import torch.distributed as dist

    from megatron_doremi.cluster.rendezvous import Rendezvous
    from megatron_doremi.cluster.store_collectives import barrier_via_store, run_on_rank_0_via_store
    from megatron_doremi.cluster.watchdog import Watchdog

    path = launch.rendezvous.removeprefix("file://")
    store, group = (dist.FileStore(f"{path}-{name}", launch.world_size) for name in ("wait", "group"))
    dist.init_process_group(
        "gloo",
        store=group,
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT),
    )
    start, calls = time.monotonic(), []
    with Watchdog(Rendezvous(launch), WATCHDOG_TIMEOUT) as watchdog:
        if launch.rank == 1:
            while time.monotonic() < start + WORK_SECONDS:
                time.sleep(0.1)
                watchdog.mark("working")
        barrier_via_store(store, "done", launch.rank, launch.world_size, lambda: calls.append(1))
        waited = time.monotonic() - start
        result = run_on_rank_0_via_store(store, "result", launch.rank, lambda: ["from", launch.rank])
        try:
            run_on_rank_0_via_store(store, "wrong", launch.rank, fail)
        except ConfigError as error:
            failure = str(error)
    # Version 0.1 waited in a collective.
    timed_out = False
    if launch.rank == 0:
        try:
            dist.all_reduce(torch.zeros(1))
        except RuntimeError:
            timed_out = True
    return waited, bool(calls), result, failure, timed_out


def fail():
    raise ConfigError([Fault("--a", "1", "2", "b"), Fault("--c", "3", "4", "d")])


def test_ranks_wait_longer_than_the_timeouts():
    results = on_ranks(2, wait_for_rank_1)
    assert all(waited >= WORK_SECONDS - 0.2 for waited, *_ in results)
    assert results[0][1]
    assert [result for *_, result, _, _ in results] == [["from", 0]] * 2
    assert all("[1] --a: 1" in failure and "[2] --c: 3" in failure for *_, failure, _ in results)
    assert results[0][-1]


@pytest.mark.parametrize("error", [RunError("a disk\nis full"), ConfigError(Fault("--x", "y", "z", "w"))])
def test_errors_survive_the_round_trip_through_json(error):
    copy = error_from_json(error_to_json(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)


def test_a_machine_error_on_rank_0_is_raised_on_every_rank():
    import torch.distributed as dist

    from megatron_doremi.cluster.store_collectives import run_on_rank_0_via_store

    def full():
        raise OSError(28, "No space left on device", "scores.json")

    store = dist.HashStore()
    for rank in (0, 1):
        with pytest.raises(RunError, match=r"^scores.json: No space left on device; free disk space"):
            run_on_rank_0_via_store(store, "folder", rank, full)


def test_hashing_a_large_file_reports_progress(tmp_path, monkeypatch):
    """Reading gigabytes from a slow disk takes minutes: each block is reported to the watchdog."""
    import hashlib
    from types import SimpleNamespace

    from megatron_doremi.checkpoint.folder import CheckpointState, changed_files
    from megatron_doremi.mixture.reference import TrainedModel
    from megatron_doremi.phases import score
    from megatron_doremi.storage import files

    monkeypatch.setattr(files, "_HASH_BLOCK", 1000)
    folder = tmp_path / "weights"
    folder.mkdir()
    content = bytes(range(256)) * 20
    (folder / "a.safetensors").write_bytes(content)
    checksum = hashlib.sha256(content).hexdigest()
    name = "weights/a.safetensors"
    state = CheckpointState.model_construct(files={name: len(content)}, checksums={name: checksum})
    marks = []
    assert changed_files(tmp_path, state, progress=lambda: marks.append(1)) == []
    assert len(marks) >= 6
    marks.clear()
    model = TrainedModel(None, None, tmp_path, folder, {"a.safetensors": checksum}, folder)
    expected = hashlib.sha256(f"a.safetensors {checksum}\n".encode()).hexdigest()
    assert score.weights_hash(model, SimpleNamespace(mark=marks.append)) == expected
    assert len(marks) >= 6
