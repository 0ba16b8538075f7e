"""Every output is checked at startup; of the outputs that fail later, only a checkpoint ends the run.

Run alone: python -m pytest tests/phases/test_outputs.py
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from phases.small import MODEL, metrics, read_by, train, training_lines
from ranks import on_ranks, program, unwrapped

from megatron_doremi.arguments import parse_config
from megatron_doremi.checkpoint.folder import checkpoints, incompleteness
from megatron_doremi.errors import ConfigError, RunError
from megatron_doremi.phases.output_checks import check_outputs
from megatron_doremi.storage.files import AppendFile

ROOT = Path(__file__).resolve().parents[2]


def config_of(phase: str, save: Path | str, *flags: str):
    needed = {"main": ["--train-iters", "5"], "evaluate": ["--load", "run"], "score": ["--reference-load", "reference"]}
    needed["proxy"] = [*needed["main"], *needed["score"]]
    argv = ["--phase", phase, "--domains", "domains.json", "--save", str(save), *needed[phase], *MODEL, *flags]
    return parse_config(read_by(phase, argv), 1)


def faults_of(config) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        check_outputs(config, learns=config.data.phase == "proxy")
    return {fault.subject: fault.value for fault in caught.value.faults}


@pytest.mark.parametrize(
    ("phase", "folders", "files"),
    [
        ("proxy", ["config.json", "metrics.jsonl", "domain_weights.json"], ["checkpoints", "tensorboard"]),
        ("main", ["checkpoints/latest"], []),
        ("score", ["scores.json"], ["losses"]),
        ("evaluate", ["evaluations.jsonl"], []),
    ],
)
def test_a_folder_where_a_file_belongs_and_a_file_where_a_folder_does(phase, folders, files, tmp_path):
    """Fault 53: a trained proxy was lost at domain_weights.json. All faults are reported together; no file changes."""
    for name in folders:
        (tmp_path / name).mkdir(parents=True)
    for name in files:
        (tmp_path / name).write_text("a file")
    assert faults_of(config_of(phase, tmp_path)) == {
        **{f"--save: {tmp_path / name}": "Is a directory" for name in folders},
        **{f"--save: {tmp_path / name}": "File exists" for name in files},
    }
    for name in [*folders, *files]:
        if "/" not in name:
            shutil.rmtree(tmp_path / name) if name in folders else (tmp_path / name).unlink()
    shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
    check_outputs(config_of(phase, tmp_path), learns=phase == "proxy")
    # The check writes no output.
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_paths_that_cannot_be_folders(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for save, value in (
        (tmp_path / "file", "File exists"),
        (tmp_path / "file" / "run", "Not a directory"),
        (tmp_path / "loop" / "run", "Too many levels of symbolic links"),
        (tmp_path / ("n" * 256), "File name too long"),
        ("/proc/nowhere/run", "No such file or directory"),
    ):
        assert faults_of(config_of("evaluate", save)) == {f"--save: {save}": value}
    flags = ["--tensorboard-dir", str(tmp_path / "file")]
    assert faults_of(config_of("main", tmp_path / "run", *flags)) == {
        f"--tensorboard-dir: {tmp_path / 'file'}": "File exists"
    }


def test_links_and_special_files(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for target, value in (
        (tmp_path / "missing" / "metrics.jsonl", "No such file or directory"),
        (tmp_path, "Is a directory"),
    ):
        path.symlink_to(target)
        assert faults_of(config_of("main", tmp_path)) == {f"--save: {path}": value}
        path.unlink()
    os.mkfifo(path)
    assert faults_of(config_of("main", tmp_path)) == {f"--save: {path}": "not a regular file"}
    path.unlink()
    for target in (tmp_path / "elsewhere.jsonl", Path("/dev/null")):
        path.symlink_to(target)
        check_outputs(config_of("main", tmp_path))
        assert path.is_symlink()
        path.unlink()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_failure_of_the_machine_at_the_start(number, tmp_path, monkeypatch):
    def fails(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match=os.strerror(number)):
        check_outputs(config_of("main", tmp_path))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def refused(launch, argv):
    try:
        program(launch, argv)
    except ConfigError as error:
        return str(error)


def test_every_rank_gets_the_error_before_a_model_is_built(data, tmp_path):
    (tmp_path / "domain_weights.json").mkdir()
    (tmp_path / "tensorboard").write_text("x")
    argv = ["--phase", "proxy", "--domains", str(data), "--save", str(tmp_path), "--train-iters", "3", *MODEL]
    for message in on_ranks(2, refused, [*argv, "--doremi-objective", "hardest"]):
        assert message.startswith("2 faults in the input:")
        assert f"--save: {tmp_path / 'domain_weights.json'}: Is a directory" in message
        assert f"--save: {tmp_path / 'tensorboard'}: File exists" in message
    assert not (tmp_path / "config.json").exists()


def unwritable_logs(launch, argv, full_after, room_after):
    """A run whose disk is full for some metrics and events; returns its stderr."""
    calls = {}
    append = AppendFile.append

    def failing(self, record):
        calls[id(self)] = calls.get(id(self), 0) + 1
        if full_after < calls[id(self)] <= room_after:
            os.write(self.descriptor, record[:5])
            os.ftruncate(self.descriptor, self.size() - 5)
            raise OSError(28, "No space left on device")
        append(self, record)

    AppendFile.append = failing
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        program(launch, argv)
    return unwrapped(stderr.getvalue())


def test_logs_that_cannot_be_written_are_warnings(data, tmp_path):
    """Fault 25: the logs' disk is full for a while; the run takes every step and completes every checkpoint."""
    argv = ["--phase", "main", "--domains", str(data), "--train-iters", "9", *MODEL, "--log-interval", "1"]
    undisturbed = training_lines(train(1, "main", data, tmp_path / "undisturbed", 9, "--log-interval", "1"))
    save = tmp_path / "run"
    (stderr,) = on_ranks(1, unwritable_logs, [*argv, "--save", str(save), "--save-interval", "3"], 2, 6)
    assert stderr.count("metrics.jsonl cannot be written: [Errno 28] No space left on device; training continues") == 1
    assert stderr.count("TensorBoard in ") == 1
    assert training_lines(metrics(save)) == undisturbed[:2] + undisturbed[6:]
    assert [iteration for iteration, _ in checkpoints(save)] == [3, 6, 9]
    # The run resumes after lines that were lost.
    shutil.rmtree(save / "checkpoints" / "iter_0000009")
    train(1, "main", data, save, 9, "--log-interval", "1", "--load", str(save))
    assert training_lines(metrics(save)) == undisturbed[:2] + undisturbed[6:]


