"""What a run saves and reports after signals, time limits, losses that are NaN, and ranks that hang or die.

Run alone: python -m pytest tests/cluster/test_survival.py
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from phases.small import MODEL, full_weights, metrics, train, training_lines, unseal, write_data
from ranks import ROOT, Script, on_ranks, program, start_ranks
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_doremi.checkpoint.folder import checkpoints, newest_checkpoint
from megatron_doremi.errors import RunError

pytestmark = pytest.mark.slow
TP2_PP2 = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Run:
    """pretrain_doremi.py on several ranks, each a process that can be killed."""

    def __init__(
        self,
        world: int,
        phase: str,
        data: Path,
        save: Path,
        iters: int,
        *flags: str,
        log: Path,
        environ: Mapping[str, str] | None = None,
    ):
        argv = ["--phase", phase, "--domains", str(data), "--save", str(save), "--load", str(save)]
        argv += ["--train-iters", str(iters), *MODEL, *flags]
        port = str(free_port())
        self.logs = [log.with_suffix(f".{rank}") for rank in range(world)]
        self.ranks = []
        for rank, path in enumerate(self.logs):
            launch = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_PORT": port}
            variables = {**os.environ, **(environ or {}), **launch, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
            self.ranks.append(Script(ROOT / "pretrain_doremi.py", argv, path, path, variables, ROOT))

    def kill(self) -> None:
        for process in self.ranks:
            process.kill()
        self.wait()

    def wait(self, timeout: float = 120.0) -> list[int]:
        return [process.wait(timeout) for process in self.ranks]

    def text(self) -> str:
        return "\n".join(path.read_text() for path in self.logs)


def wait_for(condition, seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"still false after {seconds:g} s"
        time.sleep(0.02)


def lines_in(save: Path) -> int:
    path = save / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def test_a_signal_to_one_rank_stops_all_after_the_same_step(data, reference, tmp_path):
    """SIGTERM, then SIGUSR1 to all ranks during the save: one checkpoint, exit code 3; resumed, the run equals an
    uninterrupted one."""
    flags = [*reference, *TP2_PP2[2:], "--log-interval", "1"]
    uninterrupted = train(2, "proxy", data, tmp_path / "uninterrupted", 80, *flags)
    save = tmp_path / "run"
    run = Run(2, "proxy", data, save, 80, *flags, log=tmp_path / "log")
    wait_for(lambda: lines_in(save) >= 5)
    run.ranks[1].send_signal(signal.SIGTERM)
    time.sleep(0.01)
    for process in run.ranks:
        process.send_signal(signal.SIGUSR1)
    assert run.wait() == [3, 3], run.text()
    assert "a signal requested it" in run.text()
    stopped = training_lines(metrics(save))[-1]["iteration"]
    assert 5 <= stopped < 80
    assert [iteration for iteration, _ in checkpoints(save)] == [stopped]
    resumed = train(2, "proxy", data, save, 80, *flags, "--load", str(save))
    assert training_lines(resumed) == training_lines(uninterrupted)


def test_time_limits(data, tmp_path):
    """--exit-duration-in-mins and the end of an allocation: at least one step, a checkpoint, exit code 3."""
    cases = {
        "duration": (["--exit-duration-in-mins", "1e-6"], {}),
        "allocation": ([], {"SLURM_JOB_END_TIME": str(int(time.time()) - 1)}),
    }
    runs = {
        name: Run(1, "main", data, tmp_path / name, 50, *flags, log=tmp_path / f"log-{name}", environ=environ)
        for name, (flags, environ) in cases.items()
    }
    for name, run in runs.items():
        assert run.wait() == [3], run.text()
        assert [iteration for iteration, _ in checkpoints(tmp_path / name)] == [1]


def write_nan(save: Path, row: int) -> None:
    """Writes NaN into one row of the embedding in a run's newest checkpoint."""
    unseal(save)
    for path in (newest_checkpoint(save) / "weights").glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
        tensors = load_file(path)
        if "embedding.weight" in tensors:
            tensors["embedding.weight"][row] = float("nan")
            save_file(tensors, path, metadata=header)


@pytest.mark.parametrize(("phase", "model"), [("main", "model"), ("proxy", "proxy"), ("proxy", "reference")])
def test_a_nan_loss_stops_all_ranks_and_names_the_domain(phase, model, tmp_path):
    """On a 2 x 2 layout, with an id that occurs only in domain 1: nothing more is saved, and no parameter is updated.
    NaN in the reference is not attributed to the proxy."""
    data = write_data(tmp_path, tokens=1500, apart=True)
    flags = ["--untie-embeddings-and-output-weights"]
    if phase == "proxy":
        train(1, "reference", data, tmp_path / "reference", 2, *flags)
        flags += ["--reference-load", str(tmp_path / "reference")]
    save = tmp_path / "run"
    layout = ["--pipeline-model-parallel-size", "2", "--save-interval", "1"]
    if model == "reference":
        write_nan(tmp_path / "reference", row=25)
    else:
        train(1, phase, data, save, 5, *flags)
        write_nan(save, row=25)
        layout += ["--load", str(save)]
    with pytest.raises(AssertionError) as caught:
        train(4, phase, data, save, 50, *flags, *layout)
    message = str(caught.value)
    assert "NonFinite" in message
    pattern = r"the (\w+)'s loss of iteration (\d+) is NaN or Inf in 'domain 1' \(windows ([\d, ]+)\)\n"
    reports = re.findall(pattern, message)
    assert {name for name, _, _ in reports} == {model}, message
    assert ("the proxy's own losses are finite" in message) == (model == "reference")
    # Only windows that contain the id are named: of a batch of 8, at most those of one domain.
    assert all(1 <= len(windows.split(",")) <= 4 for _, _, windows in reports)
    assert re.search(r"the batch: windows of 'domain 0' \d, 'domain 1' \d, 'domain 2' \d", message)
    last, checkpoint = (checkpoints(save) or [(0, None)])[-1]
    assert {int(iteration) for _, iteration, _ in reports} == {last + 1}
    if model == "reference":
        return
    weights = full_weights(checkpoint)
    nan_rows = weights.pop("embedding.weight").isnan().any(dim=1)
    assert nan_rows.nonzero().flatten().tolist() == [25]
    assert all(not tensor.isnan().any() for tensor in weights.values())


