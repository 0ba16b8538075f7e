"""A rank's micro-batches: its slices of the blend's global batches, read from the indexed data one step ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_doremi.data.blend import Blend, BlendState, GlobalBatch
from megatron_doremi.data.permutation import key_of
from megatron_doremi.data.reference_losses import ReferenceLosses
from megatron_doremi.data.token_stream import TokenStream
from megatron_doremi.parallel.topology import Topology

# Fewest on average in a micro-batch whose documents a kernel takes.
TOKENS_A_DOCUMENT = 32


@dataclass(frozen=True)
class MicroBatch:
    """Windows for one forward pass of one rank.

    Attributes:
        tokens: [batch, seq] inputs, int64.
        targets: [batch, seq] the token after each input, int64.
        domains: [batch] domain index of each window, int64; -1 marks padding, which is ignored.
        windows: [batch] index of each window within its domain, int64.
        keys: [batch] of each window's dropout masks, int64, below 2 ** 32; None without dropout.
        reference: [batch, seq] token losses of the reference in nats, float32, on the last stage of a proxy with a
            reference: read with the text if they are recorded, else computed before the step.
        documents: [documents + 1] where the documents of the flattened micro-batch start, and its end, int32, for a
            model whose tokens attend within their documents by a kernel; a window starts a document, and so does the
            token after an end. None: they attend across, or by a mask.
    """

    tokens: Tensor
    targets: Tensor
    domains: Tensor
    windows: Tensor
    reference: Tensor | None = None
    keys: Tensor | None = None
    documents: Tensor | None = None

    def as_pipe_batch(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(inputs, labels), the format of DeepSpeed's pipeline; labels are targets, domains and reference, if any."""
        labels = (self.targets, self.domains)
        return self.tokens, labels if self.reference is None else (*labels, self.reference)

    def to(self, device: torch.device) -> MicroBatch:
        """The micro-batch on a device, except for the window indices, which only messages read.

        Copies from page-locked memory (`pinned`) are asynchronous.
        """
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> MicroBatch:
        """The micro-batch in page-locked host memory; needs a GPU."""
        return self._map(Tensor.pin_memory)

    def copied(self) -> list[Tensor]:
        """The tensors that `to` copies."""
        others = (self.reference, self.keys, self.documents)
        return [self.tokens, self.targets, self.domains, *(each for each in others if each is not None)]

    def _map(self, function: Callable[[Tensor], Tensor]) -> MicroBatch:
        tokens, targets, domains = function(self.tokens), function(self.targets), function(self.domains)
        others = (self.reference, self.keys, self.documents)
        mapped = (None if each is None else function(each) for each in others)
        return MicroBatch(tokens, targets, domains, self.windows, *mapped)


@dataclass(frozen=True)
class Step:
    """One rank's part of a global batch.

    Attributes:
        micro_batches: of this rank; none on the middle stages of a pipeline, unless every stage reads them.
        targets: [k] int64 number of targets of each domain in the global batch.
        state_after: state of the blend after the step.
    """

    micro_batches: tuple[MicroBatch, ...]
    targets: NDArray[np.int64]
    state_after: BlendState


def rank_slice(batch: GlobalBatch, micro_batch_size: int, data_rank: int, data_size: int) -> list[GlobalBatch]:
    """The micro-batches of one data-parallel rank, in order.

    Micro-batch m of rank r holds the windows from (m * data_size + r) * micro_batch_size on, so that a step reads the
    same windows at any layout.
    """
    stride = micro_batch_size * data_size
    parts = []
    for first in range(data_rank * micro_batch_size, len(batch.domains), stride):
        part = slice(first, first + micro_batch_size)
        parts.append(GlobalBatch(batch.domains[part], batch.windows[part]))
    return parts