def domain_weights_lost(launch, argv):
    """A proxy whose domain_weights.json cannot be written at its end."""
    from megatron_doremi.phases import learned_weights

    def full(*_):
        raise OSError(28, "No space left on device", "domain_weights.json")

    learned_weights.save_weights = full
    try:
        program(launch, argv)
    except RunError as error:
        return str(error)


def test_learned_weights_that_cannot_be_written_lose_no_checkpoint(data, reference, tmp_path):
    """Fault 53: exit 1 after the checkpoint is complete; the same command later writes the weights without a step."""
    save = tmp_path / "run"
    argv = ["--phase", "proxy", "--domains", str(data), "--save", str(save), "--load", str(save)]
    argv += ["--train-iters", "4", *MODEL, *reference]
    for message in on_ranks(2, domain_weights_lost, argv):
        assert "the learned domain weights cannot be written: domain_weights.json: No space left on device" in message
    ((iteration, checkpoint),) = checkpoints(save)
    assert iteration == 4
    assert incompleteness(checkpoint) is None
    assert not (save / "domain_weights.json").exists()
    before = metrics(save)
    train(2, "proxy", data, save, 4, *reference, "--load", str(save))
    assert (save / "domain_weights.json").exists()
    assert metrics(save) == before


@pytest.mark.slow
def test_a_pipe_that_is_closed_changes_nothing(data, tmp_path):
    """Fault 25, `pretrain_doremi.py | head -n 1`, on real processes and pipes."""
    save = tmp_path / "run"
    argv = ["--phase", "main", "--domains", str(data), "--save", str(save), "--train-iters", "60", *MODEL]
    command = [sys.executable, str(ROOT / "pretrain_doremi.py"), *argv, "--log-interval", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    process.stdout.readline()
    process.stdout.close()
    process.stderr.readline()
    process.stderr.close()
    assert process.wait(120) == 0
    assert [iteration for iteration, _ in checkpoints(save)] == [60]
    assert metrics(save)[-2]["iteration"] == 60


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="mounts a small file system: needs root")
def test_a_full_disk_ends_the_run_at_its_checkpoint_and_the_older_one_stays(data, tmp_path):
    save = tmp_path / "run"
    save.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(save)]).returncode:
        pytest.skip("cannot mount a file system here")
    try:
        for message in on_ranks(2, full_disk, data, save):
            assert "a checkpoint could not be written: " in message
            assert "No space left on device" in message
        (_, newest), *_ = reversed(checkpoints(save))
        assert incompleteness(newest) is None
        # With room again the run resumes.
        last = checkpoints(save)[-1][0]
        (save / "filler").unlink()
        train(2, "main", data, save, last + 1, "--load", str(save))
        assert checkpoints(save)[-1][0] == last + 1
    finally:
        subprocess.run(["umount", str(save)], check=True)


def full_disk(launch, data, save):
    """A run on a disk with room for one checkpoint."""
    from megatron_doremi.checkpoint import publishing, writer

    publish = publishing.publish_checkpoint

    def then_fill(*arguments):
        result = publish(*arguments)
        with contextlib.suppress(OSError), (save / "filler").open("ab") as file:
            while True:
                file.write(bytes(4096))
                file.flush()
        return result

    writer.publish_checkpoint = then_fill
    argv = ["--phase", "main", "--domains", str(data), "--save", str(save), "--train-iters", "1000", *MODEL]
    try:
        program(launch, [*argv, "--save-interval", "2", "--log-interval", "1", "--tensorboard-dir", f"{save}-events"])
    except RunError as error:
        return str(error)


def open_output_error(launch, argv, name):
    """This rank's error when rank 0 cannot open the file `name`."""
    from megatron_doremi.phases import evaluate, metrics_file

    def full(path):
        assert launch.rank == 0
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    {"metrics.jsonl": metrics_file, "evaluations.jsonl": evaluate}[name].AppendFile = full
    try:
        program(launch, argv)
    except RunError as error:
        return str(error)


@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluations.jsonl"])
def test_every_rank_gets_the_error_of_a_file_that_rank_0_cannot_open(name, data, tmp_path):
    """Only rank 0 used to end; the others waited in a collective until the watchdog's timeout."""
    argv = ["--domains", str(data), "--save", str(tmp_path)]
    if name == "metrics.jsonl":
        argv += ["--phase", "main", "--train-iters", "1", *MODEL]
    else:
        train(1, "main", data, tmp_path, 1)
        argv += ["--phase", "evaluate", "--load", str(tmp_path), *read_by("evaluate", MODEL)]
    for message in on_ranks(2, open_output_error, argv, name):
        assert message.startswith(f"{tmp_path / name}: No space left on device")
