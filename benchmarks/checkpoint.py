"""Training time lost to a checkpoint: DeepSpeed's format, ours written synchronously, ours in the background.

    python -m torch.distributed.run --standalone --nproc-per-node 2 benchmarks/checkpoint.py --output-dir /tmp/c

Rounds of equal length alternate, one without a checkpoint and one with each kind after its first step, so that other
load on the machine affects all of them equally. `stopped` is the time during which training pauses, `lost` the round's
time beyond that of the round without a checkpoint. On a CPU the writing thread slows the training; on a GPU only the
copy to the host costs time.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
warnings.filterwarnings("ignore", category=FutureWarning)
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

from doremi_overhead import DOMAINS, make_config, shape_parser

from megatron_doremi.checkpoint.writer import Checkpointer
from megatron_doremi.cluster.launch import read_launch
from megatron_doremi.cluster.process_group import join
from megatron_doremi.cluster.step_flags import StepFlags, reduce_flags
from megatron_doremi.config import data_parallel_size, gpt_config
from megatron_doremi.data.loader import MicroBatch
from megatron_doremi.engine.build import make_engine
from megatron_doremi.engine.engines import TrainingEngine
from megatron_doremi.mixture.controllers import make_controller, make_objective
from megatron_doremi.parallel.context import make_context
from megatron_doremi.parallel.topology import Topology
from megatron_doremi.plan import make_plan


def parse() -> argparse.Namespace:
    """The command line."""
    parser = shape_parser(__doc__ or "", 2, tensor=1, pipe=1, layers=6, hidden=512, vocab=16000, seq=128)
    parser.add_argument("--steps", type=int, default=12, help="training steps per round (default: 12)")
    parser.add_argument(
        "--rounds", type=int, default=4, help="measured rounds for each kind of checkpoint (default: 4)"
    )
    parser.add_argument(
        "--output-dir", type=Path, required=True, help="folder for the checkpoints; it is removed at the end"
    )
    return parser.parse_args()


def random_batches(args: argparse.Namespace, seed: int) -> list[MicroBatch]:
    """Micro-batches of random ids."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(args.micro_batches):
        ids = torch.randint(0, args.vocab, (args.micro_batch_size, args.seq + 1), generator=generator)
        domains = torch.randint(0, DOMAINS, (args.micro_batch_size,), generator=generator)
        result.append(MicroBatch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), domains, torch.zeros_like(domains)))
    return result


def main() -> None:
    """Times the rounds and prints a table."""
    args = parse()
    launch = read_launch(os.environ)
    config = make_config(args, launch.world_size)
    topology = Topology(args.pipe, data_parallel_size(config.parallel, launch.world_size), args.tensor, launch.rank)
    context = make_context(topology, join(launch)[0])
    gpt, sampling = gpt_config(config.model, args.seq, args.vocab), np.full(DOMAINS, 1 / DOMAINS)
    names = tuple(f"domain {number}" for number in range(DOMAINS))
    plan = make_plan(config, topology, gpt, names, (1,) * DOMAINS, sampling)
    engine = make_engine(plan, make_objective(plan, make_controller(plan), context), context)
    batches = random_batches(args, seed=topology.data_rank)
    checkpointer = Checkpointer(args.output_dir, 1, topology)
    iteration = 0

    def deepspeed() -> None:
        engine.save_checkpoint(str(args.output_dir / "deepspeed"), tag="one")

    def waited_for() -> None:
        checkpointer.start(engine, iteration, {})
        checkpointer.finish()

    def in_the_background() -> None:
        checkpointer.start(engine, iteration, {})

    kinds: dict[str, Callable[[], None] | None] = {
        "none": None,
        "DeepSpeed's own": deepspeed,
        "ours, waited for": waited_for,
        "ours, in the background": in_the_background,
    }
    took: dict[str, list[float]] = {kind: [] for kind in kinds}
    stopped: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(args.rounds + 1):
        for kind, save in kinds.items():
            iteration += args.steps
            seconds, pause = timed_round(engine, batches, args.steps, save, checkpointer)
            if number:
                took[kind].append(seconds)
                stopped[kind].append(pause)
    checkpointer.finish()
    if topology.rank == 0:
        size = sum(p.stat().st_size for p in args.output_dir.rglob("iter_*/**/*") if p.is_file()) / 1e6
        print(f"{launch.world_size} ranks, checkpoints of {size:.0f} MB, rounds of {args.steps} steps; medians")
        base = statistics.median(took["none"])
        print(f"{'checkpoint':<26}{'round':>9}{'stopped':>10}{'lost':>9}")
        for kind in kinds:
            seconds = statistics.median(took[kind])
            print(f"{kind:<26}{seconds:>7.2f} s{statistics.median(stopped[kind]):>8.3f} s{seconds - base:>7.2f} s")
        shutil.rmtree(args.output_dir)
    dist.barrier()
    dist.destroy_process_group()


def timed_round(
    engine: TrainingEngine, batches: list, steps: int, save: Callable[[], None] | None, checkpointer: Checkpointer
) -> tuple[float, float]:
    """(seconds of the round, seconds of it in `save`); publishes the checkpoint that is being written."""
    dist.barrier()
    began = time.perf_counter()
    pause = 0.0
    for step in range(steps):
        agreed: list[StepFlags] = []

        def before_step(norm: Tensor | None, agreed: list[StepFlags] = agreed) -> float | None:
            agreed.append(reduce_flags(engine.objective.current.stats.stack(), norm, 0, *checkpointer.progress()))
            return agreed[0].norm

        engine.train_step(batches, before_step=before_step)
        if not agreed[0].writing:
            checkpointer.all_written()
        if step == 0 and save is not None:
            if engine.device.type == "cuda":
                torch.cuda.synchronize()
            paused = time.perf_counter()
            save()
            pause = time.perf_counter() - paused
    if engine.device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter() - began, pause


if __name__ == "__main__":
    main()
