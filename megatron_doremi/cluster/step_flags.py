"""The flags of a step: one small all-reduce (MAX) over all ranks before the optimizer moves anything.

Whether the losses are finite, and the gradient's norm where it is known by then, must be known before the parameters
move; whether a rank wants to stop, and how far its checkpoint is, travels along.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class StepFlags:
    """The maximum over all ranks of each flag.

    Attributes:
        loss_non_finite: a loss of the step, the model's or the reference's, is NaN or Inf.
        gradient_non_finite: the norm of the step's gradient is, where it is known before the step.
        stop: the reason to leave after this step; see preemption.py.
        writing: a rank still writes its part of a checkpoint.
        write_failed: a rank could not.
        save_due: a checkpoint is due by time.
    """

    loss_non_finite: bool
    gradient_non_finite: bool
    stop: int
    writing: bool
    write_failed: bool
    save_due: bool


def reduce_flags(
    local_sums: Tensor, norm: Tensor | None, stop: int, writing: bool, write_failed: bool, save_due: bool = False
) -> StepFlags:
    """All-reduces the step's flags (MAX); a collective call of all ranks, and the one wait for the device in a step.

    Args:
        local_sums: [3, k] of this rank's micro-batches (mixture/statistics.py); zero away from the last stage.
        norm: the gradient's global norm, where it is known before the optimizer's step.
    """
    device = local_sums.device
    flags = torch.tensor([0, 0, stop, writing, write_failed, save_due], dtype=torch.int64)
    flags = flags.to(device, non_blocking=True)
    flags[0] = ~torch.isfinite(local_sums).all()
    if norm is not None:
        flags[1] = ~torch.isfinite(norm)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    loss, gradient, stop, writing, write_failed, save_due = flags.tolist()
    return StepFlags(bool(loss), bool(gradient), stop, bool(writing), bool(write_failed), bool(save_due))
