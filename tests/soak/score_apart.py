"""Two replicas score, one slower by more than the collectives' timeout: the run completes with all windows.

    python tests/soak/score_apart.py --collective-seconds 10 --behind-seconds 25

Version 0.1 ended in a timeout of its last all-reduce.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from phases.small import MODEL, read_by, train, write_data
from ranks import on_ranks, program


def slow_program(launch: Any, argv: list[str], timeout: float, delay: float) -> int:
    """Runs the program with short collective timeouts; rank 1 sleeps for each chunk."""
    from megatron_doremi.cluster import process_group
    from megatron_doremi.phases.score import _Replica

    process_group.timedelta = lambda **_: timedelta(seconds=timeout)  # type: ignore[attr-defined]
    losses = _Replica._losses

    def slow(self: _Replica, *arguments: Any) -> Any:
        time.sleep(delay if launch.rank == 1 else 0.0)
        return losses(self, *arguments)

    _Replica._losses = slow  # type: ignore[method-assign]
    return program(launch, argv)


def main() -> None:
    """Makes a data set and a reference, and scores."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--collective-seconds", type=float, default=10.0, help="(default: 10)")
    parser.add_argument("--behind-seconds", type=float, default=25.0, help="(default: 25)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = write_data(folder, tokens=600)
        train(1, "reference", data, folder / "reference", 1)
        argv = ["--phase", "score", "--domains", str(data), "--save", str(folder / "scores"), *read_by("score", MODEL)]
        argv += ["--reference-load", str(folder / "reference")]
        codes = on_ranks(2, slow_program, argv, args.collective_seconds, args.behind_seconds)
        print(f"exit codes {codes}, {len(list(folder.rglob('losses/*/*.safetensors')))} of 3 files of losses")


if __name__ == "__main__":
    main()
