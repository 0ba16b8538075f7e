"""A training step of ours beside Transformers' Llama of the same shape in a plain PyTorch loop, in one run.

    python benchmarks/train_throughput.py --layers 4 --hidden 256 --seq 256
    python -m torch.distributed.run --standalone --nproc-per-node 2 benchmarks/train_throughput.py

Variants take steps in turn, so that other load on the machine affects all of them equally; on a GPU one variant follows
the other, since each needs the memory. They are ours (the engine of a run, reading a batch as the training loop does),
the same module in a bare loop, and Transformers' model in the same loop, each also compiled with --compile; in one
process Megatron Core's GPT too, where it is installed (`pip install --no-deps megatron-core`). All have the same shape,
batches, precision, AdamW and gradient clipping; with several processes the loops average gradients by
DistributedDataParallel. On a CPU the figure is the process's CPU time and a ratio is the median over turns; on a GPU it
is time, with tokens a second and model FLOPs utilization.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
warnings.filterwarnings("ignore", category=FutureWarning)
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")

import numpy as np
import torch
import torch.distributed as dist
from gpu_place import collect, destroy, step_of
from rival_models import MegatronCoreLoss, TransformersLoss, megatron_core_installed
from torch import Tensor, nn

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

from megatron_doremi.cluster.launch import read_launch
from megatron_doremi.cluster.process_group import join
from megatron_doremi.config import (
    Config,
    DataConfig,
    DoReMiConfig,
    GPTConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    gpt_config,
)
from megatron_doremi.data.loader import MicroBatch
from megatron_doremi.engine.build import make_engine
from megatron_doremi.execution import Execution
from megatron_doremi.mixture.controllers import make_controller, make_objective
from megatron_doremi.model.sizes import parameters_by_layer
from megatron_doremi.model.unpipelined import GPTModel
from megatron_doremi.parallel.context import ParallelContext, make_context
from megatron_doremi.parallel.topology import Topology
from megatron_doremi.phases.metrics import flops_per_token, peak_tflops
from megatron_doremi.plan import RunPlan, make_plan
from megatron_doremi.settings import MAIN

WARM_UP = 3
DOMAINS = ("a", "b")

Step = Callable[[], None]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name, value, text in (
        ("layers", 4, "transformer layers"),
        ("hidden", 256, "hidden size"),
        ("heads", 4, "attention heads"),
        ("seq", 256, "sequence length in tokens"),
        ("vocab", 4096, "vocabulary size"),
        ("micro-batch-size", 4, "windows per micro-batch"),
        ("micro-batches", 1, "micro-batches per rank and step"),
        ("steps", 20, "timed steps of each variant"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{text} (default: {value})")
    parser.add_argument(
        "--model-size", default="", help="a shape of the paper, such as 1b, in place of layers and so on"
    )
    parser.add_argument("--bf16", action="store_true", help="bfloat16 with float32 master weights (ours: ZeRO 1)")
    parser.add_argument("--compile", action="store_true", help="add the compiled variants")
    parser.add_argument("--only", default="", help="variants to run, separated by commas (default: all)")
    return parser.parse_args()


def make_config(args: argparse.Namespace, world_size: int) -> Config:
    """The configuration of our variants, and of the shape of all."""
    batch = args.micro_batch_size * args.micro_batches * world_size
    if args.model_size:
        model = ModelConfig(model_size=args.model_size, swiglu=True, disable_bias_linear=True, norm_epsilon=1e-5)
    else:
        model = ModelConfig(
            num_layers=args.layers,
            hidden_size=args.hidden,
            num_attention_heads=args.heads,
            swiglu=True,
            disable_bias_linear=True,
        )
    return Config(
        DataConfig(
            phase=MAIN, seq_length=args.seq, micro_batch_size=args.micro_batch_size, global_batch_size=batch, seed=1
        ),
        model,
        ParallelConfig(zero_stage=int(args.bf16)),
        DoReMiConfig(),
        OptimizerConfig(bf16=args.bf16),
        RunConfig(),
    )


def batches_of(args: argparse.Namespace, device: torch.device, rank: int) -> list[MicroBatch]:
    """A rank's micro-batches of random ids, whose values do not affect the time."""
    generator, result = torch.Generator().manual_seed(rank), []
    for _ in range(args.micro_batches):
        ids = torch.randint(0, args.vocab, (args.micro_batch_size, args.seq + 1), generator=generator)
        windows = torch.arange(args.micro_batch_size)
        batch = MicroBatch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), windows % len(DOMAINS), windows)
        result.append(batch.pinned() if device.type == "cuda" else batch)
    return result


