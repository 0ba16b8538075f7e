"""Signals, limits of time, losses that are no numbers, ranks that hang or die: what a run leaves and says.

Run alone: python -m pytest tests/cluster/test_survival.py
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from phases.small import MODEL, full_weights, metrics, train, training_lines, unseal, write_data
from ranks import on_ranks, program, start_ranks
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_doremi.checkpoint.folder import checkpoints, newest_checkpoint
from megatron_doremi.errors import RunError

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
TP2_PP2 = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Run:
    """pretrain_doremi.py on several ranks, each a process of its own that can be killed."""

    def __init__(self, world: int, phase: str, data: Path, save: Path, iters: int, *flags: str, log: Path):
        argv = ["--phase", phase, "--domains", str(data), "--save", str(save), "--load", str(save)]
        command = [sys.executable, str(ROOT / "pretrain_doremi.py"), *argv, "--train-iters", str(iters), *MODEL, *flags]
        port = str(free_port())
        self.logs = [log.with_suffix(f".{rank}") for rank in range(world)]
        self.ranks = []
        for rank, path in enumerate(self.logs):
            places = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_PORT": port}
            environ = {**os.environ, **places, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
            with path.open("w") as file:
                self.ranks.append(subprocess.Popen(command, env=environ, stdout=file, stderr=file, cwd=ROOT))

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
        assert time.monotonic() < end, "did not come in time"
        time.sleep(0.02)


def lines_in(save: Path) -> int:
    path = save / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def test_a_signal_to_one_rank_stops_all_after_the_same_step_and_is_made_good(data, reference, tmp_path):
    """SIGTERM, then SIGUSR1 to all, during the save: saved once, exit 3; run again, it is the undisturbed run."""
    flags = [*reference, *TP2_PP2[2:], "--log-interval", "1"]
    whole = train(2, "proxy", data, tmp_path / "whole", 150, *flags)
    save = tmp_path / "run"
    run = Run(2, "proxy", data, save, 150, *flags, log=tmp_path / "log")
    wait_for(lambda: lines_in(save) >= 5)
    run.ranks[1].send_signal(signal.SIGTERM)
    time.sleep(0.01)
    for process in run.ranks:
        process.send_signal(signal.SIGUSR1)
    assert run.wait() == [3, 3], run.text()
    assert "a signal requested it" in run.text()
    stopped = training_lines(metrics(save))[-1]["iteration"]
    assert 5 <= stopped < 150
    assert [iteration for iteration, _ in checkpoints(save)] == [stopped]
    assert training_lines(train(2, "proxy", data, save, 150, *flags, "--load", str(save))) == training_lines(whole)


def test_limits_of_time(data, tmp_path):
    """--exit-duration-in-mins and an allocation that ends: at least a step, saved, exit 3."""
    for name, flags, environ in (
        ("duration", ["--exit-duration-in-mins", "1e-6"], {}),
        ("allocation", [], {"SLURM_JOB_END_TIME": str(int(time.time()) - 1)}),
    ):
        os.environ.update(environ)
        run = Run(1, "main", data, tmp_path / name, 50, *flags, log=tmp_path / f"log-{name}")
        for key in environ:
            del os.environ[key]
        assert run.wait() == [3], run.text()
        assert [iteration for iteration, _ in checkpoints(tmp_path / name)] == [1]


def poison(save: Path, row: int) -> None:
    """Writes NaN into the embedding of one id, in a run's newest checkpoint."""
    unseal(save)
    for path in (newest_checkpoint(save) / "weights").glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
        tensors = load_file(path)
        if "embedding.weight" in tensors:
            tensors["embedding.weight"][row] = float("nan")
            save_file(tensors, path, metadata=header)


@pytest.mark.parametrize(("phase", "whose"), [("main", "model"), ("proxy", "proxy"), ("proxy", "reference")])
def test_a_loss_that_is_no_number_stops_all_ranks_and_names_the_domain(phase, whose, tmp_path):
    """In a layout of 2 x 2, an id that only domain 1 has: nothing more is saved, no parameter has moved. NaN in the
    reference is not blamed on the proxy."""
    data = write_data(tmp_path, tokens=1500, apart=True)
    flags = ["--untie-embeddings-and-output-weights"]
    if phase == "proxy":
        train(1, "reference", data, tmp_path / "reference", 2, *flags)
        flags += ["--reference-load", str(tmp_path / "reference")]
    save = tmp_path / "run"
    layout = ["--pipeline-model-parallel-size", "2", "--save-interval", "1"]
    if whose == "reference":
        poison(tmp_path / "reference", row=25)
    else:
        train(1, phase, data, save, 5, *flags)
        poison(save, row=25)
        layout += ["--load", str(save)]
    with pytest.raises(AssertionError) as caught:
        train(4, phase, data, save, 50, *flags, *layout)
    said = str(caught.value)
    assert "NonFinite" in said
    found = re.findall(r"the (\w+)'s loss of iteration (\d+) is NaN or Inf in 'domain 1' \(windows ([\d, ]+)\)\n", said)
    assert {name for name, _, _ in found} == {whose}, said
    assert ("the proxy's own losses are finite" in said) == (whose == "reference")
    # Only windows that hold the id are named: of a batch of 8, those of one domain at most.
    assert all(1 <= len(windows.split(",")) <= 4 for _, _, windows in found)
    assert re.search(r"the batch: windows of 'domain 0' \d, 'domain 1' \d, 'domain 2' \d", said)
    last, checkpoint = (checkpoints(save) or [(0, None)])[-1]
    assert {int(iteration) for _, iteration, _ in found} == {last + 1}
    if whose == "reference":
        return
    weights = full_weights(checkpoint)
    nan_rows = weights.pop("embedding.weight").isnan().any(dim=1)
    assert nan_rows.nonzero().flatten().tolist() == [25]
    assert all(not tensor.isnan().any() for tensor in weights.values())


