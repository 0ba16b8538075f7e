"""The phase evaluate: a finished run's model on every domain's held-out text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from megatron_doremi.config import Config, global_batch_size
from megatron_doremi.data.files import atomic_write_text, make_folder
from megatron_doremi.model.weights import load_frozen
from megatron_doremi.parallel.groups import ProcessGroups
from megatron_doremi.parallel.layers import TensorParallel
from megatron_doremi.parallel.topology import Topology
from megatron_doremi.training.evaluate import evaluate
from megatron_doremi.training.metrics import evaluation_entries
from megatron_doremi.training.metrics_file import MetricsFile
from megatron_doremi.training.setup import RunData, read_trained
from megatron_doremi.training.watchdog import Watchdog


def evaluate_run(
    config: Config,
    data: RunData,
    topology: Topology,
    groups: ProcessGroups,
    device: torch.device,
    watchdog: Watchdog,
) -> None:
    """Evaluates the newest checkpoint of --load at any layout.

    Rank 0 prints the losses and, with --save, adds an evaluation line to that folder's metrics.jsonl.
    """
    run = read_trained(Path(config.run.load), "--load", data, config)
    tp = TensorParallel(groups.tensor, config.parallel.sequence_parallel)
    dtype = torch.bfloat16 if config.optimizer.bf16 else torch.float32
    module = load_frozen(run.gpt, run.weights, topology, tp, dtype, config.parallel.loss_chunk_tokens)
    most = config.data.eval_iters * global_batch_size(config, topology.world_size)
    shape = (config.data.micro_batch_size, config.data.seq_length)
    sums = evaluate(module, data.valid, shape, most, topology, groups, device, lambda: watchdog.mark("evaluating"))
    if topology.rank == 0:
        entry = {"iteration": run.iteration, **evaluation_entries(sums.tolist(), data.names)}
        _report(entry, config, run.weights.parent)


def _report(entry: dict[str, Any], config: Config, checkpoint: Path) -> None:
    width = max(map(len, entry["eval"]))
    print(f"held-out loss of {checkpoint}, nats a token")
    for name, loss in entry["eval"].items():
        print(f"  {name:<{width}}  {loss:.4f}")
    print(
        f"uniform mean {entry['eval_uniform_mean']:.4f}, worst {entry['eval_worst']:.4f}, "
        f"token mean {entry['eval_token_mean']:.4f}"
    )
    if config.run.save:
        save = Path(config.run.save)
        make_folder(save, "--save")
        if not (save / "config.json").exists():
            text = json.dumps({"phase": config.data.phase, "settings": config.to_dict()}, indent=2)
            atomic_write_text(save / "config.json", text + "\n")
        metrics = MetricsFile(save / "metrics.jsonl", entry["iteration"])
        metrics.write(entry)
        metrics.close()
