"""DoReMi's overhead: step times of proxies relative to plain training, measured side by side in one process group.

    python -m torch.distributed.run --standalone --nproc-per-node 2 benchmarks/doremi_overhead.py

Four engines of one shape alternate step by step, so that other load on the machine affects all of them equally:
plain training (1F1B), a proxy with recorded losses, a proxy with the online reference, and a proxy with recorded
losses and the simultaneous update. Each engine reads tokens and recorded losses from disk through its own loader, as in
training. Prints ratios of medians by rank 0's clock, which waits for the slowest rank in every step. The token ids are
random: their values do not affect the time.

In theory the ratios are 1, 4/3 (a forward pass is a third of a step) and 1.

With more than one stage it then prints the pipeline's bubble: the time that the pipeline takes for M micro-batches over
the busiest stage's compute time, at best (M + P - 1) / M in either schedule.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
warnings.filterwarnings("ignore", category=FutureWarning)
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")

import numpy as np
import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

from megatron_doremi.cluster.launch import read_launch
from megatron_doremi.cluster.process_group import join
from megatron_doremi.config import (
    Config,
    DataConfig,
    DoReMiConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    data_parallel_size,
    gpt_config,
)
from megatron_doremi.data.blend import Blend, BlendState, window_count
from megatron_doremi.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter, dtype_for
from megatron_doremi.data.loader import MicroBatch, Step, StepReader, steps
from megatron_doremi.data.reference_loss_file import CHUNK_WINDOWS
from megatron_doremi.data.reference_losses import ReferenceLosses, ReferenceLossFolder
from megatron_doremi.engine.build import make_engine
from megatron_doremi.engine.engines import TrainingEngine
from megatron_doremi.mixture.controllers import make_controller, make_objective
from megatron_doremi.model.forward import forward_only
from megatron_doremi.model.unpipelined import make_gpt
from megatron_doremi.parallel.context import ParallelContext, make_context
from megatron_doremi.parallel.exchange import broadcast_json
from megatron_doremi.parallel.topology import Topology
from megatron_doremi.plan import make_plan
from megatron_doremi.settings import MAIN, PROXY

HELP = {
    "tensor": "tensor parallel size",
    "pipe": "pipeline stages",
    "layers": "transformer layers",
    "hidden": "hidden size",
    "vocab": "vocabulary size",
    "seq": "sequence length in tokens",
}
DOMAINS = 8
NAMES = tuple(f"domain-{number}" for number in range(DOMAINS))
# Windows per domain: two files of losses.
WINDOWS = 6000


def shape_parser(description: str, micro_batches: int, **sizes: int) -> argparse.ArgumentParser:
    """A parser with flags for a model's shape and its batches, with these defaults."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{HELP[name]} (default: {value})")
    parser.add_argument("--micro-batch-size", type=int, default=2, help="windows per micro-batch (default: 2)")
    help_text = f"micro-batches per rank and step (default: {micro_batches})"
    parser.add_argument("--micro-batches", type=int, default=micro_batches, help=help_text)
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16 with ZeRO 1")
    return parser


def parse() -> argparse.Namespace:
    """The command line."""
    parser = shape_parser(__doc__ or "", 4, tensor=1, pipe=2, layers=4, hidden=256, vocab=4096, seq=256)
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each engine (default: 30)")
    return parser.parse_args()


def make_config(args: argparse.Namespace, world_size: int) -> Config:
    """The configuration that all engines share."""
    parallel = ParallelConfig(args.tensor, args.pipe, zero_stage=int(args.bf16), loss_chunk_tokens=0)
    batch = args.micro_batch_size * args.micro_batches * data_parallel_size(parallel, world_size)
    return Config(
        DataConfig(
            phase=MAIN, seq_length=args.seq, micro_batch_size=args.micro_batch_size, global_batch_size=batch, seed=1
        ),
        ModelConfig(num_layers=args.layers, hidden_size=args.hidden, num_attention_heads=4, swiglu=True),
        parallel,
        DoReMiConfig(),
        OptimizerConfig(bf16=args.bf16),
        RunConfig(),
    )


