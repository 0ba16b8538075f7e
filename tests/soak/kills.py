"""Kills runs at random moments of their whole life: nothing of them stays, and what they leave resumes bit-equal.

    python tests/soak/kills.py [--kills 50] [--seed 1] [--only launcher,worker,all,term] [--keep FOLDER]

A proxy of two ranks under torchrun saves every few steps and evaluates now and then. Each life is ended once: its
launcher, one of its workers, or all of them by SIGKILL, or its launcher by SIGTERM, after a time that is drawn over the
whole life: import, rendezvous, building, steps, saves, evaluations, exit. 30 s later no process of the run may be left.
The lives together are one run, which has to end with the metrics and the weights of a run that nobody disturbed. About
half a minute a kill on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from phases.small import MODEL, write_data

SECONDS_TO_GO = 30.0
STEPS_A_KILL = 30
# Written into the environment of a run, so that its processes are found wherever they have gone.
MARK = "MEGATRON_DOREMI_SOAK"
KINDS = ("launcher", "worker", "all", "term")


class Soak:
    """One run's folder, and its lives."""

    def __init__(self, folder: Path, iters: int):
        self.folder, self.iters = folder, iters
        self.data = write_data(folder, tokens=1500)
        self.mark = f"{MARK}={os.getpid()}.{time.time_ns()}"

    def start(self, phase: str, save: Path, iters: int, world: int, *flags: str) -> subprocess.Popen:
        """A life, under torchrun."""
        name, _, value = self.mark.partition("=")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
        command += [str(ROOT / "pretrain_doremi.py"), "--phase", phase, "--domains", str(self.data), *MODEL, *flags]
        command += ["--save", str(save), "--load", str(save), "--train-iters", str(iters)]
        environ = {**os.environ, name: value, "OMP_NUM_THREADS": "1"}
        with (self.folder / "log").open("a") as log:
            return subprocess.Popen(command, env=environ, stdout=log, stderr=log, cwd=ROOT)

    def left(self, of: str = "") -> list[int]:
        """Processes of the run that live, `of` in their command line."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdecimal() and self.mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                    state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                    if state not in "ZX" and of in (entry / "cmdline").read_text():
                        found.append(int(entry.name))
            except OSError:
                continue
        return found

    def workers(self, launcher: int) -> list[int]:
        return [process for process in self.left("pretrain_doremi.py") if process != launcher]

    def end(self, life: subprocess.Popen, kind: str, generator: random.Random) -> None:
        """Kills; a worker that is not there yet is waited for, and one that is gone already is none."""
        if kind == "launcher":
            life.kill()
        elif kind == "term":
            life.terminate()
        else:
            limit = time.monotonic() + 10.0
            while not (workers := self.workers(life.pid)) and life.poll() is None and time.monotonic() < limit:
                time.sleep(0.01)
            for process in workers if kind == "all" else workers and [generator.choice(workers)]:
                try:
                    os.kill(process, signal.SIGKILL)
                except ProcessLookupError:
                    continue

    def gone(self, life: subprocess.Popen) -> float:
        """Seconds until nothing is left. Raises AssertionError after 30 s."""
        began = time.monotonic()
        while True:
            life.poll()
            left = self.left()
            seconds = time.monotonic() - began
            if not left:
                return seconds
            assert seconds < SECONDS_TO_GO, f"left after {seconds:.0f} s: {left}"
            time.sleep(0.1)


def lines(save: Path) -> list[dict]:
    """The lines of a run's metrics, without what a clock decides."""
    path = save / "metrics.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    clock = ("elapsed_ms", "tokens_per_second", "data_ms")
    return [{key: value for key, value in entry.items() if key not in clock} for entry in entries]


def newest(save: Path) -> Path | None:
    found = sorted((save / "checkpoints").glob("iter_*"))
    return found[-1] if found else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default=",".join(KINDS))
    parser.add_argument("--keep", default="", help="folder to work in, which stays")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.keep or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        soak(Soak(folder, args.kills * STEPS_A_KILL), args.kills, args.only.split(","), random.Random(args.seed))


def soak(run: Soak, kills: int, kinds: list[str], generator: random.Random) -> None:
    """Kills `kills` lives of a run and compares what they leave."""
    reference, whole, save = run.folder / "reference", run.folder / "whole", run.folder / "run"
    flags = ["--reference-load", str(reference), "--save-interval", "5", "--keep-checkpoints", "2"]
    flags += ["--eval-interval", "20", "--log-interval", "1"]
    assert run.start("reference", reference, 12, 1).wait(300) == 0, (run.folder / "log").read_text()[-3000:]
    began = time.monotonic()
    assert run.start("proxy", whole, run.iters, 2, *flags).wait(3600) == 0, (run.folder / "log").read_text()[-3000:]
    start = 8.0
    took, ended, where = [], Counter(), Counter()
    for number in range(kills):
        kind = kinds[number % len(kinds)]
        life = run.start("proxy", save, run.iters, 2, *flags)
        # A third of the lives ends while it starts.
        time.sleep(generator.uniform(0.0, start if number % 3 == 0 else start + 6.0))
        run.end(life, kind, generator)
        took.append(run.gone(life))
        ended[kind] += 1
        reached = newest(save)
        where["with a checkpoint half-written"] += any((save / "checkpoints").glob(".writing-*"))
        print(f"{number + 1}/{kills} {kind}: gone after {took[-1]:.1f} s, at {reached and reached.name}", flush=True)
        if reached is not None and int(reached.name[5:]) >= run.iters:
            where["finished"] += 1
    for _ in range(5):
        if run.start("proxy", save, run.iters, 2, *flags).wait(3600) == 0:
            break
    assert lines(save) == lines(whole), "other metrics than the undisturbed run's"
    last = newest(whole)
    assert last is not None
    compared = 0
    for path in sorted(last.rglob("*.safetensors")):
        other = newest(save) / path.relative_to(last)  # type: ignore[operator]
        assert path.read_bytes() == other.read_bytes(), path.name
        compared += 1
    kinds_killed = ", ".join(f"{count} {kind}" for kind, count in ended.items())
    print(
        f"{kills} kills ({kinds_killed}), {dict(where)}: all gone after {statistics.median(took):.1f} s (median), "
        f"{max(took):.1f} s (most); {len(lines(save))} lines and {compared} files bit-equal; "
        f"{time.monotonic() - began:.0f} s in all"
    )


if __name__ == "__main__":
    main()