@pytest.mark.parametrize(("hurt", "number"), [(1, signal.SIGSTOP), (0, signal.SIGSTOP), (1, signal.SIGKILL)])
def test_a_rank_that_hangs_or_dies_is_named(hurt, number, data, tmp_path):
    run = Run(2, "main", data, tmp_path / "run", 100_000, "--distributed-timeout-minutes", "0.2", log=tmp_path / "log")
    try:
        wait_for((tmp_path / "run" / "config.json").exists)
        wait_for(lambda: lines_in(tmp_path / "run") >= 1)
        run.ranks[hurt].send_signal(number)
        assert run.ranks[1 - hurt].wait(60) == 1
        said = run.logs[1 - hurt].read_text()
        assert re.search(
            rf"no heartbeat: rank {hurt} on |rank {hurt}, which hosts the rendezvous, does not answer", said
        ), said
        assert "Traceback" not in said
    finally:
        run.kill()


def failing_disk(launch, data, save):
    """Trains on ranks of which one cannot write its checkpoint."""
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
    for said in on_ranks(2, failing_disk, data, tmp_path / "run"):
        assert "a checkpoint could not be written: rank 1: [Errno 28] No space left on device" in said
        assert "there is no checkpoint yet" in said
    assert not checkpoints(tmp_path / "run")


def test_killed_again_and_again_in_a_layout_of_two_by_two(data, reference, tmp_path):
    """SIGKILL at random moments, saves included: what comes out is the undisturbed run, to the last bit.

    MEGATRON_DOREMI_KILLS says how often (6).
    """
    kills = int(os.environ.get("MEGATRON_DOREMI_KILLS", "6"))
    iters = 12 * kills
    flags = [*reference, *TP2_PP2, "--save-interval", "1", "--keep-checkpoints", "2", "--eval-interval", "20"]
    whole = train(4, "proxy", data, tmp_path / "whole", iters, *flags)
    save, generator = tmp_path / "run", random.Random(5)
    argv = ["--phase", "proxy", "--domains", str(data), "--save", str(save), "--load", str(save)]
    argv += ["--train-iters", str(iters), *MODEL, *flags]
    newest = torn = 0
    for life in range(kills):
        with tempfile.TemporaryDirectory() as folder:
            ranks, _ = start_ranks(4, folder, program, argv)
            if life % 4:
                # Most of them once it has got on; every fourth while it starts.
                further = generator.randint(1, max(1, (iters - 5 - newest) // (kills - life)))
                wait_for(lambda goal=newest + further: newest_line(save) >= goal)
            time.sleep(generator.uniform(0.0, 0.1 if life % 4 else 1.5))
            for process in ranks:
                process.kill()
            for process in ranks:
                process.join()
        found = checkpoints(save)
        torn += any((save / "checkpoints").glob(".writing-*"))
        assert (found[-1][0] if found else 0) >= newest, f"life {life} lost a checkpoint"
        newest = found[-1][0] if found else 0
    print(f"{kills} kills, {torn} of them with a checkpoint half-written, the last at iteration {newest}")
    assert torn >= kills // 6
    assert 0 < newest < iters
    broken = train(4, "proxy", data, save, iters, *flags, "--load", str(save))
    assert training_lines(broken) == training_lines(whole)
    assert [line for line in broken if "eval" in line] == [line for line in whole if "eval" in line]
    last = [newest_checkpoint(tmp_path / run) for run in ("whole", "run")]
    for path in sorted(last[0].rglob("*.safetensors")):
        assert path.read_bytes() == (last[1] / path.relative_to(last[0])).read_bytes(), path.name
    assert not [path for path in (save / "checkpoints").iterdir() if path.name.startswith(".")]


def newest_line(save: Path) -> int:
    """The last whole line's iteration in a run's metrics."""
    path = save / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["iteration"] if lines else 0
