"""What all ranks agree on before each step of the optimiser: one small all-reduce.

Whether a loss is finite must be known before the parameters move; that the ranks stop and publish checkpoints after
the same step travels along.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_doremi.data.loader import MicroBatch
from megatron_doremi.doremi.objective import MeanLoss, reduce_sums
from megatron_doremi.errors import RunError


class NonFinite(RunError):
    """A loss or a gradient is infinite or no number: going on would spoil the parameters."""


@dataclass(frozen=True)
class Agreement:
    """The largest of what any rank said.

    Attributes:
        non_finite: a loss of the step is not finite.
        stop: the reason to leave after this step; see stopping.py.
        writing: a rank still writes its part of a checkpoint.
        write_failed: a rank could not.
    """

    non_finite: bool
    stop: int
    writing: bool
    write_failed: bool


def agree(local_sums: Tensor, stop: int, writing: bool, write_failed: bool) -> Agreement:
    """Brings the ranks to one opinion; a collective call of all ranks, and the one wait for the device in a step.

    Args:
        local_sums: [3, k] of this rank's micro-batches (doremi/losses.py); zero away from the last stage.
    """
    said = torch.tensor([0, stop, writing, write_failed], dtype=torch.int64).to(local_sums.device, non_blocking=True)
    said[0] = ~torch.isfinite(local_sums).all()
    dist.all_reduce(said, op=dist.ReduceOp.MAX)
    non_finite, stop, still, failed = said.tolist()
    return Agreement(bool(non_finite), stop, bool(still), bool(failed))


def explain_non_finite(
    objective: MeanLoss, micro_batches: Sequence[MicroBatch], names: Sequence[str], iteration: int
) -> NonFinite:
    """The error for a step whose loss is not finite, with the windows it read; a collective call.

    Args:
        micro_batches: this rank's of the step.
        iteration: the step's number, the first being 1.
    """
    topology = objective.topology
    sums = reduce_sums(objective.local_sums, topology, objective.groups)
    bad = (~torch.isfinite(sums)).any(dim=0).tolist()
    own: list[tuple[int, int]] = []
    if topology.rank == topology.loss_rank():
        for batch in micro_batches:
            own += [(d, w) for d, w in zip(batch.domains.tolist(), batch.windows.tolist(), strict=True) if d >= 0]
    everyone: list[list[tuple[int, int]]] = [own] * topology.world_size
    if topology.world_size > 1:
        dist.all_gather_object(everyone, own)
    windows = sorted(pair for part in everyone for pair in part)
    found = []
    for number, name in enumerate(names):
        read = [window for domain, window in windows if domain == number]
        if bad[number]:
            shown = ", ".join(map(str, read[:20])) + (", ..." if len(read) > 20 else "")
            found.append(f"{name!r} (windows {shown})")
    counts = {name: sum(domain == number for domain, _ in windows) for number, name in enumerate(names)}
    batch_text = ", ".join(f"{name!r} {count}" for name, count in counts.items() if count)
    return NonFinite(
        f"the loss of iteration {iteration} is not finite in {'; '.join(found)}\n"
        f"      the batch: windows of {batch_text}\n"
        "      nothing was saved after the last checkpoint; look at the text with tools/inspect_data.py, or go on\n"
        "      from the checkpoint with a lower --lr or --clip-grad"
    )
