"""Loss on each domain's held-out windows; the windows do not depend on the batch size or the layout.

Training evaluates with `evaluate`. The phase evaluate, `evaluate_run`, evaluates the model of a run and appends a line
to DIR/evaluations.jsonl, which may hold evaluations of several runs. It never modifies the run's metrics.jsonl, so the
run may still be training.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_doremi.cluster.watchdog import Watchdog
from megatron_doremi.console import say
from megatron_doremi.data.blend import GlobalBatch
from megatron_doremi.data.loader import MicroBatch, rank_slice, read_windows
from megatron_doremi.errors import RunError
from megatron_doremi.mixture.non_finite import NonFinite, windows_by_domain
from megatron_doremi.mixture.objective import reduce_stats, reduce_sums
from megatron_doremi.mixture.reference import TrainedModel, load_trained
from megatron_doremi.mixture.statistics import DomainStats, domain_stats, finite_windows
from megatron_doremi.model.forward import Stage, forward_only, reads_windows
from megatron_doremi.parallel.context import ParallelContext
from megatron_doremi.parallel.exchange import from_rank_0, gather_json
from megatron_doremi.phases.evaluation_entries import evaluation_entries, evaluation_table, interval_entries
from megatron_doremi.phases.held_out import (
    DocumentParts,
    DocumentSums,
    HeldOut,
    document_parts,
    pad_to,
    windows_before,
)
from megatron_doremi.phases.run_data import RunData, held_out
from megatron_doremi.phases.score import weights_hash
from megatron_doremi.plan import RunPlan
from megatron_doremi.progress import Progress, stage
from megatron_doremi.storage.files import AppendFile, make_folder

EVALUATION_FORMAT = "megatron-doremi-evaluation/1"


# Losses that a rank holds before it moves them to the host, which waits for the device.
_LOSSES_AT_ONCE = 1 << 22


def evaluate(
    module: Stage,
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
        `evaluation_entries`, on every rank, and on rank 0 also `interval_entries`.

    Raises:
        NonFinite: on every rank, naming the windows whose loss is NaN or Inf.
    """
    topology, device = context.topology, context.device
    shape, k = (micro_batch_size, text.seq_length), len(text.datasets)
    windows, each = text.windows(), micro_batch_size * topology.data_size
    batch = pad_to(windows, each)
    parts = rank_slice(batch, micro_batch_size, topology.data_rank, topology.data_size)
    before = rank_slice(windows_before(batch), micro_batch_size, topology.data_rank, topology.data_size)
    stats, documents = DomainStats.zeros(k, device), DocumentSums(text)
    finite: list[Tensor] = []
    held: list[tuple[Sequence[DocumentParts], Tensor]] = []
    # Enough micro-batches to fill the pipeline, few enough to bound the memory for windows.
    stride = 4 * topology.pipe_size
    total = len(windows.domains)
    shown = Progress(f"evaluating {subject}", total, "window", topology.rank == 0)
    for first in range(0, len(parts), stride):
        progress()
        chunk = parts[first : first + stride]
        micro_batches: list[MicroBatch] = []
        if reads_windows(module, topology):
            micro_batches = [
                read_windows(text.datasets, part, text.seq_length, None, module.document_eod) for part in chunk
            ]
        losses = forward_only(module, micro_batches, len(chunk), shape, context)
        for micro_batch, loss in zip(micro_batches, losses, strict=False):
            stats = stats + domain_stats(loss, micro_batch.domains.to(device), k)
            finite.append(finite_windows(loss, None)[0])
        if topology.rank == topology.loss_rank():
            # While the device works on the losses.
            pairs = zip(chunk, before[first : first + stride], strict=True)
            held += zip((document_parts(text, *pair) for pair in pairs), losses, strict=True)
        if len(held) * math.prod(shape) >= _LOSSES_AT_ONCE or first + stride >= len(parts):
            for documents_of_batch, loss in held:
                documents.add(documents_of_batch, loss.cpu().double().numpy())
            held.clear()
        shown.update(min(len(chunk) * each, total - first * each))
    shown.close()
    totals = reduce_stats(stats, context)
    sums = reduce_sums(torch.from_numpy(documents.sums).to(device), context).cpu().numpy()
    if not bool(torch.isfinite(totals.loss).all()):
        raise _explain(parts, finite, context, text.names, subject)
    entries = evaluation_entries(totals, sums, text.names, text.shares, text.seq_length)
    if topology.rank == 0:
        entries |= interval_entries(entries, sums, text.names, text.shares)
    return entries


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


def evaluate_run(
    plan: RunPlan,
    data: RunData,
    model: TrainedModel,
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
    with stage(f"checking the weights in {model.files}", context.topology.rank == 0):
        from_rank_0(lambda: weights_hash(model, watchdog))
    with stage(f"loading {model.files}", context.topology.rank == 0):
        module = load_trained(model, context, plan.dtype, plan.frozen_execution)
    if save is not None:
        # Finds out before the evaluation whether the file can be written.
        from_rank_0(lambda: append_line(save, ""))
    # --eval-iters counts batches of the run, so that the windows do not depend on this layout or batch size.
    max_windows = data_config.eval_iters * model.global_batch_size
    entries = evaluate(
        module,
        held_out(data, data_config.seq_length, max_windows),
        data_config.micro_batch_size,
        context,
        str(model.path),
        lambda: watchdog.mark("evaluating"),
    )
    if context.topology.rank == 0:
        say("\n".join([f"held-out loss of {model.path}", *(f"  {row}" for row in evaluation_table(entries))]))
    if save is not None:
        line = {
            "format": EVALUATION_FORMAT,
            "run": str(Path(config.run.load_folder).resolve()),
            "of_this_folder": Path(config.run.load_folder).resolve() == save.resolve(),
            "checkpoint": model.path.name,
            "iteration": model.iteration,
            **entries,
            "seq_length": data_config.seq_length,
            "held_out_content": data.held_out_content,
            "held_out_text": data.held_out_text,
            "tokenizer_sha256": data.tokenizer_sha256,
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
