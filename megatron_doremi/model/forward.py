"""Forward passes without gradients through all pipeline stages, for the frozen reference and evaluation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_doremi.data.loader import MicroBatch
from megatron_doremi.model.unpipelined import GPT
from megatron_doremi.parallel.context import ParallelContext


@torch.no_grad()
def forward_only(
    module: GPT,
    micro_batches: Sequence[MicroBatch],
    count: int,
    shape: tuple[int, int],
    context: ParallelContext,
) -> list[Tensor]:
    """Passes micro-batches through the pipeline in evaluation mode.

    A stage computes micro-batch m + 1 while the next computes m. A collective call of all ranks of a replica.

    Args:
        module: this rank's stage.
        micro_batches: read on the first and the last stage only.
        count: number of micro-batches, on every stage.
        shape: (batch, seq) of a micro-batch.

    Returns:
        On the last stage, for each micro-batch, [batch, seq] token losses in nats; an empty list on other stages.
    """
    topology, was_training = context.topology, module.training
    module.eval()
    parameter = next(module.parameters())
    losses: list[Tensor] = []
    sending: list[tuple[dist.Work, Tensor]] = []
    for number in range(count):
        if topology.is_first_stage:
            x = micro_batches[number].tokens.to(parameter.device)
        else:
            x = torch.empty(module.activation_shape(*shape), dtype=parameter.dtype, device=parameter.device)
            dist.recv(x, topology.neighbor(-1))
        if topology.is_last_stage:
            losses.append(module.run(x, micro_batches[number].targets.to(parameter.device)))
        else:
            x = module.run(x, None)
            x = x.contiguous()
            work = dist.isend(x, topology.neighbor(1))
            assert work is not None
            sending.append((work, x))
    for work, _ in sending:
        work.wait()
    module.train(was_training)
    return losses
