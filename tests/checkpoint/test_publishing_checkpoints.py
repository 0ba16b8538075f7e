"""Checkpoints on disk: which are complete, and that deleting old ones never ends a run or costs a complete one.

Run alone: python -m pytest tests/checkpoint/test_publishing_checkpoints.py
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from phases.small import MODEL, train, training_lines
from ranks import on_ranks, program, unwrapped

from megatron_doremi.checkpoint import publishing
from megatron_doremi.checkpoint.folder import checkpoint_name, checkpoints, shares_of_files
from megatron_doremi.checkpoint.publishing import REPLACED, WRITING, Retention, clear_leftovers, publish_checkpoint
from megatron_doremi.checkpoint.writer import SaveTimer
from megatron_doremi.errors import RunError
from megatron_doremi.storage.files import sha256_of


def write_rank(temporary: Path, rank: int) -> dict:
    """Writes the files of a rank and returns their report, as `_write` does."""
    files = {}
    for folder in ("weights", "optimizer"):
        path = temporary / folder / f"rank-{rank}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * (10 + rank))
        files[f"{folder}/{path.name}"] = 10 + rank
    pieces = {"a": {"shape": [4], "dim": None, "blocks": 1, "padded": 0, "size": 1, "piece": [0, 2 * rank, 2]}}
    optimizer = {"file": f"rank-{rank}.safetensors", "keys": ["exp_avg", "exp_avg_sq"], "pieces": pieces}
    checksums = {name: sha256_of(temporary / name) for name in files}
    return {"files": files, "checksums": checksums, "optimizer": optimizer}


def publish(save: Path, iteration: int, keep: int = 0, retention: Retention | None = None, **state) -> Path:
    """Publishes a checkpoint of two ranks and deletes old ones; returns its folder."""
    temporary = save / "checkpoints" / f"{WRITING}{checkpoint_name(iteration)}"
    reports = [write_rank(temporary, rank) for rank in range(2)]
    state = {"format": "megatron-doremi-checkpoint/2", "iteration": iteration, **state}
    final = publish_checkpoint(temporary, checkpoint_name(iteration), state, reports)
    (retention or Retention(save, keep)).apply(iteration)
    return final


def iterations(save: Path) -> list[int]:
    return [number for number, _ in checkpoints(save)]


def truncate(checkpoint: Path) -> None:
    (checkpoint / "weights" / "rank-1.safetensors").write_bytes(b"x")


@pytest.mark.parametrize("damage", ["missing", "shorter", "longer"])
def test_a_checkpoint_with_a_missing_or_changed_file_is_not_published(damage, tmp_path, monkeypatch):
    """Fault 21: the list of files was read from the folder, so a missing file was missing in the list, too."""
    monkeypatch.setattr(publishing, "VISIBILITY_TIMEOUT_SECONDS", 0.0)
    good = publish(tmp_path, 1, keep=1)
    temporary = tmp_path / "checkpoints" / f"{WRITING}iter_0000002"
    reports = [write_rank(temporary, rank) for rank in range(2)]
    path = temporary / "optimizer" / "rank-1.safetensors"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(b"x" * (10 if damage == "shorter" else 12))
    with pytest.raises(RunError, match=r"optimizer/rank-1.safetensors has \d+ bytes, but rank 1 wrote 11 "):
        publish_checkpoint(temporary, "iter_0000002", {}, reports)
    assert iterations(tmp_path) == [1]
    assert publishing.incompleteness(good) is None


def test_the_index_and_the_list_of_files_come_from_the_ranks_reports(tmp_path):
    temporary = tmp_path / "checkpoints" / f"{WRITING}iter_0000003"
    (temporary / "weights").mkdir(parents=True)
    (temporary / "weights" / "of-a-killed-run.safetensors").write_bytes(b"stale")
    checkpoint = publish(tmp_path, 3)
    state = json.loads((checkpoint / "state.json").read_text())
    index = checkpoint / "optimizer" / "index.json"
    names = [f"{folder}/rank-{rank}.safetensors" for folder in ("optimizer", "weights") for rank in range(2)]
    assert state["files"] == {name: 10 + int(name[-13]) for name in names} | {
        "optimizer/index.json": index.stat().st_size
    }
    pieces = json.loads(index.read_text())["parameters"]["a"]["pieces"]
    assert pieces == [["rank-0.safetensors", 0, 0, 2], ["rank-1.safetensors", 0, 2, 2]]
    assert not (checkpoint / "weights" / "of-a-killed-run.safetensors").exists()


def test_incomplete_checkpoints_are_neither_counted_nor_deleted(tmp_path, capsys):
    """Fault 20: if the newest checkpoint was incomplete, every save deleted itself."""
    for iteration in range(1, 6):
        publish(tmp_path, iteration)
    for iteration in (4, 5):
        truncate(tmp_path / "checkpoints" / checkpoint_name(iteration))
    retention = Retention(tmp_path, 2)
    # The run resumes from 3, the newest complete checkpoint, saves 4 again and continues.
    for iteration, remaining in ((4, [3, 4, 5]), (6, [4, 5, 6]), (7, [5, 6, 7])):
        publish(tmp_path, iteration, retention=retention)
        assert iterations(tmp_path) == remaining
    assert unwrapped(capsys.readouterr().err).count("iter_0000005 is incomplete (") == 1


def test_links_are_deleted_but_not_followed(tmp_path):
    """Fault 24: a checkpoint that was a link ended the run and every restart."""
    elsewhere = tmp_path / "elsewhere"
    for iteration in (1, 2):
        final = publish(tmp_path / "run", iteration)
        shutil.move(final, elsewhere / final.name)
        final.symlink_to(elsewhere / final.name)
    publish(tmp_path / "run", 3, keep=2)
    assert iterations(tmp_path / "run") == [2, 3]
    # A new checkpoint replaces a link of the same name.
    publish(tmp_path / "run", 2, keep=2)
    assert not (tmp_path / "run" / "checkpoints" / "iter_0000002").is_symlink()
    assert [path.name for path in sorted(elsewhere.iterdir())] == ["iter_0000001", "iter_0000002"]
    assert all(publishing.incompleteness(path) is None for path in elsewhere.iterdir())


def test_a_deletion_that_fails_is_a_warning(tmp_path, monkeypatch, capsys):
    for iteration in (1, 2):
        publish(tmp_path, iteration)

    def fail(path):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", fail)
        publish(tmp_path, 3, keep=1)
        # A restart fails to delete the same folders, and starts nevertheless.
        clear_leftovers(tmp_path)
    assert iterations(tmp_path) == [3]
    assert unwrapped(capsys.readouterr().err).count("cannot be deleted: [Errno 13]") == 4
    clear_leftovers(tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["iter_0000003", "latest"]


def test_a_run_resumes_from_a_checkpoint_that_was_being_replaced(data, tmp_path):
    train(1, "main", data, tmp_path, 2)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    folder = tmp_path / "checkpoints"
    (folder / "iter_0000002").rename(folder / f"{REPLACED}iter_0000002")
    train(1, "main", data, tmp_path, 3, "--load", str(tmp_path))
    after = (tmp_path / "metrics.jsonl").read_bytes()
    assert after.startswith(before)
    assert {json.loads(line)["iteration"] for line in after[len(before) :].splitlines()} == {3}


def test_leftovers_of_any_kind_are_removed_at_the_start(tmp_path):
    folder = tmp_path / "checkpoints"
    good = publish(tmp_path, 4)
    (folder / f"{WRITING}iter_0000007").mkdir()
    (folder / f"{WRITING}link").symlink_to(good)
    (folder / f"{WRITING}file").write_text("x")
    # A run that was killed between the two renames that replace a checkpoint: the old one is restored.
    good.rename(folder / f"{REPLACED}iter_0000004")
    clear_leftovers(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["iter_0000004", "latest"]
    assert publishing.incompleteness(folder / "iter_0000004") is None


def test_an_ephemeral_checkpoint_is_deleted_after_the_next(tmp_path):
    retention = Retention(tmp_path, 0)
    for iteration, ephemeral, remaining in (
        (10, False, [10]),
        (13, True, [10, 13]),
        (17, True, [10, 17]),
        (20, False, [10, 20]),
        (22, True, [10, 20, 22]),
    ):
        publish(tmp_path, iteration, retention=retention, **({"ephemeral": True} if ephemeral else {}))
        assert iterations(tmp_path) == remaining
    # A later start reads `ephemeral` from state.json; the newest of two that are kept may be ephemeral.
    publish(tmp_path, 24, keep=2, ephemeral=True)
    assert iterations(tmp_path) == [20, 24]


def test_the_save_timer():
    now = [100.0]
    timer, never = SaveTimer(0.5, lambda: now[0]), SaveTimer(0.0, lambda: now[0])
    due = []
    for _ in range(8):
        now[0] += 10.0
        due.append(timer.due())
        if due[-1]:
            timer.restart()
        assert not never.due()
    assert due == [False, False, True] * 2 + [False, False]


def timed_run(launch, argv, steps):
    """A run on whose rank 0 a checkpoint is due by time every `steps` steps; the clocks of other ranks stand still."""
    from megatron_doremi.checkpoint import writer
    from megatron_doremi.phases import train as train_phase

    now = [0.0]

    def clock():
        now[0] += 1.0 if launch.rank == 0 else 0.0
        return now[0]

    train_phase.SaveTimer = lambda minutes: SaveTimer(minutes and steps / 60, clock)
    published = []
    original = publishing.publish_checkpoint

    def publish(temporary, name, state, *rest):
        published.append([state["iteration"], state.get("ephemeral", False)])
        return original(temporary, name, state, *rest)

    writer.publish_checkpoint = publish
    program(launch, argv)
    return published


@pytest.mark.slow
def test_saving_by_time_on_two_ranks_does_not_change_results(data, reference, tmp_path):
    expected = train(2, "proxy", data, tmp_path / "untimed", 24, *reference, "--save-interval", "10")
    save = tmp_path / "timed"
    argv = ["--phase", "proxy", "--domains", str(data), "--save", str(save), "--train-iters", "24", *MODEL, *reference]
    published = on_ranks(2, timed_run, [*argv, "--save-interval", "10"], 4)[0]
    kinds = [ephemeral for _, ephemeral in published]
    assert True in kinds
    assert kinds[-1] is False
    assert iterations(save) == [10, 20, 24]
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    assert training_lines(lines) == training_lines(expected)
    for path in sorted((tmp_path / "untimed" / "checkpoints" / "iter_0000024").rglob("*.safetensors")):
        timed_path = save / path.relative_to(tmp_path / "untimed")
        assert path.read_bytes() == timed_path.read_bytes()


def train_without_shared_folder(launch, data, save):
    """A run whose rank 1 writes a file that rank 0 does not see, as to a local disk; returns the error message."""
    from megatron_doremi.checkpoint import writer

    write, saves = writer._write, []

    def write_elsewhere(temporary, files):
        report = write(temporary, files)
        saves.append(temporary)
        if launch.rank == 1 and len(saves) == 3:
            (temporary / "optimizer" / "rank-00001.safetensors").rename(save / "elsewhere")
        return report

    writer._write = write_elsewhere
    publishing.VISIBILITY_TIMEOUT_SECONDS = 0.1
    argv = ["--phase", "main", "--domains", str(data), "--save", str(save), "--train-iters", "100000", *MODEL]
    try:
        program(launch, [*argv, "--save-interval", "3", "--keep-checkpoints", "1", "--zero-stage", "1"])
    except RunError as error:
        return str(error)


@pytest.mark.slow
def test_a_rank_whose_files_rank_0_does_not_see_stops_the_run_and_the_last_checkpoint_stays(data, tmp_path):
    for message in on_ranks(2, train_without_shared_folder, data, tmp_path / "run"):
        assert re.search(r"optimizer/rank-00001\.safetensors has 0 bytes, but rank 1 wrote \d", message)
        assert "every rank must see the same --save folder; the newest checkpoint is" in message
    (last, checkpoint), *others = checkpoints(tmp_path / "run")
    assert last == 6
    assert not others
    assert publishing.incompleteness(checkpoint) is None


def test_ranks_share_the_bytes_of_a_checkpoint_whose_checksums_they_compute():
    """By hand: 9 | 5 + 4 | 5 + 2 + 1; not every third file, which would be 9 + 4 | 5 + 2 | 5 + 1."""
    sizes = {"a": 5, "b": 9, "c": 1, "d": 4, "e": 5, "f": 2}
    assert shares_of_files(sizes, 3) == [["b"], ["a", "d"], ["e", "f", "c"]]
    assert shares_of_files(sizes, 1) == [["b", "a", "e", "d", "f", "c"]]
    assert shares_of_files({"a": 1}, 3) == [["a"], [], []]
