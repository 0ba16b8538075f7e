"""Loss on each domain's held-out windows: the same windows, and one number, at any batch and layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_doremi.cluster.step_flags import NonFinite, windows_by_domain
from megatron_doremi.data.blend import GlobalBatch, window_count
from megatron_doremi.data.indexed_dataset import IndexedDataset
from megatron_doremi.data.loader import MicroBatch, rank_slice, read_windows
from megatron_doremi.mixture.objective import reduce_sums
from megatron_doremi.mixture.statistics import LOSS, TARGETS, domain_sums, finite_windows
from megatron_doremi.model.forward import forward_only
from megatron_doremi.model.unpipelined import GPT
from megatron_doremi.parallel.exchange import gather_json
from megatron_doremi.parallel.groups import ProcessGroups
from megatron_doremi.parallel.topology import Topology


@dataclass(frozen=True)
class HeldOut:
    """The held-out text of an evaluation.

    Attributes:
        names: of the k domains.
        datasets: [k] each domain's held-out stream, or None.
        seq_length: of a window, in targets.
        max_windows: windows a domain at most, spread evenly over its stream; 0: all.
    """

    names: Sequence[str]
    datasets: Sequence[IndexedDataset | None]
    seq_length: int
    max_windows: int

    def counts(self) -> list[int]:
        """[k] windows of each domain's stream, whether they are read or not; 0 where it has none."""
        return [0 if each is None else window_count(each.num_tokens, self.seq_length) for each in self.datasets]

    def windows(self) -> GlobalBatch:
        """The windows to read, domain after domain."""
        return evaluation_windows(self.counts(), self.max_windows)


def evaluation_windows(counts: Sequence[int], most: int) -> GlobalBatch:
    """Which windows an evaluation reads, domain after domain; neither batch nor layout has a say.

    Args:
        counts: [k] windows of each domain's held-out stream.
        most: windows a domain at most, spread evenly over its stream; 0: all.
    """
    domains, windows = [], []
    for number, count in enumerate(counts):
        taken = min(count, most) if most else count
        windows.append(np.arange(taken, dtype=np.int64) * count // max(1, taken))
        domains.append(np.full(taken, number, dtype=np.int64))
    return GlobalBatch(np.concatenate(domains), np.concatenate(windows))


def pad_to(batch: GlobalBatch, multiple: int) -> GlobalBatch:
    """Adds padding (domain -1) up to a multiple of windows."""
    missing = -len(batch.domains) % multiple
    return GlobalBatch(
        np.concatenate([batch.domains, np.full(missing, -1, dtype=np.int64)]),
        np.concatenate([batch.windows, np.zeros(missing, dtype=np.int64)]),
    )


def evaluate(
    module: GPT,
    text: HeldOut,
    micro_batch_size: int,
    topology: Topology,
    groups: ProcessGroups,
    device: torch.device,
    subject: str,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Losses on held-out windows; a collective call.

    Args:
        subject: whose losses these are, for messages.
        progress: called now and then.

    Returns:
        `evaluation_entries`, on every rank.

    Raises:
        NonFinite: on every rank, naming the windows whose loss is NaN or Inf.
    """
    shape, k = (micro_batch_size, text.seq_length), len(text.datasets)
    batch = pad_to(text.windows(), micro_batch_size * topology.data_size)
    parts = rank_slice(batch, micro_batch_size, topology.data_rank, topology.data_size)
    sums = torch.zeros(3, k, dtype=torch.float64, device=device)
    finite: list[Tensor] = []
    # Enough micro-batches in flight to fill the pipe, few enough to keep what is read small.
    stride = 4 * topology.pipe_size
    for first in range(0, len(parts), stride):
        progress()
        chunk = parts[first : first + stride]
        micro_batches: list[MicroBatch] = []
        if topology.is_first_stage or topology.is_last_stage:
            micro_batches = [read_windows(text.datasets, part, text.seq_length) for part in chunk]
        losses = forward_only(module, micro_batches, len(chunk), shape, topology)
        for micro_batch, loss in zip(micro_batches, losses, strict=False):
            sums += domain_sums(loss, micro_batch.domains.to(device), k)
            finite.append(finite_windows(loss, None)[0])
    total = reduce_sums(sums, topology, groups)
    if not bool(torch.isfinite(total).all()):
        raise _explain(parts, finite, topology, text.names, subject)
    return evaluation_entries(total.tolist(), text.names, text.counts(), text.seq_length)


def _explain(
    parts: Sequence[GlobalBatch], finite: Sequence[Tensor], topology: Topology, names: Sequence[str], subject: str
) -> NonFinite:
    """The error that names the windows of all ranks whose loss is NaN or Inf; a collective call."""
    own: list[tuple[int, int]] = []
    if topology.rank == topology.loss_rank():
        for part, good in zip(parts, finite, strict=True):
            rows = zip(part.domains.tolist(), part.windows.tolist(), good.tolist(), strict=True)
            own += [(domain, window) for domain, window, is_finite in rows if domain >= 0 and not is_finite]
    bad = sorted((domain, window) for part in gather_json(own) for domain, window in part)
    return NonFinite(f"the held-out loss of {subject} is NaN or Inf in {windows_by_domain(bad, names)}")


def evaluation_entries(
    sums: Sequence[Sequence[float]], names: Sequence[str], counts: Sequence[int], seq_length: int
) -> dict[str, Any]:
    """What an evaluation line says of each domain and of all.

    `eval_token_mean` weighs a domain by all its held-out windows, read or not: the mean over all held-out targets, or
    its estimate where --eval-iters limits what is read.

    Args:
        sums: [3, k] over the windows that were read; see mixture/statistics.py for the rows.
        counts: [k] windows of each domain's held-out stream.
    """
    read = [(n, s / t, int(t), c) for n, s, t, c in zip(names, sums[LOSS], sums[TARGETS], counts, strict=True) if t]
    means = {name: mean for name, mean, _, _ in read}
    return {
        "eval": means,
        "eval_uniform_mean": sum(means.values()) / len(means),
        "eval_worst": max(means.values()),
        "eval_token_mean": sum(mean * count for _, mean, _, count in read) / sum(count for *_, count in read),
        "eval_windows": {name: targets // seq_length for name, _, targets, _ in read},
    }
