"""Filling tensors in memory with numbers from files: several files at a time, and each replica a share.

Memory beyond the tensors that are filled holds a block or two for each thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from megatron_doremi.parallel.collectives import all_gather_into
from megatron_doremi.parallel.context import ParallelContext
from megatron_doremi.parallel.deepspeed_internals import is_partitioned, local_piece
from megatron_doremi.parallel.exchange import on_all_ranks

# Reads of one rank at a time; a parallel file system gives one reader a part of its bandwidth.
THREADS = 8

# (first number, values) of consecutive blocks of a flattened tensor.
Blocks = Iterable[tuple[int, Tensor]]
# Reads a range, given as its first number and their number.
ReadRange = Callable[[int, int], Blocks]
Job = Callable[[], None]


@torch.no_grad()
def fill(flat: Tensor, start: int, read: ReadRange) -> None:
    """Fills `flat`, [count] on any device and of any type, with the range of a tensor that begins at `start`."""
    for first, values in read(start, len(flat)):
        flat[first - start : first - start + len(values)].copy_(values)


def run_jobs(jobs: Sequence[Job], progress: Callable[[], None] = lambda: None) -> None:
    """Runs `jobs`, `THREADS` at a time. Raises the error of the first that fails; those after it may not have run.

    Args:
        progress: called before the result of each is awaited.
    """
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="reader")
    try:
        for future in [pool.submit(job) for job in jobs]:
            progress()
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def fill_parameters(
    parameters: Iterable[tuple[Tensor, ReadRange]],
    others: Sequence[Job],
    context: ParallelContext,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Fills this rank's part of each parameter; a collective call where there are several replicas.

    A parameter that all replicas hold is read once: each replica reads a share and gets the others' from them.

    Args:
        parameters: and what reads them, as this rank's tensor parallel shard.
        others: jobs to be run beside.

    Raises:
        ConfigError: of the first job that fails, on every rank.
    """
    topology, jobs, shared = context.topology, list[Job](), list[Tensor]()
    for parameter, read in parameters:
        start, flat = local_piece(parameter, topology.data_rank)
        if is_partitioned(parameter) or topology.data_size == 1:
            jobs.append(lambda flat=flat, start=start, read=read: fill(flat, start, read))  # type: ignore[misc]
            continue
        shared.append(flat)
        for low, count in _shares(len(flat), topology.data_size, topology.data_rank):
            part = flat[low : low + count]
            jobs.append(lambda part=part, low=low, read=read: fill(part, low, read))  # type: ignore[misc]
    read_all = partial(run_jobs, [*jobs, *others], progress)
    # Ranks that exchange what they have read first agree that all have.
    read_all() if topology.data_size == 1 else on_all_ranks(read_all)
    for flat in shared:
        progress()
        _gather(flat, context)


def _shares(count: int, replicas: int, replica: int) -> Iterator[tuple[int, int]]:
    """(first number, number of them) that one replica reads: an equal share, and what equal shares leave over."""
    share = count // replicas
    yield from ((low, n) for low, n in ((replica * share, share), (replicas * share, count % replicas)) if n)


@torch.no_grad()
def _gather(flat: Tensor, context: ParallelContext) -> None:
    """Completes a flattened parameter with the shares that the other replicas have read."""
    replicas, replica = context.topology.data_size, context.topology.data_rank
    share = len(flat) // replicas
    if share:
        # As bytes: no backend has to know the type.
        own = flat[replica * share : (replica + 1) * share].clone().view(torch.uint8)
        all_gather_into(flat[: replicas * share].view(torch.uint8), own, group=context.groups.data)
