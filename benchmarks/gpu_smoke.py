"""Checks that need a GPU, the most informative first; each prints one JSON line and appends it to a file.

    bash benchmarks/gpu_smoke.sh [--cpu] [--only NAME,...] [--seconds N] [--output FILE]

Each check runs in its own process with a time limit, so a check that fails or hangs affects no other. `--cpu` runs all
checks with tiny models, to test the script without a GPU. docs/gpu.md explains each line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MARK = "RESULT "
# Time limits in seconds; later checks may use the time that earlier ones leave.
LIMITS = {
    "versions": 60,
    "float32": 45,
    "program": 110,
    "resume": 90,
    "documents": 90,
    "sync": 45,
    "flags": 90,
    "1b": 80,
    "1b_compiled": 120,
    "rivals": 240,
    "1b_settings": 150,
    "kernels": 60,
    "compiled": 90,
    "proxy_280m": 120,
    "checkpoint": 50,
}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="run with tiny models on the CPU, to test this script")
    parser.add_argument("--only", default="", metavar="NAME,...", help=f"run only these checks, of {', '.join(LIMITS)}")
    parser.add_argument(
        "--seconds", type=float, default=480.0, help="time limit for all checks together (default: 480)"
    )
    folder = os.environ.get("OUT", ".")
    parser.add_argument(
        "--output", type=Path, default=Path(folder) / "gpu_smoke.jsonl", help="file to append the lines to"
    )
    parser.add_argument("--work", type=Path, help="scratch folder (default: a temporary one)")
    parser.add_argument("--check", help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = set(filter(None, options.only.split(","))) - set(LIMITS)
    if unknown:
        parser.error(f"--only {', '.join(sorted(unknown))}: must be of {', '.join(LIMITS)}")
    if not options.cpu and not options.check and not has_gpu():
        parser.error("torch sees no GPU here; --cpu runs the checks with tiny models")
    return options


def has_gpu() -> bool:
    """Whether torch sees a GPU; in a process of its own, which lets go of it."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def main() -> int:
    """Runs the checks; returns 1 if one failed."""
    options = parse()
    if options.check:
        return run_here(options)
    with tempfile.TemporaryDirectory() as scratch:
        options.work = (options.work or Path(scratch)).resolve()
        options.output.parent.mkdir(parents=True, exist_ok=True)
        began, good = time.monotonic(), True
        for name in filter(None, options.only.split(",")) if options.only else LIMITS:
            remaining = options.seconds - (time.monotonic() - began)
            line = run_apart(name, min(LIMITS[name], remaining), options)
            good &= line["ok"]
            text = json.dumps(line)
            print(text, flush=True)
            with options.output.open("a", encoding="utf-8") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
    return 0 if good else 1


def run_apart(name: str, limit: float, options: argparse.Namespace) -> dict[str, Any]:
    """Runs one check in its own process group; returns its line."""
    line: dict[str, Any] = {"check": name, "ok": False, "cpu": options.cpu}
    if limit < 1.0:
        return {**line, "error": "no time left", "seconds": 0.0}
    command = [sys.executable, str(Path(__file__).resolve()), "--check", name, "--work", str(options.work)]
    command += ["--cpu"] * options.cpu
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    if options.cpu:
        environment.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    began, stderr = time.monotonic(), options.work / f"{name}.stderr"
    stdout = options.work / f"{name}.stdout"
    with stdout.open("wb") as out, stderr.open("wb") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environment, start_new_session=True)
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # Also kills the processes that the check started.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    line["seconds"] = round(time.monotonic() - began, 1)
    # Findings from before a fault or a hang count.
    result: dict[str, Any] = {}
    for text in stdout.read_text(errors="replace").splitlines():
        if text.startswith(MARK):
            result.update(json.loads(text[len(MARK) :]))
    line["ok"] = code == 0 and not any("error" in value for value in result.values() if isinstance(value, dict))
    line["result"] = result
    if code != 0:
        line["error"] = f"no end within {limit:.0f} s" if code is None else f"exit {code}"
        line["stderr"] = stderr.read_text(errors="replace")[-1500:]
    return line


def run_here(options: argparse.Namespace) -> int:
    """Runs one check in this process; returns its exit code."""
    sys.path.insert(0, str(ROOT))
    sys.path.insert(0, str(ROOT / "benchmarks"))
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    import gpu_checks

    def report(**findings: Any) -> None:
        print(MARK + json.dumps(findings), flush=True)

    return 0 if gpu_checks.CHECKS[options.check](gpu_checks.Place(options.cpu, options.work), report) else 1


if __name__ == "__main__":
    sys.exit(main())