def test_a_rank_that_hangs_or_dies_is_named(data, tmp_path):
    """Three runs at once, because each waits for its timeouts most of the time; rank 0 takes longest."""
    cases = [(0, signal.SIGSTOP), (1, signal.SIGSTOP), (1, signal.SIGKILL)]
    flags = ["--distributed-timeout-minutes", "0.2"]
    runs: list[Run] = []
    try:
        for case, (rank, number) in enumerate(cases):
            save = tmp_path / str(case)
            runs.append(Run(2, "main", data, save, 100_000, *flags, log=tmp_path / f"log-{case}"))
            wait_for((save / "config.json").exists)
            wait_for(lambda save=save: lines_in(save) >= 1)
            runs[-1].ranks[rank].send_signal(number)
        for (rank, _), run in zip(cases, runs, strict=True):
            assert run.ranks[1 - rank].wait(60) == 1
            log = run.logs[1 - rank].read_text()
            assert re.search(
                rf"no heartbeat: rank {rank} on |rank {rank}, which hosts the rendezvous, does not answer", log
            ), log
            assert "Traceback" not in log
    finally:
        for run in runs:
            run.kill()


def train_with_a_full_disk(launch, data, save):
    """Trains while rank 1 cannot write its checkpoint; returns the error message."""
    from megatron_doremi.storage.tensor_file import TensorFile

    def full(self, folder):
        raise OSError(28, "No space left on device", str(folder))

    if launch.rank == 1:
        TensorFile.write = full
    argv = ["--phase", "main", "--domains", str(data), "--save", str(save), "--train-iters", "100000"]
    try:
        program(launch, [*argv, *MODEL, "--save-interval", "3"])
    except RunError as error:
        return str(error)


def test_a_rank_that_cannot_write_stops_the_run(data, tmp_path):
    for message in on_ranks(2, train_with_a_full_disk, data, tmp_path / "run"):
        assert "a checkpoint could not be written: rank 1: [Errno 28] No space left on device" in message
        assert "there is no checkpoint yet" in message
    assert not checkpoints(tmp_path / "run")


def test_a_run_that_is_killed_repeatedly_equals_an_uninterrupted_one(data, reference, tmp_path):
    """SIGKILL at random moments, even during saves, on a 2 x 2 layout: results are equal to the last bit.

    MEGATRON_DOREMI_KILLS sets the number of kills (default 6).
    """
    kills = int(os.environ.get("MEGATRON_DOREMI_KILLS", "6"))
    iters = 6 * kills
    flags = [*reference, *TP2_PP2, "--save-interval", "1", "--keep-checkpoints", "2", "--eval-interval", "10"]
    uninterrupted = train(4, "proxy", data, tmp_path / "uninterrupted", iters, *flags)
    save, generator = tmp_path / "run", random.Random(5)
    argv = ["--phase", "proxy", "--domains", str(data), "--save", str(save), "--load", str(save)]
    argv += ["--train-iters", str(iters), *MODEL, *flags]
    newest = interrupted_saves = 0
    for start in range(kills):
        with tempfile.TemporaryDirectory() as folder:
            ranks, _ = start_ranks(4, folder, program, argv)
            if start % 4:
                # Every fourth start is killed while it starts, the others after a random number of steps.
                steps = generator.randint(1, max(1, (iters - 5 - newest) // (kills - start)))
                wait_for(lambda goal=newest + steps: last_iteration(save) >= goal)
            time.sleep(generator.uniform(0.0, 0.1 if start % 4 else 1.5))
            for process in ranks:
                process.kill()
            for process in ranks:
                process.join()
        saved = checkpoints(save)
        interrupted_saves += any((save / "checkpoints").glob(".writing-*"))
        assert (saved[-1][0] if saved else 0) >= newest, f"start {start} lost a checkpoint"
        newest = saved[-1][0] if saved else 0
    print(f"{kills} kills, {interrupted_saves} of them during a save, the last at iteration {newest}")
    assert interrupted_saves >= kills // 6
    assert 0 < newest < iters
    resumed = train(4, "proxy", data, save, iters, *flags, "--load", str(save))
    assert training_lines(resumed) == training_lines(uninterrupted)
    assert [line for line in resumed if "eval" in line] == [line for line in uninterrupted if "eval" in line]
    expected, actual = (newest_checkpoint(tmp_path / run) for run in ("uninterrupted", "run"))
    for path in sorted(expected.rglob("*.safetensors")):
        assert path.read_bytes() == (actual / path.relative_to(expected)).read_bytes(), path.name
    assert not [path for path in (save / "checkpoints").iterdir() if path.name.startswith(".")]


def last_iteration(save: Path) -> int:
    """The iteration of the last complete line of a run's metrics; 0 if there is none."""
    path = save / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["iteration"] if lines else 0
