"""Cross-entropy of next tokens over a vocabulary that is sharded over the tensor-parallel group.

No rank ever holds a full row of logits (Shoeybi et al. 2019, section 3): two all-reduces, of one and of two numbers per
token, compute the maximum logit, the target's logit and the sum of exponentials. The backward pass needs no other: it
knows the logarithm of each row's sum, its normalizer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_doremi.execution import DEFAULT, Execution
from megatron_doremi.parallel.collectives import Started, batch_first, finished, rank_major, start_gather
from megatron_doremi.parallel.groups import TensorGroup
from megatron_doremi.parallel.linear import start_input_sum


def _product(hidden: Tensor, weight: Tensor, used: int) -> Tensor:
    """[n, hidden] -> [n, columns] logits in the precision of the weights.

    In 16 bits they include the padding rows of the vocabulary, from `used` on: the strides of a matrix without them may
    be odd, for which kernels are slow. In float32 these are left out, unless the rank holds only padding.
    """
    whole = used == 0 or used == len(weight) or weight.dtype.itemsize <= 2
    return F.linear(hidden, weight if whole else weight[:used])


def _logits(product: Tensor, used: int) -> Tensor:
    """The logits, of 16 bits in float32; -inf in the columns of the padding."""
    logits = product.float() if product.dtype.itemsize <= 2 else product
    if used >= product.shape[1]:
        return logits
    padding = torch.arange(product.shape[1], device=product.device) >= used
    # The product may be held for the backward pass.
    return (logits.masked_fill if logits is product else logits.masked_fill_)(padding, float("-inf"))


def _row_losses(product: Tensor, targets: Tensor, used: int) -> tuple[Tensor, Tensor]:
    """[n, columns] logits of a full vocabulary and [n] targets -> [n] losses and [n] normalizers, float32."""
    logits = _logits(product, used)
    losses = F.cross_entropy(logits, targets, reduction="none")
    return losses, losses + logits.gather(1, targets.unsqueeze(1)).squeeze(1)


def _sharded_row_losses(product: Tensor, local: Tensor, used: int, tp_group: TensorGroup) -> tuple[Tensor, Tensor]:
    """As `_row_losses`, of the columns of each rank; a collective call.

    Args:
        local: [n] columns of the targets; on ranks that do not hold a target its value is not a column.
    """
    logits = _logits(product, used)
    outside = (local < 0) | (local >= logits.shape[1])
    maximum = logits.max(dim=-1).values
    dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=tp_group.group)
    shifted = logits - maximum.unsqueeze(1)
    target = shifted.gather(1, local.masked_fill(outside, 0).unsqueeze(1)).squeeze(1).masked_fill(outside, 0.0)
    sums = torch.stack((target, shifted.exp_().sum(dim=-1)))
    dist.all_reduce(sums, group=tp_group.group)
    target, logarithm = sums[0], sums[1].log()
    return logarithm - target, maximum + logarithm


def _scaled_softmax(product: Tensor, normalizers: Tensor, grad: Tensor, used: int) -> Tensor:
    """softmax * grad, [n, columns], in the precision of the product; [n] normalizers and grad, float32."""
    return _logits(product, used).sub_(normalizers.unsqueeze(1)).exp_().mul_(grad.unsqueeze(1)).to(product.dtype)


def _subtract_targets(gradient: Tensor, losses: Tensor, local: Tensor, grad: Tensor, more: Tensor | None) -> Tensor:
    """Turns softmax * (grad + more) into the gradient of the logits, softmax * (grad + more) - grad, in the targets'
    columns, in place.

    The target's probability is exp(-loss), so that the difference is rounded once.

    Args:
        losses: [n] float32.
        local: as for `_sharded_row_losses`.
        more: [n] gradient of the normalizers; None: 0.
    """
    outside = (local < 0) | (local >= gradient.shape[1])
    columns = local.masked_fill(outside, 0).unsqueeze(1)
    values = torch.expm1(-losses) * grad
    if more is not None:
        values = values + torch.exp(-losses) * more
    there = torch.where(outside.unsqueeze(1), gradient.gather(1, columns), values.unsqueeze(1))
    return gradient.scatter_(1, columns, there.to(gradient.dtype))


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled, for the shapes that it is called with: those of a chunk, and of the last one."""
    return torch.compile(function, fullgraph=True, dynamic=False)


