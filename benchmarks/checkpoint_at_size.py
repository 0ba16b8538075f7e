"""Seconds and peak memory of a run's start, save, resume and --init-from, on every rank, against the size of its shard.

    python benchmarks/checkpoint_at_size.py --output-dir /tmp/c --save-at 1,1,2,1 --load-at 2,1,1,1
    python benchmarks/checkpoint_at_size.py --output-dir /tmp/c --sparse --model-size 8b --load-at 8,1,1,1

A layout is TENSOR,PIPE,DATA,ZERO; training is in bfloat16. Each stage runs in processes of its own: a run that draws
its initial values and saves; one that resumes at the same layout; one at --load-at; one that takes the weights alone
there. For each part it prints the seconds and the CPU time of the slowest rank, and the largest resident memory of a
rank beyond what it held once everything was imported. `shard` is what a rank holds: weights and optimizer state.

With --sparse files without content stand in for the checkpoint, and one process reads what rank 0 of --load-at reads,
one parameter after the other.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
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

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import itertools

from convert import shape, write_sparse

from megatron_doremi.checkpoint.folder import check_contents, checkpoint_name, checkpoints_folder, read_state
from megatron_doremi.checkpoint.optimizer_state import OptimizerFolder, owned_state, start_state, write_index
from megatron_doremi.checkpoint.reader import check_files, load_training, load_weights
from megatron_doremi.checkpoint.resharding import spec_entry
from megatron_doremi.checkpoint.weights import WeightsFolder
from megatron_doremi.checkpoint.writer import Checkpointer
from megatron_doremi.cluster.launch import read_launch
from megatron_doremi.cluster.process_group import join
from megatron_doremi.config import (
    PAPER_SHAPES,
    Config,
    DataConfig,
    DoReMiConfig,
    GPTConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
)
from megatron_doremi.engine.build import make_engine
from megatron_doremi.engine.engines import TrainingEngine
from megatron_doremi.mixture.controllers import make_controller, make_objective
from megatron_doremi.model.sizes import parameter_specs
from megatron_doremi.parallel.context import ParallelContext, make_context
from megatron_doremi.parallel.deepspeed_internals import local_shard
from megatron_doremi.parallel.parameters import ParameterSpec
from megatron_doremi.parallel.topology import Topology
from megatron_doremi.plan import make_plan

STAGES = ("save", "resume", "init")
KEYS = ("exp_avg", "exp_avg_sq", "master")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model-size", default="280m", choices=PAPER_SHAPES, help="default: 280m")
    parser.add_argument("--vocab-size", type=int, default=50257, help="default: 50257")
    parser.add_argument("--save-at", type=layout, default="1,1,2,1", help="layout that saves (default: 1,1,2,1)")
    parser.add_argument("--load-at", type=layout, default="2,1,1,1", help="layout that loads (default: 2,1,1,1)")
    parser.add_argument("--sparse", action="store_true", help="files without content; one process reads")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder; it is removed at the end")
    parser.add_argument("--stage", choices=STAGES, help="of one rank; the program starts them itself")
    return parser.parse_args()


def layout(text: str) -> tuple[int, ...]:
    """(tensor, pipe, data, zero) of TENSOR,PIPE,DATA,ZERO."""
    numbers = tuple(map(int, text.split(",")))
    if len(numbers) != 4:
        raise argparse.ArgumentTypeError("TENSOR,PIPE,DATA,ZERO")
    return numbers


class Meter:
    """Seconds and peak memory of each part of one rank's work.

    Attributes:
        parts: {part: (seconds, seconds of CPU time, bytes beyond those at the start)}.
    """

    def __init__(self) -> None:
        self.parts: dict[str, tuple[float, float, int]] = {}
        self._base = _reset_peak()

    def __call__(self, part: str, work: Callable[[], object]) -> None:
        """Does and measures `work`."""
        _reset_peak()
        began, worked = time.perf_counter(), time.process_time()
        work()
        seconds = time.perf_counter() - began, time.process_time() - worked
        self.parts[part] = *seconds, _status("VmHWM") - self._base


def _status(entry: str) -> int:
    """Bytes of an entry of this process's status."""
    lines = Path("/proc/self/status").read_text().split("\n")
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{entry}:"))


