"""What the flags of docs/training.md add to a training step.

    python benchmarks/turned_on.py --layers 4 --hidden 256 --seq 256

Takes the flags of train_throughput.py. Variants take steps in turn; the figure is the median over turns of a variant's
time by that of the same step without the flag: the process's CPU time on a CPU, time on a GPU.
"""

from __future__ import annotations

import os
import statistics
from dataclasses import replace

import numpy as np
import torch
import train_throughput as plain

from megatron_doremi.cluster.launch import read_launch
from megatron_doremi.cluster.process_group import join
from megatron_doremi.config import gpt_config
from megatron_doremi.parallel.context import make_context
from megatron_doremi.parallel.topology import Topology
from megatron_doremi.plan import make_plan
from megatron_doremi.training_settings import TrainingConfig


def main() -> None:
    """Times the variants in turn and prints a table."""
    args, launch = plain.parse(), read_launch(os.environ)
    config = plain.make_config(args, launch.world_size)
    config = replace(config, parallel=replace(config.parallel, compile=args.compile))
    context = make_context(Topology(1, launch.world_size, 1, launch.rank), join(launch)[0])
    gpt, shares = gpt_config(config.model, args.seq, args.vocab), np.full(len(plain.DOMAINS), 1 / len(plain.DOMAINS))
    resets, off = replace(gpt, reset_position_ids=True, reset_attention_mask=True, eod=0), config.training
    variants = {
        "plain": (gpt, config),
        "--reset-position-ids --reset-attention-mask": (resets, config),
        "--z-loss": (gpt, replace(config, training=TrainingConfig(z_loss=1e-4))),
        "--hidden-dropout": (gpt, replace(config, training=replace(off, hidden_dropout=0.1))),
        "--attention-dropout": (gpt, replace(config, training=replace(off, attention_dropout=0.1))),
        "--optimizer muon": (gpt, replace(config, optimizer=replace(config.optimizer, optimizer="muon"))),
    }
    steps = {}
    for name, (shape, settings) in variants.items():
        batches = plain.batches_of(args, context.device, launch.rank)
        if settings.training.drops:
            batches = [replace(each, keys=torch.arange(len(each.tokens))) for each in batches]
        plan = make_plan(settings, context.topology, shape, plain.DOMAINS, (1,) * len(plain.DOMAINS), shares)
        steps[name] = plain.ours(plan, context, batches, [])
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(plain.WARM_UP + args.steps):
        for name, step in steps.items():
            start = plain.clock(context.device)
            step()
            if turn >= plain.WARM_UP:
                seconds[name].append(plain.clock(context.device) - start)
    if launch.rank:
        return
    for name, taken in seconds.items():
        ratios = [a / b for a, b in zip(taken, seconds["plain"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{name:45} {statistics.median(taken):8.4f} s   {middle:.3f} ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