def document_bounds(tokens: NDArray[np.int64], eod: int, is_text: NDArray[np.bool_]) -> Tensor | None:
    """The bounds of documents, as `MicroBatch.documents` has them.

    Args:
        tokens: [batch, seq] ids.
        is_text: [batch] false for padding, which is one document.

    Returns:
        None if there are so many documents that a kernel's memory, which has up to 128 rows for each in its backward
        pass, would be a multiple of the tokens': more than one in 32 tokens.
    """
    starts = np.ones(tokens.shape, dtype=bool)
    starts[:, 1:] = (tokens[:, :-1] == eod) & is_text[:, None]
    bounds = np.append(np.flatnonzero(starts), tokens.size).astype(np.int32)
    few = max(len(tokens), tokens.size // TOKENS_A_DOCUMENT)
    return torch.from_numpy(bounds) if len(bounds) - 1 <= few else None


def read_windows(
    datasets: Sequence[TokenStream | None],
    part: GlobalBatch,
    seq_length: int,
    reference_losses: ReferenceLosses | None = None,
    eod: int | None = None,
) -> MicroBatch:
    """Reads windows and, from `reference_losses`, the reference's losses on them.

    A window whose domain is -1 becomes padding, without losses.

    Args:
        eod: the id that ends a document, for a model that takes the bounds of documents; else None.
    """
    rows = np.zeros((len(part.domains), seq_length + 1), dtype=np.int64)
    for row, domain, window in zip(rows, part.domains, part.windows, strict=True):
        if domain >= 0:
            dataset = datasets[domain]
            assert dataset is not None, "a window of a domain without data"
            row[:] = dataset.tokens(int(window) * seq_length, seq_length + 1)
    tokens = torch.from_numpy(rows)
    return MicroBatch(
        tokens[:, :-1].contiguous(),
        tokens[:, 1:].contiguous(),
        torch.from_numpy(part.domains.astype(np.int64)),
        torch.from_numpy(part.windows.astype(np.int64)),
        None if reference_losses is None else reference_losses.losses(part.domains, part.windows),
        documents=None if eod is None else document_bounds(rows[:, :-1], eod, part.domains >= 0),
    )


@dataclass(frozen=True)
class StepReader:
    """Reads one rank's part of the global batches.

    Attributes:
        blend: which windows a step reads.
        datasets: [k] the domains' training streams.
        batch_shape: (batch, seq) of a micro-batch.
        topology: the layout and this rank's place in it.
        reference_losses: the reference's losses of a proxy that has them on disk; read on the last stage only.
        drops: the windows get keys for dropout.
        every_stage: all stages of a pipeline read the windows, not only the first and the last.
        eod: see `read_windows`.
    """

    blend: Blend
    datasets: Sequence[TokenStream]
    batch_shape: tuple[int, int]
    topology: Topology
    reference_losses: ReferenceLosses | None = None
    every_stage: bool = False
    drops: bool = False
    eod: int | None = None

    def read(self, state: BlendState, weights: NDArray[np.float64]) -> Step:
        """Reads the step after `state`, under [k] sampling weights."""
        (size, seq_length), topology = self.batch_shape, self.topology
        batch, state_after = self.blend.next_batch(state, weights)
        reads = topology.reads_batches or self.every_stage
        parts = rank_slice(batch, size, topology.data_rank, topology.data_size) if reads else []
        targets = np.bincount(batch.domains, minlength=len(self.blend.names)) * seq_length
        losses = self.reference_losses if topology.is_last_stage else None
        micro_batches = [read_windows(self.datasets, part, seq_length, losses, self.eod) for part in parts]
        if self.drops and reads:
            micro_batches = [
                replace(each, keys=keys) for each, keys in zip(micro_batches, self._keys(state.step + 1), strict=True)
            ]
        if torch.cuda.is_available():
            micro_batches = [each.pinned() for each in micro_batches]
        return Step(tuple(micro_batches), targets, state_after)

    def _keys(self, step: int) -> list[Tensor]:
        """[batch] keys of each micro-batch, from seed, step and a window's place in the global batch."""
        topology, places = self.topology, np.arange(self.blend.batch_size)
        parts = rank_slice(GlobalBatch(places, places), self.batch_shape[0], topology.data_rank, topology.data_size)
        return [
            torch.tensor([key_of(self.blend.seed, "dropout", step, place) & 0xFFFFFFFF for place in part.windows])
            for part in parts
        ]


class DeviceCopies:
    """Copies of the next step's micro-batches to a GPU, beside the computation of this step.

    They are issued by the thread that reads, on a stream of their own, so that neither the device nor the host waits
    where a step begins. A GPU holds the token ids of two steps.
    """

    def __init__(self, device: torch.device, streams: Any = torch.cuda):
        """
        Args:
            streams: what makes and enters streams, torch.cuda.
        """
        self._device, self._streams = device, streams
        self._stream = streams.Stream(device)

    def start(self, step: Step) -> tuple[Step, Any]:
        """Issues the copies; returns the step on the device, and an event after its last copy."""
        with self._streams.stream(self._stream):
            moved = tuple(each.to(self._device) for each in step.micro_batches)
            return replace(step, micro_batches=moved), self._stream.record_event()

    def finish(self, step: Step, event: Any) -> Step:
        """Makes the current stream wait for the copies; the host does not."""
        current = self._streams.current_stream(self._device)
        current.wait_event(event)
        for micro_batch in step.micro_batches:
            for tensor in micro_batch.copied():
                # Memory of one stream that another uses: it is given back when that has gone past its last use.
                tensor.record_stream(current)
        return step


def steps(
    reader: StepReader,
    state: BlendState,
    weights: Callable[[int], NDArray[np.float64]],
    ahead: bool = True,
    total: int | None = None,
    copies: DeviceCopies | None = None,
) -> Iterator[Step]:
    """Yields the steps after `state`; the next one is read in the background while the caller works on one.

    Args:
        weights: returns the [k] sampling weights of a step by its number, the first being 1; with `ahead` it is called
            on the thread that reads.
        ahead: False if a step's weights are known only after the step before it: nothing is read ahead then.
        total: number of the last step; nothing beyond it is read. None: endless.
        copies: puts the micro-batches of steps that are read ahead on the device; None: they stay on the host.
    """

    def read(state: BlendState) -> Step:
        return reader.read(state, weights(state.step + 1))

    def remains(state: BlendState) -> bool:
        return total is None or state.step < total

    if not ahead:
        while remains(state):
            step = read(state)
            yield step
            state = step.state_after
        return

    def read_ahead(state: BlendState) -> tuple[Step, Any]:
        step = read(state)
        return copies.start(step) if copies else (step, None)

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader") as pool:
        pending = pool.submit(read_ahead, state) if remains(state) else None
        while pending is not None:
            step, event = pending.result()
            pending = pool.submit(read_ahead, step.state_after) if remains(step.state_after) else None
            yield copies.finish(step, event) if copies else step