def _reset_peak() -> int:
    """Begins to count the peak of resident memory; returns what is resident."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def rank_work(args: argparse.Namespace) -> None:
    """One rank's work in a stage; rank 0 prints what the ranks measured."""
    tensor, pipe, data, zero = args.load_at if args.stage == "init" else args.save_at
    launch = read_launch(os.environ)
    topology = Topology(pipe, data, tensor, launch.rank)
    context = make_context(topology, join(launch)[0])
    folder, meter = checkpoints_folder(args.output_dir) / checkpoint_name(1), Meter()
    built: list[TrainingEngine] = []
    drawn = args.stage == "save"
    meter("drawing and building" if drawn else "building", lambda: built.append(build(args, context, zero, not drawn)))
    engine = built[0]
    if args.stage == "save":
        start_state(engine, 1)
        checkpointer = Checkpointer(args.output_dir, 0, topology)
        state = {"blend": {"step": 1, "credits": {}, "cursors": {}}}
        meter("copying to the host", lambda: checkpointer.start(engine, 1, state))
        meter("writing", checkpointer.finish)
    elif args.stage == "resume":
        meter("reading headers", lambda: check_files(folder))
        meter("checksums", lambda: check_contents(folder, read_state(folder), topology.rank, topology.world_size))
        meter("reading", lambda: load_training(engine, folder, context, 1))
    else:
        meter("reading", lambda: load_weights(engine, WeightsFolder(folder / "weights"), context))
    weights = sum(local_shard(p).numel() * p.element_size() for _, p in engine.module.model_parameters())
    owned = sum(t.numel() * 4 for each in owned_state(engine, topology.data_rank) for t in each.tensors.values())
    report(meter.parts, weights, owned)


def build(args: argparse.Namespace, context: ParallelContext, zero: int, to_be_loaded: bool) -> TrainingEngine:
    """An engine of this layout."""
    tensor, pipe = context.topology.tensor_size, context.topology.pipe_size
    batch = context.topology.data_size * max(pipe, 1)
    config = Config(
        DataConfig(phase="main", seq_length=128, micro_batch_size=1, global_batch_size=batch, seed=1),
        ModelConfig(),
        ParallelConfig(tensor, pipe, zero_stage=zero),
        DoReMiConfig(),
        OptimizerConfig(bf16=True),
        RunConfig(),
    )
    plan = make_plan(config, context.topology, shape(args), ("a",), (1,), np.ones(1))
    return make_engine(plan, make_objective(plan, make_controller(plan), context), context, to_be_loaded)


