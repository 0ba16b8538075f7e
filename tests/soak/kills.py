"""Kills runs at random moments: no process survives, and the run resumes with bit-equal results.

    python tests/soak/kills.py [--kills 50] [--seed 1] [--only launcher,worker,all,term] [--keep FOLDER]

A proxy of two ranks under torchrun saves every few steps and evaluates regularly. Each start is killed once, at a
random time during import, rendezvous, building, steps, saves, evaluations or exit: SIGKILL to its launcher, to one
worker or to all workers, or SIGTERM to its launcher. After 30 s no process of the run may be left. At the end metrics
and weights must equal those of an undisturbed run. Takes about half a minute per kill on two cores.
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

SECONDS_TO_END = 30.0
STEPS_PER_KILL = 30
# Set in a run's environment, so that its processes are found in any process group.
MARK = "MEGATRON_DOREMI_SOAK"
KINDS = ("launcher", "worker", "all", "term")


class Soak:
    """The folder of a run that is started and killed repeatedly."""

    def __init__(self, folder: Path, iters: int):
        self.folder, self.iters = folder, iters
        self.data = write_data(folder, tokens=1500)
        self.mark = f"{MARK}={os.getpid()}.{time.time_ns()}"

    def start(self, phase: str, save: Path, iters: int, world: int, *flags: str) -> subprocess.Popen:
        """Starts the run under torchrun."""
        name, _, value = self.mark.partition("=")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
        command += [str(ROOT / "pretrain_doremi.py"), "--phase", phase, "--domains", str(self.data), *MODEL, *flags]
        command += ["--save", str(save), "--load", str(save), "--train-iters", str(iters)]
        environ = {**os.environ, name: value, "OMP_NUM_THREADS": "1"}
        with (self.folder / "log").open("a") as log:
            return subprocess.Popen(command, env=environ, stdout=log, stderr=log, cwd=ROOT)

    def left(self, of: str = "") -> list[int]:
        """Living processes of the run whose command line contains `of`."""
        processes = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdecimal() and self.mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                    state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                    if state not in "ZX" and of in (entry / "cmdline").read_text():
                        processes.append(int(entry.name))
            except OSError:
                continue
        return processes

    def workers(self, launcher: int) -> list[int]:
        return [process for process in self.left("pretrain_doremi.py") if process != launcher]

    def end(self, life: subprocess.Popen, kind: str, generator: random.Random) -> None:
        """Kills the run; waits for a worker that has not started and skips one that has ended."""
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
        """Seconds until no process is left. Raises AssertionError after 30 s."""
        began = time.monotonic()
        while True:
            life.poll()
            left = self.left()
            seconds = time.monotonic() - began
            if not left:
                return seconds
            assert seconds < SECONDS_TO_END, f"left after {seconds:.0f} s: {left}"
            time.sleep(0.1)


def lines(save: Path) -> list[dict]:
    """The lines of a run's metrics without timings."""
    path = save / "metrics.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    clock = ("elapsed_ms", "tokens_per_second", "time_ms")
    return [{key: value for key, value in entry.items() if key not in clock} for entry in entries]


def newest(save: Path) -> Path | None:
    checkpoints = sorted((save / "checkpoints").glob("iter_*"))
    return checkpoints[-1] if checkpoints else None


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
        soak(Soak(folder, args.kills * STEPS_PER_KILL), args.kills, args.only.split(","), random.Random(args.seed))


def soak(run: Soak, kills: int, kinds: list[str], generator: random.Random) -> None:
    """Starts and kills a run `kills` times, then compares its metrics and weights with an undisturbed run's."""
    reference, undisturbed, save = run.folder / "reference", run.folder / "undisturbed", run.folder / "run"
    flags = ["--reference-load", str(reference), "--save-interval", "5", "--keep-checkpoints", "2"]
    flags += ["--eval-interval", "20", "--log-interval", "1"]
    assert run.start("reference", reference, 12, 1).wait(300) == 0, (run.folder / "log").read_text()[-3000:]
    began = time.monotonic()
    assert run.start("proxy", undisturbed, run.iters, 2, *flags).wait(3600) == 0, (run.folder / "log").read_text()[
        -3000:
    ]
    start = 8.0
    took, ended, situations = [], Counter(), Counter()
    for number in range(kills):
        kind = kinds[number % len(kinds)]
        process = run.start("proxy", save, run.iters, 2, *flags)
        # A third of the kills comes during startup.
        time.sleep(generator.uniform(0.0, start if number % 3 == 0 else start + 6.0))
        run.end(process, kind, generator)
        took.append(run.gone(process))
        ended[kind] += 1
        reached = newest(save)
        situations["with a checkpoint half-written"] += any((save / "checkpoints").glob(".writing-*"))
        print(f"{number + 1}/{kills} {kind}: gone after {took[-1]:.1f} s, at {reached and reached.name}", flush=True)
        if reached is not None and int(reached.name[5:]) >= run.iters:
            situations["finished"] += 1
    for _ in range(5):
        if run.start("proxy", save, run.iters, 2, *flags).wait(3600) == 0:
            break
    assert lines(save) == lines(undisturbed), "other metrics than the undisturbed run's"
    last = newest(undisturbed)
    assert last is not None
    compared = 0
    for path in sorted(last.rglob("*.safetensors")):
        other = newest(save) / path.relative_to(last)  # type: ignore[operator]
        assert path.read_bytes() == other.read_bytes(), path.name
        compared += 1
    kinds_killed = ", ".join(f"{count} {kind}" for kind, count in ended.items())
    print(
        f"{kills} kills ({kinds_killed}), {dict(situations)}: all gone after {statistics.median(took):.1f} s (median), "
        f"{max(took):.1f} s (most); {len(lines(save))} lines and {compared} files bit-equal; "
        f"{time.monotonic() - began:.0f} s in all"
    )


if __name__ == "__main__":
    main()
