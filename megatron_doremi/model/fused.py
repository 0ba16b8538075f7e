"""Operations of a block whose backward pass writes into one tensor, where autograd would concatenate parts.

Heads have the layout [b, s, g, r, d]: batch, seq, key-value groups, heads of a group (queries of a group, or 1), width.
torch.compile fuses such concatenations itself, and is given the plain formulas.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_doremi.model.positions import RotaryTable
from megatron_doremi.parallel.collectives import batch_first


def _rotate_into(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Writes x, rotated, to `out`; channel i is paired with channel i + d / 2. 16 bits are computed in float32."""
    half = x.shape[-1] // 2
    result = out if out.dtype.itemsize > 2 else torch.empty_like(out, dtype=torch.float32)
    first, second = x[..., :half], x[..., half:]
    for part, kept, crossed, sign in ((result[..., :half], first, second, -1), (result[..., half:], second, first, 1)):
        torch.mul(kept, cos, out=part).addcmul_(crossed, sin, value=sign)
    if result is not out:
        out.copy_(result)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        out = torch.empty_like(x)
        _rotate_into(out, x, cos, sin)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        out = torch.empty_like(grad)
        _rotate_into(out, grad, cos, -sin)
        return out, None, None


def rotate(heads: Tensor, table: RotaryTable) -> Tensor:
    """Rotates queries or keys, [b, s, g, r, d] (Su et al. 2021, section 3.4.2)."""
    if torch.compiler.is_compiling():
        (first, second), (cos, sin) = heads.float().chunk(2, dim=-1), table
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(heads.dtype)
    rotated: Tensor = _Rotate.apply(heads, *table)
    return rotated


def _views(qkv: Tensor, groups: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values in the fused projection."""
    parts = qkv.view(*qkv.shape[:2], groups, -1, width)
    return parts[..., :-2, :], parts[..., -2:-1, :], parts[..., -1:, :]


def _by_rank(x: Tensor, shards: int) -> Tensor:
    """[batch, seq, ...] -> [shards, batch, seq / shards, ...], a view."""
    return x.unflatten(1, (shards, -1)).transpose(0, 1)


def _write(out: Tensor, part: Tensor, cos: Tensor | None, sin: Tensor | None) -> None:
    """Copies heads, or rotates them."""
    if cos is None or sin is None:
        out.copy_(part)
    else:
        _rotate_into(out, part, cos, sin)


def _angles(table: Tensor | None, batch: int, shards: int) -> Tensor | None:
    """Half of a rotary table, by rank."""
    return None if table is None else _by_rank(table.expand(batch, *table.shape[-4:]), shards)


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, groups: int, width: int, cos: Tensor | None, sin: Tensor | None, shards: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.groups, ctx.width, ctx.shape, ctx.shards = groups, width, qkv.shape, shards
        ctx.save_for_backward(cos, sin)
        q, k, v = _views(qkv, groups, width)
        if cos is None and shards == 1:
            return q, k, v
        # A view of the values would keep all of the projection until the backward pass.
        batch, seq = qkv.shape[0] // shards, qkv.shape[1] * shards
        outs = tuple(part.new_empty(batch, seq, *part.shape[2:]) for part in (q, k, v))
        angles = _angles(cos, batch, shards), _angles(sin, batch, shards)
        for out, part, turn in zip(outs, (q, k, v), (angles, angles, (None, None)), strict=True):
            _write(_by_rank(out, shards), part.unflatten(0, (shards, -1)), *turn)
        return outs[0], outs[1], outs[2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        cos, sin = ctx.saved_tensors
        shards, batch, grad = ctx.shards, len(grads[0]), grads[0].new_empty(ctx.shape)
        angles = _angles(cos, batch, shards), _angles(None if sin is None else -sin, batch, shards)
        outs = _views(grad, ctx.groups, ctx.width)
        for out, part, turn in zip(outs, grads, (angles, angles, (None, None)), strict=True):
            _write(out.unflatten(0, (shards, -1)), _by_rank(part, shards), *turn)
        return grad, None, None, None, None, None


def split_heads(
    qkv: Tensor, groups: int, width: int, table: RotaryTable | None, shards: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [b, s, g, r, d], keys and values [b, s, g, 1, d] of the fused projection.

    Args:
        qkv: [b, s, g (r + 2) d]; or [shards b, s / shards, g (r + 2) d], in the order of ranks (parallel/collectives).
        groups: key-value groups, g.
        width: channels of a head, d.
        table: rotates queries and keys; None: they stay as they are.
    """
    if shards > 1 and (len(qkv) == shards or torch.compiler.is_compiling()):
        # A view of a batch of one; in a graph a part of the rotation.
        qkv, shards = batch_first(qkv, shards), 1
    if torch.compiler.is_compiling():
        q, k, v = _views(qkv, groups, width)
        return (q, k, v) if table is None else (rotate(q, table), rotate(k, table), v)
    cos, sin = (None, None) if table is None else table
    q, k, v = _SplitHeads.apply(qkv, groups, width, cos, sin, shards)
    return q, k, v


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        result = torch.empty_like(x)
        gate_grad, up_grad = result.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=up_grad)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=gate_grad)
        return result


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020) of gate and up side by side: [..., 2 f] -> [..., f]. Keeps its input only."""
    if torch.compiler.is_compiling():
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up
    product: Tensor = _SwiGLU.apply(x)
    return product