def report(parts: dict[str, tuple[float, float, int]], weights: int, owned: int) -> None:
    """Prints, on rank 0, the largest figures of all ranks."""
    names = list(parts)
    figures = torch.tensor([*(number for name in names for number in parts[name]), weights, owned]).double()
    dist.all_reduce(figures, dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        *values, weights, owned = figures.tolist()
        print(f"    shard: {weights / 2**30:.2f} GiB of weights, {owned / 2**30:.2f} GiB of the optimizer's state")
        for number, name in enumerate(names):
            print_part(name, *values[3 * number : 3 * number + 3])
    dist.barrier()
    dist.destroy_process_group()


def print_part(name: str, seconds: float, worked: float, peak: float) -> None:
    """Prints the figures of a part."""
    text = f"    {name:<24}{seconds:8.2f} s, {worked:8.2f} s of CPU time, peak {peak / 2**30:6.2f} GiB"
    print(text, flush=True)


def start_ranks(args: argparse.Namespace, stage: str, at: tuple[int, ...]) -> None:
    """Runs a stage at a layout and waits for it."""
    text = ",".join(map(str, at))
    print(f"{stage} at TENSOR,PIPE,DATA,ZERO {text}", flush=True)
    ranks = str(math.prod(at[:3]))
    flags = ["--model-size", args.model_size, "--vocab-size", str(args.vocab_size), "--stage", stage]
    flags += ["--save-at", text, "--load-at", text, "--output-dir", str(args.output_dir)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, __file__]
    subprocess.run([*command, *flags], check=True)


def pieces(total: int, parts: int) -> list[tuple[int, int]]:
    """(start, count) of `parts` consecutive ranges."""
    bounds = [total * number // parts for number in range(parts + 1)]
    return [(low, high - low) for low, high in itertools.pairwise(bounds)]


def write_sparse_checkpoint(folder: Path, gpt: GPTConfig, at: tuple[int, ...]) -> None:
    """Weights and optimizer state of a layout without a pipeline, as files that take no space on disk."""
    size, replicas = at[0], at[2]
    (folder / "weights").mkdir(parents=True)
    (folder / "optimizer").mkdir()
    specs = written_specs(gpt, size)
    parts = []
    for rank in range(size):
        mine = {name: spec for name, spec in specs.items() if spec.dim is not None or rank == 0}
        entries = {name: spec_entry(spec, size) for name, spec in mine.items()}
        local = {n: torch.empty(s.local_shape(size), dtype=torch.bfloat16, device="meta") for n, s in mine.items()}
        path = folder / "weights" / f"model-pipe000-tensor{rank:03d}.safetensors"
        write_sparse(path, local, {"cut": json.dumps(entries)}, "BF16")
        for replica in range(replicas):
            name, shares = f"rank-{replica * size + rank:05d}.safetensors", dict[str, tuple[int, int]]()
            for parameter, tensor in local.items():
                shares[parameter] = pieces(tensor.numel(), replicas)[replica]
            moments = {f"{n}/{k}": torch.empty(c, device="meta") for n, (_, c) in shares.items() for k in KEYS}
            write_sparse(folder / "optimizer" / name, moments, {}, "F32")
            described = {n: {**entries[n], "piece": [rank, *share]} for n, share in shares.items()}
            parts.append({"file": name, "keys": list(KEYS), "pieces": described})
    write_index(folder / "optimizer", parts)


def written_specs(gpt: GPTConfig, size: int) -> dict[str, ParameterSpec]:
    """The parameters as `size` tensor ranks shard them."""
    padded = gpt.padded_vocab_size(size)
    return {
        name: ParameterSpec(spec.shape, spec.dim, spec.blocks, padded if spec.shape[0] == gpt.vocab_size else 0)
        for name, spec in parameter_specs(gpt).items()
    }


def read_sparse(folder: Path, gpt: GPTConfig, at: tuple[int, ...]) -> None:
    """Reads what rank 0 of a layout reads, and prints seconds and memory."""
    size, replicas = at[0], at[2]
    topology, specs, meter = Topology(1, replicas, size, 0), written_specs(gpt, size), Meter()

    def weights() -> None:
        opened = WeightsFolder(folder / "weights")
        for name, spec in specs.items():
            opened.local_shard(name, spec, topology)

    def optimizer() -> None:
        opened = OptimizerFolder(folder / "optimizer")
        for name, spec in specs.items():
            for key in KEYS:
                start, count = pieces(math.prod(spec.local_shape(size)), replicas)[0]
                opened.local_range(name, key, spec, topology, start, count)

    meter("weights", weights)
    meter("optimizer's state", optimizer)
    largest = max(math.prod(spec.local_shape(size)) for spec in specs.values())
    total = sum(math.prod(spec.local_shape(size)) for spec in specs.values())
    owned = 12 * total / replicas / 2**30
    print(f"    shard: {2 * total / 2**30:.2f} GiB of weights, {owned:.2f} GiB of the optimizer's state", end="; ")
    print(f"the largest parameter's: {2 * largest / 2**30:.2f} GiB of weights, {4 * largest / 2**30:.2f} of a moment")
    for name, figures in meter.parts.items():
        print_part(name, *figures)


def main() -> None:
    """Runs the stages one after the other."""
    args = parse()
    if args.stage:
        rank_work(args)
        return
    shutil.rmtree(args.output_dir, ignore_errors=True)
    if args.sparse:
        write_sparse_checkpoint(args.output_dir, shape(args), args.save_at)
        read_sparse(args.output_dir, shape(args), args.load_at)
    else:
        print(
            f"{args.model_size}: {sum(math.prod(s.shape) for s in parameter_specs(shape(args)).values()):,} parameters"
        )
        start_ranks(args, "save", args.save_at)
        start_ranks(args, "resume", args.save_at)
        start_ranks(args, "resume", args.load_at)
        start_ranks(args, "init", args.load_at)
    shutil.rmtree(args.output_dir)


if __name__ == "__main__":
    main()