class _TokenLosses(torch.autograd.Function):
    """Token losses and normalizers of hidden states, chunk by chunk.

    The backward pass recomputes the logits, or has held them; with sequence parallelism it gathers the hidden states
    again. It sums their gradient over the ranks beside the last product that the gradient of the output layer takes.

    The gradient of the output layer is a sum over chunks. It is accumulated in float32 and rounded once, at the end, to
    the precision of the weights: in bfloat16 the rounding of the sum would swallow the contribution of a chunk. Chunks
    are added from the last to the first, the order in which autograd would run them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocab_size: int,
        tp_group: TensorGroup,
        execution: Execution,
        sequence_parallel: bool,
    ) -> tuple[Tensor, Tensor]:
        # Without --z-loss the normalizers have no gradient.
        ctx.set_materialize_grads(False)
        full = _rows(hidden, start_gather(hidden, tp_group) if sequence_parallel else None)
        chunk = execution.loss_chunk_tokens or len(full)
        first = tp_group.rank * len(weight)
        used, local = min(max(0, vocab_size - first), len(weight)), targets - first
        rows: list[tuple[Tensor, Tensor]] = []
        held: list[Tensor] = []
        for part, columns in zip(full.split(chunk), local.split(chunk), strict=True):
            product = _product(part, weight, used)
            if tp_group.size > 1:
                rows.append(_sharded_row_losses(product, columns, used, tp_group))
            else:
                row_losses = _compiled(_row_losses) if execution.compiled else _row_losses
                rows.append(row_losses(product, columns, used))
            if not execution.loss_chunk_tokens:
                held.append(product)
        losses, normalizers = (torch.cat(parts) for parts in zip(*rows, strict=True))
        ctx.save_for_backward(hidden, weight, local, normalizers, losses, *held)
        ctx.used, ctx.chunk, ctx.compiled = used, chunk, execution.compiled
        ctx.tp_group, ctx.sequence_parallel = tp_group, sequence_parallel
        return losses, normalizers

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, more: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None, None]:
        hidden, weight, local, normalizers, losses, *held = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        if grad is None:
            # Of the normalizers alone.
            grad = torch.zeros_like(losses)
        scaled_softmax = _compiled(_scaled_softmax) if ctx.compiled else _scaled_softmax
        needs_rows = wants_weight or not held
        gathering = start_gather(hidden, ctx.tp_group) if ctx.sequence_parallel and needs_rows else None
        # Logits that are held need no rows before the weight's product.
        all_rows = None if held else _rows(hidden, gathering)
        hidden_grad = hidden.new_empty(len(local), hidden.shape[-1]) if wants_hidden else None
        weight_grad: Tensor | None = None
        summing: Started | None = None
        for start in reversed(range(0, len(local), ctx.chunk)):
            part = slice(start, start + ctx.chunk)
            # Without a compiler it is overwritten in float32: it is one of the largest tensors of a step.
            product = _product(all_rows[part], weight, ctx.used) if all_rows is not None else held.pop()
            row_more = None if more is None else more[part]
            scale = grad[part] if row_more is None else grad[part] + row_more
            logits_grad = scaled_softmax(product, normalizers[part], scale, ctx.used)
            del product
            _subtract_targets(logits_grad, losses[part], local[part], grad[part], row_more)
            if hidden_grad is not None:
                torch.mm(logits_grad, weight[: logits_grad.shape[1]], out=hidden_grad[part])
                if start == 0 and ctx.tp_group.size > 1:
                    # Beside the last product below.
                    by_window = hidden_grad.view(-1, *hidden.shape[1:])
                    summing = start_input_sum(by_window, ctx.tp_group, ctx.sequence_parallel)
            if wants_weight:
                rows = (_rows(hidden, gathering) if all_rows is None else all_rows)[part]
                if len(rows) == len(local):
                    weight_grad = logits_grad.t().mm(rows)
                else:
                    weight_grad = _plus_float32_product(weight_grad, logits_grad.t(), rows)
            # It is as large as the next chunk's logits, or larger.
            del logits_grad
        if weight_grad is not None:
            weight_grad = weight_grad.to(weight.dtype)
            if len(weight_grad) < len(weight):
                weight_grad = F.pad(weight_grad, (0, 0, 0, len(weight) - len(weight_grad)))
        if summing is not None:
            hidden_grad = finished(summing)
        return None if hidden_grad is None else hidden_grad.view_as(hidden), weight_grad, None, None, None, None, None


def _rows(hidden: Tensor, gathering: Started | None) -> Tensor:
    """[n, hidden]: the hidden states, or those that were gathered."""
    return (hidden if gathering is None else finished(gathering)).flatten(0, 1)


def _plus_float32_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """Adds the product of [n, m] and [m, p], in float32 whatever the precision of the factors, to [n, p], in place.

    Args:
        total: None: 0.
    """
    if a.is_cuda and a.dtype != torch.float32:
        # Only GPUs multiply 16-bit matrices with a float32 result, and add it in the same kernel.
        if total is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    product = a.float().mm(b.float())
    return product if total is None else total.add_(product)


def losses_and_normalizers(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    tp_group: TensorGroup,
    execution: Execution = DEFAULT,
    sequence_parallel: bool = False,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each target under the output layer, in float32.

    `torch.nn.functional.linear_cross_entropy` (torch 2.13) computes the same by chunks, but in bfloat16 it returns
    losses in bfloat16, whose error of .01 nats is that of a domain's excess loss.

    Args:
        hidden: [batch, seq, hidden], the same on every rank of the group; with sequence parallelism this rank's
            positions, [batch, seq / t, hidden].
        weight: [padded vocabulary / t, hidden], this rank's rows of the output layer.
        targets: [batch, seq] token ids below `vocab_size`.
        vocab_size: rows from this one on are padding and never enter the softmax; their values must be finite.
        tp_group: the group over which the vocabulary is sharded.

    Returns:
        [batch, seq] losses in nats, and [batch, seq] normalizers, the logarithm of the sum of exponentials; the same on
        every rank of the group, and both differentiable.
    """
    shards = tp_group.size if sequence_parallel else 1
    order = rank_major(targets, shards)
    both = _TokenLosses.apply(hidden, weight, order.flatten(), vocab_size, tp_group, execution, shards > 1)
    losses, normalizers = (batch_first(each.view_as(order), shards) for each in both)
    return losses, normalizers


def token_losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    tp_group: TensorGroup,
    execution: Execution = DEFAULT,
    sequence_parallel: bool = False,
) -> Tensor:
    """The first result of `losses_and_normalizers`."""
    return losses_and_normalizers(hidden, weight, targets, vocab_size, tp_group, execution, sequence_parallel)[0]