def ours(plan: RunPlan, context: ParallelContext, batches: list[MicroBatch], engines: list[Any]) -> Step:
    """A step of the training loop's engine, which is appended to `engines`."""
    engines.append(make_engine(plan, make_objective(plan, make_controller(plan), context), context))
    return step_of(engines[-1], batches)


class OurLoss(nn.Module):
    """Our module and the mean loss of a micro-batch."""

    def __init__(self, gpt: GPTConfig, context: ParallelContext, execution: Execution):
        super().__init__()
        self.model = GPTModel(gpt, context, 1, execution)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """[batch, seq] ids and targets -> the mean loss in nats."""
        return self.model(tokens, targets).mean()


def plain_loop(
    module: nn.Module, args: argparse.Namespace, context: ParallelContext, batches: list[MicroBatch]
) -> Step:
    """A plain loop: forward and backward passes, clipping, AdamW; in bfloat16 with float32 master weights by hand."""
    module.to(context.device)
    weights: list[Tensor] = list(module.parameters())
    masters = weights
    if args.bf16:
        module.to(torch.bfloat16)
        masters = [weight.detach().float() for weight in weights]
    optimizer = torch.optim.AdamW(masters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    replicas = nn.parallel.DistributedDataParallel(module) if context.topology.data_size > 1 else None
    scale = 1 / len(batches)

    def step() -> None:
        for number, batch in enumerate(batches):
            tokens = batch.tokens.to(context.device, non_blocking=True)
            targets = batch.targets.to(context.device, non_blocking=True)
            last = number == len(batches) - 1
            with replicas.no_sync() if replicas is not None and not last else contextlib.nullcontext():
                loss: Tensor = (replicas or module)(tokens, targets) * scale
                loss.backward()
        if args.bf16:
            for master, weight in zip(masters, weights, strict=True):
                assert weight.grad is not None
                master.grad, weight.grad = weight.grad.float(), None
        nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if args.bf16:
            with torch.no_grad():
                torch._foreach_copy_(weights, masters)

    return step


def variants(
    args: argparse.Namespace,
    config: Config,
    gpt: GPTConfig,
    context: ParallelContext,
    batches: list[MicroBatch],
    engines: list[Any],
) -> dict[str, Callable[[], Step]]:
    """What makes the steps to time, by name."""

    def plan(compiled: bool) -> RunPlan:
        parallel = replace(config.parallel, compile=compiled)
        shares = np.full(len(DOMAINS), 1 / len(DOMAINS))
        return make_plan(
            replace(config, parallel=parallel), context.topology, gpt, DOMAINS, (1,) * len(DOMAINS), shares
        )

    def loop(module: nn.Module, compiled: bool) -> Step:
        assert sum(p.numel() for p in module.parameters()) == sum(parameters_by_layer(gpt, 1))
        if compiled:
            module.compile()
        return plain_loop(module, args, context, batches)

    def our_module(compiled: bool) -> nn.Module:
        return OurLoss(gpt, context, plan(compiled).execution(alternating=False))

    makers: dict[str, Callable[[], Step]] = {}
    for compiled in (False, True) if args.compile else (False,):
        suffix = " compiled" if compiled else ""
        makers |= {
            f"transformers{suffix}": partial(lambda c: loop(TransformersLoss(gpt, context.device), c), compiled),
            f"ours{suffix}": partial(lambda c: ours(plan(c), context, batches, engines), compiled),
            f"ours{suffix} in a bare loop": partial(lambda c: loop(our_module(c), False), compiled),
        }
    if megatron_core_installed() and context.topology.world_size == 1:
        makers["megatron core"] = lambda: loop(MegatronCoreLoss(gpt, context.device), False)
    chosen = args.only.split(",") if args.only else list(makers)
    return {name: makers[name] for name in chosen}


def clock(device: torch.device) -> float:
    """Seconds: on a GPU of time, when it has finished its work; else of this process's CPU time."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def main() -> None:
    """Times the variants in turn and prints a table."""
    args, launch = parse(), read_launch(os.environ)
    config = make_config(args, launch.world_size)
    context = make_context(Topology(1, launch.world_size, 1, launch.rank), join(launch)[0])
    if context.device.type == "cpu":
        torch.set_num_threads(1)
    gpt = gpt_config(config.model, args.seq, args.vocab)
    engines: list[Any] = []
    makers = variants(args, config, gpt, context, batches_of(args, context.device, launch.rank), engines)
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    # A GPU has no other load, and may not have memory for all at once.
    for together in [[name] for name in makers] if context.device.type == "cuda" else [list(makers)]:
        time_in_turns({name: makers[name]() for name in together}, args.steps, context, seconds)
        while engines:
            destroy(engines.pop())
        collect()
    if launch.rank == 0:
        report(args, config, gpt, context, seconds)
    if dist.is_initialized():
        dist.destroy_process_group()


def time_in_turns(
    steps: dict[str, Step], count: int, context: ParallelContext, seconds: dict[str, list[float]]
) -> None:
    """Takes `count` steps of each after those that warm up, and appends what they took."""
    for turn in range(count + WARM_UP):
        for name, step in steps.items():
            if context.topology.world_size > 1:
                dist.barrier()
            began = clock(context.device)
            step()
            if turn >= WARM_UP:
                seconds[name].append(clock(context.device) - began)


def report(
    args: argparse.Namespace,
    config: Config,
    gpt: GPTConfig,
    context: ParallelContext,
    seconds: dict[str, list[float]],
) -> None:
    """Prints medians, and ratios to the first variant with the quartiles of the ratios of single turns."""
    tokens = args.micro_batch_size * args.micro_batches * args.seq
    on_gpu = context.device.type == "cuda"
    where = torch.cuda.get_device_name() if on_gpu else f"{os.cpu_count()} CPU cores, one thread a process"
    precision = "bfloat16" if args.bf16 else "float32"
    print(
        f"{gpt.num_layers} layers x {gpt.hidden_size}, vocabulary {gpt.vocab_size:,}, {context.topology.data_size} "
        f"process(es), {args.micro_batches} x [{args.micro_batch_size}, {args.seq}] tokens each, {precision}; {where}"
    )
    first = next(iter(seconds))
    print(f"{'':<26} {'ms a step':>10} {'tokens/s':>10} {'MFU':>6} {'ratio':>7}  {'quartiles':>13}")
    peak = peak_tflops(torch.cuda.get_device_name()) if on_gpu else None
    for name, times in seconds.items():
        turns = sorted(a / b for a, b in zip(times, seconds[first], strict=True))
        low, high = turns[len(turns) // 4], turns[3 * len(turns) // 4]
        median = statistics.median(times)
        flops = flops_per_token(gpt, args.seq) * tokens / median / 1e12
        mfu = f"{flops / peak:.3f}" if peak else "-"
        print(
            f"{name:<26} {1e3 * median:>10.1f} {tokens / median:>10,.0f} {mfu:>6} {statistics.median(turns):>7.3f}"
            f"  {low:>6.3f} {high:>6.3f}"
        )


if __name__ == "__main__":
    main()
