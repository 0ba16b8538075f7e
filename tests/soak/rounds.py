"""Kills rounds of DoReMi in each stage of each round, or runs two rounds through a real SLURM.

    python tests/soak/rounds.py [--seed 1]     # kills: about five minutes on two cores
    python tests/soak/rounds.py --slurm        # two rounds on two emulated nodes: about three minutes

Every stage of both rounds is killed twice at a random time: SIGKILL to the tool alone, or to all of its processes, or
SIGTERM to the tool. At the end rounds.json, the weights files, the metrics and the model weights must be bit-equal to
those of undisturbed rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "soak")]

from kills import lines, newest
from phases.small import MODEL, write_data

STAGES = ("reference", "score", "proxy")
ITERS = 200
FLAGS = ["--train-iters", str(ITERS), "--save-interval", "4", "--keep-checkpoints", "2", "--log-interval", "1"]
ROUNDS = ["--max-rounds", "2", "--min-change", "1e-9", "--record-losses", "--nproc-per-node", "2"]
KINDS = ("tool", "all", "term")


def start(data: Path, save: Path, log: Path) -> subprocess.Popen:
    """Starts the rounds in a process group of their own."""
    command = [sys.executable, "tools/doremi_rounds.py", "--domains", str(data), "--save", str(save)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with log.open("w") as file:
        return subprocess.Popen(
            [*command, *MODEL, *FLAGS, *ROUNDS], env=environ, cwd=ROOT, stdout=file, stderr=file, start_new_session=True
        )


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def end(life: subprocess.Popen, kind: str) -> int:
    """Kills the rounds and waits until none of their processes is left; returns the tool's exit code."""
    if kind == "all":
        os.killpg(life.pid, signal.SIGKILL)
    else:
        life.send_signal(signal.SIGKILL if kind == "tool" else signal.SIGTERM)
    code, limit = life.wait(60), time.monotonic() + 45.0
    while alive(life.pid):
        assert time.monotonic() < limit, "processes are left"
        time.sleep(0.1)
    return code


def kills(folder: Path, seed: int) -> None:
    """Rounds that are killed in each stage, against undisturbed ones."""
    data, generator = write_data(folder, tokens=1500), random.Random(seed)
    undisturbed, save, log = folder / "undisturbed", folder / "rounds", folder / "log"
    began = time.monotonic()
    assert start(data, undisturbed, log).wait(1200) == 0, log.read_text()[-3000:]
    codes = Counter[str]()
    targets = [(number, stage) for number in (1, 2) for stage in STAGES for _ in range(2)]
    for place, (number, stage) in enumerate(targets):
        kind = KINDS[place % len(KINDS)]
        life = start(data, save, log)
        # At a random step, or with 0 during the start of the run; scoring takes no steps.
        steps = 0 if stage == "score" else generator.choice((0, generator.randrange(1, ITERS)))
        folder_of = save / f"round-{number}" / "seed-1" / {"score": "scores"}.get(stage, stage)
        while life.poll() is None and (
            f"round {number}: {stage}" not in log.read_text() or len(lines(folder_of)) < steps
        ):
            time.sleep(0.02)
        time.sleep(generator.uniform(0.0, 3.0 if not steps else 0.1))
        at = [line for line in log.read_text().splitlines() if "== round" in line][-1:]
        code = end(life, kind) if life.poll() is None else life.returncode
        codes[f"{kind}: {code}"] += 1
        print(f"{place + 1}/{len(targets)} {kind} in {at}, step {len(lines(folder_of))}: exit code {code}", flush=True)
    assert start(data, save, log).wait(1200) == 0, log.read_text()[-3000:]
    print(f"exit codes {dict(codes)}; {compare(undisturbed, save)}; {time.monotonic() - began:.0f} s in all")


def compare(undisturbed: Path, save: Path) -> str:
    """Asserts that two folders of rounds are bit-equal but for timings and paths; returns what was compared."""
    files = 0
    for name in ("rounds.json", "domain_weights.json", "round-2/reference_weights.json"):
        assert (undisturbed / name).read_bytes() == (save / name).read_bytes(), name
        files += 1
    for number in (1, 2):
        for stage in ("reference", "proxy"):
            run, other = (each / f"round-{number}" / "seed-1" / stage for each in (undisturbed, save))
            assert lines(run) == lines(other), f"other metrics: {other}"
            last, other_last = newest(run), newest(other)
            assert last is not None
            assert other_last is not None
            for path in last.rglob("*.safetensors"):
                assert path.read_bytes() == (other_last / path.relative_to(last)).read_bytes(), path
                files += 1
        losses, others = (each / f"round-{number}" / "seed-1" / "scores" for each in (undisturbed, save))
        for path in losses.rglob("*.bin"):
            assert path.read_bytes() == (others / path.relative_to(losses)).read_bytes(), path
            files += 1
    return f"metrics of 4 runs and {files} files bit-equal"


def through_slurm(folder: Path) -> None:
    """Two rounds of two seeds through SLURM, which end by themselves; then a third after all, by another rule."""
    from slurm.slurm_cluster import cluster, wait_for
    from slurm.test_real_slurm import EXPERIMENT, SITE

    data = folder / "data"
    data.mkdir()
    (folder / "slurm").mkdir()
    write_data(data, tokens=1500)
    experiment = EXPERIMENT.format(folder=folder, iters=24).replace(f"OUT={folder}/run", f"OUT=${{OUT:-{folder}/run}}")
    (folder / "experiment.sh").write_text(experiment)
    (folder / "site.sh").write_text(SITE.format(python=sys.executable))
    rounds = folder / "run" / "rounds"
    with cluster(folder / "slurm") as environ:
        variables = {**environ, "SITE": str(folder / "site.sh"), "SEEDS": "2", "MIN_CHANGE": "1e-9"}
        words = ["bash", "examples/slurm/rounds.sh", str(folder / "experiment.sh")]
        for most in ("2", "3"):
            began = time.monotonic()
            done = subprocess.run(
                words, env={**variables, "MAX_ROUNDS": most}, cwd=ROOT, capture_output=True, text=True, timeout=120
            )
            assert done.returncode == 0, done.stdout + done.stderr
            print(done.stdout)

            def ended(limit: int = int(most)) -> bool:
                # The file of the rounds before is removed when a further one follows.
                text = (rounds / "rounds.json").read_text() if (rounds / "rounds.json").exists() else "{}"
                entry = json.loads(text)
                return entry.get("ended") is not None and (entry["max_rounds"] == limit)

            try:
                wait_for(ended, 400, f"the end of round {most}")
            except AssertionError:
                print(subprocess.run(["squeue"], env=environ, capture_output=True, text=True).stdout)
                for path in sorted(rounds.rglob("*.log")):
                    print(f"== {path}\n{path.read_text()[-1500:]}")
                raise
            entry = json.loads((rounds / "rounds.json").read_text())
            shown = [(each["round"], each["change"], each["noise"]) for each in entry["rounds"]]
            print(f"ended: {entry['ended']} after {shown}, {time.monotonic() - began:.0f} s")
            log = next(iter(sorted(rounds.glob("round-*/judge-*.log"))))
            print(log.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--slurm", action="store_true")
    parser.add_argument("--keep", default="", help="folder to work in, which stays")
    args = parser.parse_args()
    folder = Path(args.keep or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if args.slurm:
            through_slurm(folder)
        else:
            kills(folder, args.seed)
    finally:
        if not args.keep:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
