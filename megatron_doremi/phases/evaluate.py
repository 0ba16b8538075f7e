"""Loss on each domain's held-out windows; the windows do not depend on the batch size or the layout.

Training evaluates with `evaluate`. The phase evaluate, `evaluate_run`, evaluates the model of a run and appends a line
to DIR/evaluations.jsonl, which may hold evaluations of several runs. It never modifies the run's metrics.jsonl, so the
run may still be training.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_doremi.checkpoint.reader import load_frozen
from megatron_doremi.cluster.watchdog import Watchdog
from megatron_doremi.console import print_stdout
from megatron_doremi.data.blend import GlobalBatch, window_count
from megatron_doremi.data.indexed_dataset import IndexedDataset
from megatron_doremi.data.loader import MicroBatch, rank_slice, read_windows
from megatron_doremi.errors import RunError
from megatron_doremi.mixture.non_finite import NonFinite, windows_by_domain
from megatron_doremi.mixture.objective import reduce_stats
from megatron_doremi.mixture.reference import ReferenceRun
from megatron_doremi.mixture.statistics import DomainStats, domain_stats, finite_windows
from megatron_doremi.model.forward import forward_only
from megatron_doremi.model.unpipelined import GPT
from megatron_doremi.parallel.context import ParallelContext
from megatron_doremi.parallel.exchange import from_rank_0, gather_json
from megatron_doremi.phases.run_data import RunData
from megatron_doremi.phases.score import weights_hash
from megatron_doremi.plan import RunPlan
from megatron_doremi.storage.files import AppendFile, make_folder

EVALUATION_FORMAT = "megatron-doremi-evaluation/1"


@dataclass(frozen=True)
class HeldOut:
    """The held-out text of an evaluation.

    Attributes:
        names: of the k domains.
        datasets: [k] held-out stream of each domain, or None.
        seq_length: targets of a window.
        max_windows: maximum number of windows per domain, spread evenly over its stream; 0: all.
    """

    names: Sequence[str]
    datasets: Sequence[IndexedDataset | None]
    seq_length: int
    max_windows: int

    def counts(self) -> list[int]:
        """[k] windows in each domain's stream, including those not read; 0 without a stream."""
        return [0 if each is None else window_count(each.num_tokens, self.seq_length) for each in self.datasets]

    def windows(self) -> GlobalBatch:
        """The windows to read, domain by domain."""
        return evaluation_windows(self.counts(), self.max_windows)


