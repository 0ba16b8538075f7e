"""The phase evaluate: a finished run's model on every domain's held-out text.

DIR/evaluations.jsonl holds a line an evaluation, of any number of runs; a run's own metrics.jsonl is never touched,
whether that run has finished or is still training.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import torch

from megatron_doremi.checkpoint.weights import load_frozen
from megatron_doremi.cluster.watchdog import Watchdog
from megatron_doremi.config import Config
from megatron_doremi.console import say
from megatron_doremi.errors import RunError
from megatron_doremi.mixture.reference import ReferenceRun
from megatron_doremi.parallel.exchange import from_rank_0
from megatron_doremi.parallel.groups import ProcessGroups
from megatron_doremi.parallel.layers import TensorParallel
from megatron_doremi.parallel.topology import Topology
from megatron_doremi.phases.evaluate import HeldOut, evaluate
from megatron_doremi.phases.score import weights_hash
from megatron_doremi.phases.setup import RunData
from megatron_doremi.storage.files import AppendFile, make_folder

EVALUATION_FORMAT = "megatron-doremi-evaluation/1"


def evaluate_run(
    config: Config,
    data: RunData,
    run: ReferenceRun,
    topology: Topology,
    groups: ProcessGroups,
    device: torch.device,
    watchdog: Watchdog,
) -> None:
    """Evaluates a checkpoint of --load, the newest when the program started, at any layout.

    Rank 0 prints the losses and, with --save, appends a line to that folder's evaluations.jsonl.

    Raises:
        NonFinite: a held-out loss is NaN or Inf; nothing is recorded.
    """
    data_config, save = config.data, Path(config.run.save) if config.run.save else None
    from_rank_0(lambda: weights_hash(run.weights, watchdog))
    if save is not None:
        # Tried before the work, not after it.
        from_rank_0(lambda: append_line(save, ""))
    tp = TensorParallel(groups.tensor, config.parallel.sequence_parallel)
    dtype = torch.bfloat16 if config.optimizer.bf16 else torch.float32
    module = load_frozen(run.gpt, run.weights, topology, tp, dtype, config.parallel.loss_chunk_tokens)
    # In batches of the run itself: what is read depends neither on this layout nor on its batch.
    most = data_config.eval_iters * run.global_batch_size
    checkpoint = run.weights.parent
    entries = evaluate(
        module,
        HeldOut(data.names, data.valid, data_config.seq_length, most),
        data_config.micro_batch_size,
        topology,
        groups,
        device,
        str(checkpoint),
        lambda: watchdog.mark("evaluating"),
    )
    if topology.rank == 0:
        _print(entries, checkpoint)
    if save is not None:
        line = {
            "format": EVALUATION_FORMAT,
            "run": str(Path(config.run.load).resolve()),
            "of_this_folder": Path(config.run.load).resolve() == save.resolve(),
            "checkpoint": checkpoint.name,
            "iteration": run.iteration,
            **entries,
            "seq_length": data_config.seq_length,
            "held_out_content": data.held_out_content,
            "bf16": config.optimizer.bf16,
        }
        from_rank_0(lambda: append_line(save, json.dumps(line) + "\n"))


def append_line(folder: Path, line: str) -> None:
    """Appends a line to a folder's evaluations.jsonl; a torn last line is left a line of its own.

    Raises:
        ConfigError: the folder cannot be made.
        RunError: the line could not be written; nothing of it stays.
    """
    make_folder(folder, "--save")
    path = folder / "evaluations.jsonl"
    try:
        with contextlib.closing(AppendFile(path)) as file:
            size = file.size()
            torn = size > 0 and file.read(size - 1, size) != b"\n"
            if line:
                file.append((b"\n" if torn else b"") + line.encode())
            file.make_durable()
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}; the evaluation is not recorded") from error


def _print(entry: dict[str, Any], checkpoint: Path) -> None:
    width = max(map(len, entry["eval"]))
    say(f"held-out loss of {checkpoint}, nats a token")
    for name, loss in entry["eval"].items():
        say(f"  {name:<{width}}  {loss:.4f}")
    say(
        f"uniform mean {entry['eval_uniform_mean']:.4f}, worst {entry['eval_worst']:.4f}, "
        f"token mean {entry['eval_token_mean']:.4f}"
    )
