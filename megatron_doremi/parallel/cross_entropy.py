"""Cross-entropy of next tokens over a vocabulary that is cut over the tensor group.

No rank ever holds a whole row of logits (Shoeybi et al. 2019, section 3): three all-reduces of one number a
token give the largest logit, the sum of exponentials and the target's logit.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_doremi.parallel.groups import TensorGroup


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, tensor: TensorGroup) -> Tensor:
        rows = torch.arange(targets.numel(), device=logits.device)
        local = targets - tensor.rank * logits.shape[-1]
        outside = (local < 0) | (local >= logits.shape[-1])
        local = local.masked_fill(outside, 0)

        largest = logits.max(dim=-1).values
        if tensor.size > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=tensor.group)
        shifted = logits - largest.unsqueeze(-1)
        target = shifted[rows, local].masked_fill(outside, 0.0)
        exponentials = shifted.exp_()
        total = exponentials.sum(dim=-1)
        if tensor.size > 1:
            both = torch.stack((target, total))
            dist.all_reduce(both, group=tensor.group)
            target, total = both[0], both[1]
        probabilities = exponentials.div_(total.unsqueeze(-1))
        ctx.save_for_backward(probabilities, local, outside)
        return total.log() - target

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        probabilities, local, outside = ctx.saved_tensors
        rows = torch.arange(local.numel(), device=local.device)
        grad_logits = probabilities.clone()
        grad_logits[rows, local] -= (~outside).to(grad_logits.dtype)
        return grad_logits.mul_(grad.unsqueeze(-1)), None, None


def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, tensor: TensorGroup) -> Tensor:
    """Cross-entropy of each target under the output layer, in float32.

    Args:
        hidden: [batch, seq, hidden], the same on every rank of the group; each rank's gradient of it is its
            rows' share and has to be summed by whatever handed it in (`TensorParallel.enter`).
        weight: [padded vocabulary / t, hidden], this rank's rows of the output layer.
        targets: [batch, seq] token ids below `vocab_size`.
        vocab_size: rows from here on are padding and never enter the softmax.
        tensor: the group over which the vocabulary is cut.

    Returns:
        [batch, seq] losses in nats, the same on every rank of the group.
    """
    logits = torch.nn.functional.linear(hidden.flatten(0, 1), weight).float()
    used = vocab_size - tensor.rank * weight.shape[0]
    if used < weight.shape[0]:
        padding = torch.arange(weight.shape[0], device=weight.device) >= used
        logits = logits.masked_fill(padding, float("-inf"))
    losses = _VocabParallelCrossEntropy.apply(logits, targets.flatten(), tensor)
    return losses.view_as(targets)
