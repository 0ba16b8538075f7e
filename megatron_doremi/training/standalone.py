"""The phase evaluate: a finished run's model on every domain's held-out text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from megatron_doremi.config import Config, global_batch_size
from megatron_doremi.data.files import atomic_write_text, make_folder
from megatron_doremi.doremi.reference import check_reference, read_run_config
from megatron_doremi.errors import ConfigError, Fault
from megatron_doremi.model.pipeline import GPTPipeline
from megatron_doremi.model.weights import WeightsFolder
from megatron_doremi.parallel.groups import ProcessGroups
from megatron_doremi.parallel.layers import TensorParallel
from megatron_doremi.parallel.topology import Topology
from megatron_doremi.training.checkpoint import newest_checkpoint, read_state
from megatron_doremi.training.evaluate import evaluate
from megatron_doremi.training.metrics import MetricsFile, evaluation_entries
from megatron_doremi.training.setup import RunData


def evaluate_run(
    config: Config, data: RunData, topology: Topology, groups: ProcessGroups, device: torch.device
) -> None:
    """Evaluates the newest checkpoint of --load at any layout.

    Rank 0 prints the losses and, with --save, adds an evaluation line to that folder's metrics.jsonl.
    """
    folder = Path(config.run.load)
    gpt = check_reference(read_run_config(folder, "--load"), "--load", folder, data.manifest, config.data.seq_length)
    checkpoint = newest_checkpoint(folder)
    if checkpoint is None:
        raise ConfigError(Fault(f"--load {folder}", "no complete checkpoint", "a trained run", "train it first"))
    tp = TensorParallel(groups.tensor, config.parallel.sequence_parallel)
    module = GPTPipeline(gpt, topology, tp, seed=0)
    WeightsFolder(checkpoint / "weights").load_into(module, topology)
    module.to(torch.bfloat16 if config.optimizer.bf16 else torch.float32)
    most = config.data.eval_iters * global_batch_size(config, topology.world_size)
    shape = (config.data.micro_batch_size, config.data.seq_length)
    sums = evaluate(module, data.valid, shape, most, topology, groups, device)
    if topology.rank == 0:
        iteration = int(read_state(checkpoint)["iteration"])
        _report({"iteration": iteration, **evaluation_entries(sums.tolist(), data.names)}, config, checkpoint)


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
        metrics = MetricsFile(save / "metrics.jsonl", entry["iteration"], evaluates=True)
        metrics.write(entry)
        metrics.close()
