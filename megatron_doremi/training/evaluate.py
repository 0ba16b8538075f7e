"""Loss on each domain's held-out windows, the same at any layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_doremi.data.blend import GlobalBatch, window_count
from megatron_doremi.data.indexed_dataset import IndexedDataset
from megatron_doremi.data.loader import MicroBatch, rank_slice, read_windows
from megatron_doremi.doremi.losses import domain_sums
from megatron_doremi.doremi.objective import reduce_sums
from megatron_doremi.model.forward import forward_only
from megatron_doremi.model.whole import GPT
from megatron_doremi.parallel.groups import ProcessGroups
from megatron_doremi.parallel.topology import Topology


def evaluation_windows(token_counts: Sequence[int], seq_length: int, most: int) -> GlobalBatch:
    """The held-out windows that an evaluation reads, domain after domain.

    Args:
        token_counts: [k] tokens of each domain's held-out stream; 0 where it has none.
        most: windows a domain at the most, spread evenly over its stream; 0: all.
    """
    domains, windows = [], []
    for number, tokens in enumerate(token_counts):
        count = window_count(tokens, seq_length)
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
    datasets: Sequence[IndexedDataset | None],
    shape: tuple[int, int],
    most: int,
    topology: Topology,
    groups: ProcessGroups,
    device: torch.device,
    progress: Callable[[], None] = lambda: None,
) -> Tensor:
    """Sums over held-out windows; a collective call.

    Args:
        datasets: [k] each domain's held-out stream, or None.
        shape: (batch, seq) of a micro-batch.
        most: windows a domain at the most; 0: all.
        progress: called now and then.

    Returns:
        [3, k] float64 sums on every rank; see doremi/losses.py for the rows.
    """
    micro_batch_size, seq_length = shape
    counts = [0 if dataset is None else dataset.num_tokens for dataset in datasets]
    batch = pad_to(evaluation_windows(counts, seq_length, most), micro_batch_size * topology.data_size)
    parts = rank_slice(batch, micro_batch_size, topology.data_rank, topology.data_size)
    sums = torch.zeros(3, len(datasets), dtype=torch.float64, device=device)
    # Enough micro-batches in flight to fill the pipe, few enough to keep what is read small.
    stride = 4 * topology.pipe_size
    for first in range(0, len(parts), stride):
        progress()
        chunk = parts[first : first + stride]
        micro_batches: list[MicroBatch] = []
        if topology.is_first_stage or topology.is_last_stage:
            micro_batches = [read_windows(datasets, part, seq_length) for part in chunk]
        losses = forward_only(module, micro_batches, len(chunk), shape, topology)
        for micro_batch, loss in zip(micro_batches, losses, strict=False):
            sums += domain_sums(loss, micro_batch.domains.to(device), len(datasets))
    return reduce_sums(sums, topology, groups)