def evaluation_windows(counts: Sequence[int], max_windows: int) -> GlobalBatch:
    """The windows that an evaluation reads, domain by domain, at any batch size and layout.

    Args:
        counts: [k] windows in each domain's held-out stream.
        max_windows: maximum number of windows per domain, spread evenly over its stream; 0: all.
    """
    domains, windows = [], []
    for number, count in enumerate(counts):
        taken = min(count, max_windows) if max_windows else count
        windows.append(np.arange(taken, dtype=np.int64) * count // max(1, taken))
        domains.append(np.full(taken, number, dtype=np.int64))
    return GlobalBatch(np.concatenate(domains), np.concatenate(windows))


def pad_to(batch: GlobalBatch, multiple: int) -> GlobalBatch:
    """Pads a batch (with domain -1) to a multiple of `multiple` windows."""
    missing = -len(batch.domains) % multiple
    return GlobalBatch(
        np.concatenate([batch.domains, np.full(missing, -1, dtype=np.int64)]),
        np.concatenate([batch.windows, np.zeros(missing, dtype=np.int64)]),
    )


def evaluate(
    module: GPT,
    text: HeldOut,
    micro_batch_size: int,
    context: ParallelContext,
    subject: str,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Losses on held-out windows; a collective call.

    Args:
        subject: name of the model, for messages.
        progress: called after every few micro-batches.

    Returns:
        `evaluation_entries`, on every rank.

    Raises:
        NonFinite: on every rank, naming the windows whose loss is NaN or Inf.
    """
    topology, device = context.topology, context.device
    shape, k = (micro_batch_size, text.seq_length), len(text.datasets)
    batch = pad_to(text.windows(), micro_batch_size * topology.data_size)
    parts = rank_slice(batch, micro_batch_size, topology.data_rank, topology.data_size)
    stats = DomainStats.zeros(k, device)
    finite: list[Tensor] = []
    # Enough micro-batches to fill the pipeline, few enough to bound the memory for windows.
    stride = 4 * topology.pipe_size
    for first in range(0, len(parts), stride):
        progress()
        chunk = parts[first : first + stride]
        micro_batches: list[MicroBatch] = []
        if topology.reads_batches:
            micro_batches = [read_windows(text.datasets, part, text.seq_length) for part in chunk]
        losses = forward_only(module, micro_batches, len(chunk), shape, context)
        for micro_batch, loss in zip(micro_batches, losses, strict=False):
            stats = stats + domain_stats(loss, micro_batch.domains.to(device), k)
            finite.append(finite_windows(loss, None)[0])
    total = reduce_stats(stats, context)
    if not bool(torch.isfinite(total.loss).all()):
        raise _explain(parts, finite, context, text.names, subject)
    return evaluation_entries(total, text.names, text.counts(), text.seq_length)


def _explain(
    parts: Sequence[GlobalBatch], finite: Sequence[Tensor], context: ParallelContext, names: Sequence[str], subject: str
) -> NonFinite:
    """The error that names the windows, of all ranks, whose loss is NaN or Inf; a collective call."""
    local: list[tuple[int, int]] = []
    if context.topology.rank == context.topology.loss_rank():
        for part, good in zip(parts, finite, strict=True):
            rows = zip(part.domains.tolist(), part.windows.tolist(), good.tolist(), strict=True)
            local += [(domain, window) for domain, window, is_finite in rows if domain >= 0 and not is_finite]
    bad = sorted((domain, window) for part in gather_json(local) for domain, window in part)
    return NonFinite(f"the held-out loss of {subject} is NaN or Inf in {windows_by_domain(bad, names)}")


def evaluation_entries(
    stats: DomainStats, names: Sequence[str], counts: Sequence[int], seq_length: int
) -> dict[str, Any]:
    """The entries of an evaluation line: the loss of each domain, and the means, in nats per token.

    `eval_token_mean` weights a domain by all of its held-out windows, including those not read: it is the mean over
    all held-out targets, or an estimate of it if --eval-iters limits the windows.

    Args:
        stats: over the windows that were read.
        counts: [k] windows in each domain's held-out stream.
    """
    loss, targets = torch.stack((stats.loss, stats.targets)).tolist()
    read = [(n, s / t, int(t), c) for n, s, t, c in zip(names, loss, targets, counts, strict=True) if t]
    means = {name: mean for name, mean, _, _ in read}
    return {
        "eval": means,
        "eval_uniform_mean": sum(means.values()) / len(means),
        "eval_worst": max(means.values()),
        "eval_token_mean": sum(mean * count for _, mean, _, count in read) / sum(count for *_, count in read),
        "eval_windows": {name: count // seq_length for name, _, count, _ in read},
    }


def evaluate_run(
    plan: RunPlan,
    data: RunData,
    run: ReferenceRun,
    context: ParallelContext,
    watchdog: Watchdog,
) -> None:
    """Evaluates the checkpoint of --load that was the newest when the program started, at any layout.

    Rank 0 prints the losses and, with --save, appends a line to evaluations.jsonl in that folder.

    Raises:
        NonFinite: a held-out loss is NaN or Inf; nothing is recorded.
    """
    config = plan.config
    data_config, save = config.data, Path(config.run.save) if config.run.save else None
    from_rank_0(lambda: weights_hash(run.weights, watchdog))
    if save is not None:
        # Finds out before the evaluation whether the file can be written.
        from_rank_0(lambda: append_line(save, ""))
    module = load_frozen(run.gpt, run.weights, context, plan.dtype, config.parallel.loss_chunk_tokens)
    # --eval-iters counts batches of the run, so that the windows do not depend on this layout or batch size.
    max_windows = data_config.eval_iters * run.global_batch_size
    checkpoint = run.weights.parent
    entries = evaluate(
        module,
        HeldOut(data.names, data.valid, data_config.seq_length, max_windows),
        data_config.micro_batch_size,
        context,
        str(checkpoint),
        lambda: watchdog.mark("evaluating"),
    )
    if context.topology.rank == 0:
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
    """Appends a line to a folder's evaluations.jsonl; a torn last line becomes a separate line.

    Raises:
        ConfigError: the folder cannot be created.
        RunError: the line could not be written; no part of it remains.
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
    print_stdout(f"held-out loss of {checkpoint}, nats per token")
    for name, loss in entry["eval"].items():
        print_stdout(f"  {name:<{width}}  {loss:.4f}")
    print_stdout(
        f"uniform mean {entry['eval_uniform_mean']:.4f}, worst {entry['eval_worst']:.4f}, "
        f"token mean {entry['eval_token_mean']:.4f}"
    )
