"""The flags of a step: one small all-reduce (MAX) over all ranks before the optimizer's step.

Every rank must know before the parameters change whether all losses, and the gradient norm if it is already computed,
are finite. The same all-reduce tells whether a rank wants to stop and whether checkpoints are still being written.
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
        gradient_non_finite: the gradient norm is NaN or Inf; False if it is not known before the optimizer's step.
        norm: the gradient norm, 0 if it is NaN or Inf; None if it is not known before the optimizer's step.
        stop: the reason to save and exit after this step; see preemption.py.
        writing: a rank is still writing its files of a checkpoint.
        write_failed: a rank failed to write its files.
        save_due: --save-interval-in-mins has elapsed.
    """

    loss_non_finite: bool
    gradient_non_finite: bool
    norm: float | None
    stop: int
    writing: bool
    write_failed: bool
    save_due: bool


def reduce_flags(
    local_sums: Tensor, norm: Tensor | None, stop: int, writing: bool, write_failed: bool, save_due: bool = False
) -> StepFlags:
    """All-reduces the step's flags (MAX) over all ranks; a collective call, and the only device synchronization in a
    step.

    Args:
        local_sums: [3, k] sums over this rank's micro-batches (mixture/statistics.py); zero except on the last stage.
        norm: the global gradient norm; None if it is not known before the optimizer's step.
        stop, writing, write_failed, save_due: this rank's; see `StepFlags`.
    """
    device = local_sums.device
    # In float64, which holds the norm and the small whole numbers.
    flags = torch.tensor([0, 0, 0, stop, writing, write_failed, save_due], dtype=torch.float64)
    flags = flags.to(device, non_blocking=True)
    flags[0] = ~torch.isfinite(local_sums).all()
    if norm is not None:
        flags[1] = ~torch.isfinite(norm)
        flags[2] = torch.nan_to_num(norm, 0.0, 0.0, 0.0)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    loss, gradient, largest, stop, writing, write_failed, save_due = flags.tolist()
    return StepFlags(
        bool(loss),
        bool(gradient),
        None if norm is None else largest,
        int(stop),
        bool(writing),
        bool(write_failed),
        bool(save_due),
    )
