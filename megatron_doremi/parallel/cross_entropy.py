"""Cross-entropy of next tokens over a vocabulary that is sharded over the tensor-parallel group.

No rank ever holds a full row of logits (Shoeybi et al. 2019, section 3): two all-reduces, of one and of two numbers per
token, compute the maximum logit, the target's logit and the sum of exponentials.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_doremi.parallel.groups import TensorGroup


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, first: int, tp_group: TensorGroup) -> Tensor:
        rows = torch.arange(targets.numel(), device=logits.device)
        local = targets - first
        outside = (local < 0) | (local >= logits.shape[-1])
        local = local.masked_fill(outside, 0)

        maximum = logits.max(dim=-1).values
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=tp_group.group)
        shifted = logits - maximum.unsqueeze(-1)
        target = shifted[rows, local].masked_fill(outside, 0.0)
        exponentials = shifted.exp_()
        total = exponentials.sum(dim=-1)
        sums = torch.stack((target, total))
        dist.all_reduce(sums, group=tp_group.group)
        target, total = sums[0], sums[1]
        probabilities = exponentials.div_(total.unsqueeze(-1))
        ctx.save_for_backward(probabilities, local, outside)
        return total.log() - target

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        probabilities, local, outside = ctx.saved_tensors
        rows = torch.arange(local.numel(), device=local.device)
        # In place: the probabilities are the largest tensor of a step and are not read again.
        probabilities[rows, local] -= (~outside).to(probabilities.dtype)
        return probabilities.mul_(grad.unsqueeze(-1)), None, None, None


class _ChunkedLosses(torch.autograd.Function):
    """Token losses of rows of hidden states, chunk by chunk; the backward pass recomputes the logits.

    The gradient of the output layer is a sum over chunks. It is accumulated in float32 and rounded once, at the end, to
    the precision of the weights: in bfloat16 the rounding of the sum would swallow the contribution of a chunk. Chunks
    are added from the last to the first, the order in which autograd would run them.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, tp_group: TensorGroup, chunk: int
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets)
        ctx.vocab_size, ctx.tp_group, ctx.chunk = vocab_size, tp_group, chunk
        parts, first = zip(hidden.split(chunk), targets.split(chunk), strict=True), tp_group.rank * len(weight)
        return torch.cat([_losses_of(_logits(h, weight, vocab_size, tp_group), t, first, tp_group) for h, t in parts])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        hidden, weight, targets = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        chunks = [part.split(ctx.chunk) for part in (hidden, targets, grad)]
        hidden_grads: list[Tensor] = []
        weight_grad: Tensor | None = None
        for rows, row_targets, row_grads in reversed(list(zip(*chunks, strict=True))):
            logits = _logits(rows, weight, ctx.vocab_size, ctx.tp_group).requires_grad_()
            with torch.enable_grad():
                losses = _losses_of(logits, row_targets, ctx.tp_group.rank * len(weight), ctx.tp_group)
            logits_grad = torch.autograd.grad(losses, logits, row_grads)[0].to(weight.dtype)
            del logits, losses
            columns = logits_grad.shape[1]
            if wants_hidden:
                hidden_grads.append(logits_grad.mm(weight[:columns]))
            if wants_weight:
                part = _float32_product(logits_grad.t(), rows)
                weight_grad = part if weight_grad is None else weight_grad.add_(part)
                del part
            # Both are as large as the next chunk's logits, or larger.
            del logits_grad
        hidden_grad = torch.cat(hidden_grads[::-1]) if wants_hidden else None
        if weight_grad is not None:
            weight_grad = F.pad(weight_grad.to(weight.dtype), (0, 0, 0, len(weight) - len(weight_grad)))
        return hidden_grad, weight_grad, None, None, None, None


def _float32_product(a: Tensor, b: Tensor) -> Tensor:
    """The product of [n, m] and [m, p] in float32, whatever the precision of the factors."""
    if a.dtype == torch.float32:
        return a.mm(b)
    # Only GPUs multiply 16-bit matrices with a float32 result.
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float().mm(b.float())


def token_losses(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, tp_group: TensorGroup, chunk_tokens: int = 0
) -> Tensor:
    """Cross-entropy of each target under the output layer, in float32.

    Args:
        hidden: [batch, seq, hidden], the same on every rank of the group. Each rank computes the part of its gradient
            that comes from its own rows of `weight`; the caller sums these parts (`TensorParallel.enter`).
        weight: [padded vocabulary / t, hidden], this rank's rows of the output layer.
        targets: [batch, seq] token ids below `vocab_size`.
        vocab_size: rows from this one on are padding and never enter the softmax; their values must be finite.
        tp_group: the group over which the vocabulary is sharded.
        chunk_tokens: hold the logits of at most this many tokens at a time, and recompute them in the backward pass;
            0: compute the logits of all tokens once and hold them for the backward pass.

    Returns:
        [batch, seq] losses in nats, the same on every rank of the group.
    """
    rows, flat = hidden.flatten(0, 1), targets.flatten()
    if chunk_tokens:
        return _ChunkedLosses.apply(rows, weight, flat, vocab_size, tp_group, chunk_tokens).view_as(targets)
    logits = _logits(rows, weight, vocab_size, tp_group)
    return _losses_of(logits, flat, tp_group.rank * len(weight), tp_group).view_as(targets)


def _logits(hidden: Tensor, weight: Tensor, vocab_size: int, tp_group: TensorGroup) -> Tensor:
    """[n, hidden] -> [n, columns] float32 logits of this rank's rows of the vocabulary.

    In 16 bits the product includes the padding rows, and their logits are set to -inf: the strides of a matrix without
    them may be odd, for which kernels are slow. In float32 they are excluded, unless the rank holds only padding.
    """
    rows, used = weight.shape[0], max(0, vocab_size - tp_group.rank * weight.shape[0])
    if used >= rows:
        return F.linear(hidden, weight).float()
    if used and weight.dtype.itemsize > 2:
        return F.linear(hidden, weight[:used])
    padding = torch.arange(rows, device=weight.device) >= used
    return F.linear(hidden, weight).float().masked_fill_(padding, float("-inf"))


def _losses_of(logits: Tensor, targets: Tensor, first: int, tp_group: TensorGroup) -> Tensor:
    """[n, columns of this rank] float32 logits and [n] targets -> [n] losses; `first` is the id of the first column."""
    if tp_group.size == 1:
        return F.cross_entropy(logits, targets, reduction="none")
    return _VocabParallelCrossEntropy.apply(logits, targets, first, tp_group)
