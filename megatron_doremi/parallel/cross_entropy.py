"""Cross-entropy of next tokens over a vocabulary that is cut over the tensor group.

No rank ever holds a whole row of logits (Shoeybi et al. 2019, section 3): three all-reduces of one number a
token give the largest logit, the sum of exponentials and the target's logit.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_doremi.parallel.groups import TensorGroup


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, first: int, tensor: TensorGroup) -> Tensor:
        rows = torch.arange(targets.numel(), device=logits.device)
        local = targets - first
        outside = (local < 0) | (local >= logits.shape[-1])
        local = local.masked_fill(outside, 0)

        largest = logits.max(dim=-1).values
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=tensor.group)
        shifted = logits - largest.unsqueeze(-1)
        target = shifted[rows, local].masked_fill(outside, 0.0)
        exponentials = shifted.exp_()
        total = exponentials.sum(dim=-1)
        both = torch.stack((target, total))
        dist.all_reduce(both, group=tensor.group)
        target, total = both[0], both[1]
        probabilities = exponentials.div_(total.unsqueeze(-1))
        ctx.save_for_backward(probabilities, local, outside)
        return total.log() - target

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        probabilities, local, outside = ctx.saved_tensors
        rows = torch.arange(local.numel(), device=local.device)
        # In place: the probabilities are the largest tensor of a step and nobody reads them again.
        probabilities[rows, local] -= (~outside).to(probabilities.dtype)
        return probabilities.mul_(grad.unsqueeze(-1)), None, None, None


def token_losses(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, tensor: TensorGroup, chunk_tokens: int = 0
) -> Tensor:
    """Cross-entropy of each target under the output layer, in float32.

    Args:
        hidden: [batch, seq, hidden], the same on every rank of the group; each rank's gradient of it is its
            rows' share and has to be summed by whatever handed it in (`TensorParallel.enter`).
        weight: [padded vocabulary / t, hidden], this rank's rows of the output layer.
        targets: [batch, seq] token ids below `vocab_size`.
        vocab_size: rows from here on are padding and never enter the softmax.
        tensor: the group over which the vocabulary is cut.
        chunk_tokens: hold the logits of at most this many tokens at a time, none between the forward and the
            backward pass, which computes them again; 0: hold the logits of all tokens, computed once.

    Returns:
        [batch, seq] losses in nats, the same on every rank of the group.
    """
    rows, flat = hidden.flatten(0, 1), targets.flatten()
    if not chunk_tokens:
        return _row_losses(rows, weight, flat, vocab_size, tensor).view_as(targets)
    parts = [
        checkpoint(_row_losses, r, weight, t, vocab_size, tensor, use_reentrant=False, preserve_rng_state=False)
        for r, t in zip(rows.split(chunk_tokens), flat.split(chunk_tokens), strict=True)
    ]
    return torch.cat(parts).view_as(targets)


def _row_losses(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, tensor: TensorGroup) -> Tensor:
    """[n, hidden] and [n] targets to [n] losses."""
    # Padding is left out of the product; a rank that holds nothing else keeps a row, which gets no probability.
    used = vocab_size - tensor.rank * weight.shape[0]
    logits = F.linear(hidden, weight[: max(1, used)]).float()
    if tensor.size == 1:
        return F.cross_entropy(logits, targets, reduction="none")
    if used < 1:
        # A fill that stays in the graph: every rank has to take part in the backward's collectives.
        logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool), float("-inf"))
    return _VocabParallelCrossEntropy.apply(logits, targets, tensor.rank * weight.shape[0], tensor)