def write_data(folder: Path, args: argparse.Namespace, windows: int) -> None:
    """Writes an indexed dataset of random ids for every domain, and recorded losses of all its windows."""
    generator = np.random.default_rng(1)
    fingerprint = {
        "tokenizer_sha256": None,
        "data_fingerprint": "0" * 64,
        "domains": list(NAMES),
        "seq_length": args.seq,
        "precision": "bfloat16" if args.bf16 else "float32",
        "reference": "0" * 64,
        "reference_iteration": 0,
    }
    losses = ReferenceLossFolder(folder / "losses", fingerprint)
    for domain, name in enumerate(NAMES):
        with IndexedDatasetWriter(folder / name, dtype_for(args.vocab)) as writer:
            writer.add_document(generator.integers(0, args.vocab, windows * args.seq + 1))
        for first in range(0, windows, CHUNK_WINDOWS):
            numbers = np.arange(first, min(windows, first + CHUNK_WINDOWS))
            rows = generator.uniform(0, 2 * np.log(args.vocab), (len(numbers), args.seq))
            losses.add(domain, first // CHUNK_WINDOWS, numbers, rows)


def batches(
    folder: Path, args: argparse.Namespace, config: Config, topology: Topology, recorded: bool = False
) -> Iterator[Step]:
    """Steps as the training loop reads them."""
    data = [IndexedDataset(folder / name) for name in NAMES]
    counts = tuple(window_count(dataset.num_tokens, args.seq) for dataset in data)
    blend = Blend(NAMES, counts, config.data.global_batch_size, config.data.seed)
    losses = ReferenceLosses(folder / "losses", NAMES, {}) if recorded and topology.is_last_stage else None
    reader = StepReader(blend, data, (args.micro_batch_size, args.seq), topology, losses)
    return steps(reader, BlendState.start(len(NAMES)), lambda step: np.full(len(NAMES), 1 / len(NAMES)))


def main() -> None:
    """Times the engines and prints the ratios."""
    args = parse()
    launch = read_launch(os.environ)
    config = make_config(args, launch.world_size)
    topology = Topology(args.pipe, data_parallel_size(config.parallel, launch.world_size), args.tensor, launch.rank)
    context = make_context(topology, join(launch)[0])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(broadcast_json(temporary))
        if launch.rank == 0:
            write_data(folder, args, WINDOWS)
        dist.barrier()
        run(args, config, context, folder)
        dist.barrier()
    dist.destroy_process_group()


def run(
    args: argparse.Namespace,
    config: Config,
    context: ParallelContext,
    folder: Path,
) -> None:
    """Builds the engines and times their steps in turn."""
    topology = context.topology
    gpt, sampling = gpt_config(config.model, args.seq, args.vocab), np.full(DOMAINS, 1 / DOMAINS)

    def build(phase: str, update: str = "alternating") -> TrainingEngine:
        chosen = replace(
            config, data=replace(config.data, phase=phase), doremi=replace(config.doremi, doremi_update=update)
        )
        plan = make_plan(chosen, topology, gpt, NAMES, (1,) * DOMAINS, sampling)
        return make_engine(plan, make_objective(plan, make_controller(plan), context), context)

    plain, with_recorded, online = build(MAIN), build(PROXY), build(PROXY)
    simultaneous = build(PROXY, "simultaneous")
    model = make_gpt(gpt, context, seed=2).requires_grad_(False)
    model.to(torch.bfloat16 if args.bf16 else torch.float32)
    shape = (args.micro_batch_size, args.seq)

    def score(micro_batches: tuple[MicroBatch, ...]) -> tuple[MicroBatch, ...]:
        losses = forward_only(model, micro_batches, args.micro_batches, shape, context)
        if not losses:
            return micro_batches
        return tuple(replace(batch, reference=loss) for batch, loss in zip(micro_batches, losses, strict=True))

    def reading(engine: TrainingEngine, recorded: bool = False, online: bool = False) -> Callable[[], None]:
        coming = batches(folder, args, config, topology, recorded)

        def take() -> None:
            step = next(coming)
            targets = torch.from_numpy(step.targets).to(context.device, torch.float64)
            engine.train_step(score(step.micro_batches) if online else step.micro_batches, targets)

        return take

    variants = {
        "plain": reading(plain),
        "proxy, recorded losses": reading(with_recorded, recorded=True),
        "proxy, online reference": reading(online, online=True),
        "proxy, recorded losses, simultaneous": reading(simultaneous, recorded=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for step in range(args.steps + 3):
        for name, run in variants.items():
            dist.barrier()
            began = time.perf_counter()
            run()
            if context.device.type == "cuda":
                torch.cuda.synchronize()
            dist.barrier()
            if step >= 3:
                seconds[name].append(time.perf_counter() - began)
    if topology.rank == 0:
        report(seconds, args, topology)
    if topology.pipe_size > 1:
        for name, engine, variant in (
            ("1F1B", plain, "plain"),
            ("alternating", with_recorded, "proxy, recorded losses"),
        ):
            stretch, unequal = stretches(engine, variants[variant], args, topology)
            if topology.rank == 0:
                ideal = (args.micro_batches + topology.pipe_size - 1) / args.micro_batches
                print(
                    f"bubble, {name}: under way / busy = {stretch:.3f}; (M + P - 1) / M = {ideal:.3f}, "
                    f"and {unequal:.3f} for stages as unequal as these"
                )


def stretches(
    engine: TrainingEngine, step: Callable[[], None], args: argparse.Namespace, topology: Topology
) -> tuple[float, float]:
    """Medians over steps of the pipeline's time divided by its busiest stage's compute time, and of the lower bound of
    this ratio for stages of these unequal times, 1 + (their sum - the largest) / (M * the largest).
    """
    spent = {"busy": 0.0, "after": 0.0}
    after = ("ReduceTiedGrads", "ReduceGrads", "OptimizerStep")
    original = engine._INSTRUCTION_MAP

    def timed(run: Callable[..., None], kind: str) -> Callable[..., None]:
        def wrapper(self: TrainingEngine, *args: object, **kwargs: object) -> None:
            began = time.perf_counter()
            run(self, *args, **kwargs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            spent[kind] += time.perf_counter() - began

        return wrapper

    kinds = {"ForwardPass": "busy", "BackwardPass": "busy", **dict.fromkeys(after, "after")}
    timed_instructions = {
        command: timed(run, kinds[command.__name__]) if command.__name__ in kinds else run
        for command, run in original.items()
    }
    # The engine merges `instructions()` into its map last, so an attribute of the instance replaces every entry.
    engine.instructions = lambda: timed_instructions
    ratios = []
    for _ in range(max(5, args.steps // 3)):
        spent |= {"busy": 0.0, "after": 0.0}
        dist.barrier()
        began = time.perf_counter()
        step()
        dist.barrier()
        times = torch.zeros(topology.pipe_size + 2, dtype=torch.float64, device=engine.device)
        times[topology.pipe_rank] = spent["busy"]
        # Gradient reduction and the optimizer step run after the pipeline has drained.
        times[-2], times[-1] = time.perf_counter() - began, -spent["after"]
        dist.all_reduce(times, op=dist.ReduceOp.MAX)
        *busy, elapsed, least_after = times.tolist()
        unequal = 1 + (sum(busy) - max(busy)) / (args.micro_batches * max(busy))
        ratios.append(((elapsed + least_after) / max(busy), unequal))
    del engine.instructions
    measured, least = zip(*ratios, strict=True)
    return statistics.median(measured), statistics.median(least)


def report(seconds: dict[str, list[float]], args: argparse.Namespace, topology: Topology) -> None:
    """Prints medians and ratios; a ratio's quartiles are those of the ratios of single turns."""
    print(
        f"tensor {topology.tensor_size} x pipeline {topology.pipe_size} x data {topology.data_size}, "
        f"{args.micro_batches} micro-batches"
    )
    plain = seconds["plain"]
    print(f"{'':<36} {'ms a step':>10} {'ratio':>7}  {'quartiles of the turns':>22}")
    for name, times in seconds.items():
        turns = sorted(seconds_of_step / base for seconds_of_step, base in zip(times, plain, strict=True))
        low, high = turns[len(turns) // 4], turns[3 * len(turns) // 4]
        ratio = statistics.median(times) / statistics.median(plain)
        print(f"{name:<36} {1e3 * statistics.median(times):>10.1f} {ratio:>7.3f}  {low:>11.3f} {high:>10.3f}")


if __name__ == "__main__":
    main()
