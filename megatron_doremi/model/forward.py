"""Forward passes without gradients through all pipeline stages, for the frozen reference and evaluation."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_doremi.data.loader import MicroBatch
from megatron_doremi.parallel.context import ParallelContext
from megatron_doremi.parallel.topology import Topology


class Stage(Protocol):
    """The part of a model that a rank holds: a module of this program, or one that Transformers runs."""

    training: bool

    @property
    def every_stage_reads(self) -> bool:
        """See `NamedLayers.every_stage_reads`."""

    def train(self, mode: bool = True) -> nn.Module:
        """Sets the training mode, as in `torch.nn.Module`."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """As in `torch.nn.Module`."""

    @property
    def document_eod(self) -> int | None:
        """See `NamedLayers.document_eod`."""

    def run(
        self, x: Tensor, targets: Tensor | None, tokens: Tensor | None = None, documents: Tensor | None = None
    ) -> Tensor:
        """See `NamedLayers.run`."""

    def activation_shape(self, micro_batch_size: int, seq_length: int) -> tuple[int, int, int]:
        """See `NamedLayers.activation_shape`."""


def reads_windows(module: Stage, topology: Topology) -> bool:
    """Whether this rank reads the windows that `forward_only` passes through the model."""
    return topology.reads_batches or module.every_stage_reads


@torch.no_grad()
def forward_only(
    module: Stage,
    micro_batches: Sequence[MicroBatch],
    count: int,
    shape: tuple[int, int],
    context: ParallelContext,
) -> list[Tensor]:
    """Passes micro-batches through the pipeline in evaluation mode.

    A stage computes micro-batch m + 1 while the next computes m, and holds at most two that it sends. A collective call
    of all ranks of a replica.

    Args:
        module: this rank's stage.
        micro_batches: read on stages that have a use for them (`reads_windows`) only.
        count: number of micro-batches, on every stage.
        shape: (batch, seq) of a micro-batch.

    Returns:
        On the last stage, for each micro-batch, [batch, seq] token losses in nats; an empty list on other stages.
    """
    topology, was_training = context.topology, module.training
    module.train(False)
    parameter = next(module.parameters())
    losses: list[Tensor] = []
    sending: deque[tuple[dist.Work, Tensor]] = deque()
    for number in range(count):
        tokens = documents = None
        if module.every_stage_reads:
            tokens, documents = micro_batches[number].tokens.to(parameter.device), micro_batches[number].documents
            documents = None if documents is None else documents.to(parameter.device)
        if topology.is_first_stage:
            x = micro_batches[number].tokens.to(parameter.device)
        else:
            x = torch.empty(module.activation_shape(*shape), dtype=parameter.dtype, device=parameter.device)
            dist.recv(x, topology.neighbor(-1))
        if topology.is_last_stage:
            losses.append(module.run(x, micro_batches[number].targets.to(parameter.device), tokens, documents))
        else:
            x = module.run(x, None, tokens, documents)
            x = x.contiguous()
            work = dist.isend(x, topology.neighbor(1))
            assert work is not None
            sending.append((work, x))
            if len(sending) > 1:
                # The next stage has taken it by now, unless it is slower: then this one would wait for it later.
                sending.popleft()[0].wait()
    for work, _ in sending:
        work.wait()
    module.train(was_training)
    return losses
