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


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, groups: int, width: int, cos: Tensor | None, sin: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.groups, ctx.width, ctx.shape = groups, width, qkv.shape
        ctx.save_for_backward(cos, sin)
        q, k, v = _views(qkv, groups, width)
        if cos is None or sin is None:
            return q, k, v
        rotated = q.new_empty(q.shape), k.new_empty(k.shape)
        for out, part in zip(rotated, (q, k), strict=True):
            _rotate_into(out, part, cos, sin)
        # A view would keep all of the projection until the backward pass.
        return *rotated, v.clone(memory_format=torch.contiguous_format)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        cos, sin = ctx.saved_tensors
        grad = grads[0].new_empty(ctx.shape)
        q, k, v = _views(grad, ctx.groups, ctx.width)
        v.copy_(grads[2])
        for out, part in zip((q, k), grads, strict=False):
            if cos is None:
                out.copy_(part)
            else:
                _rotate_into(out, part, cos, -sin)
        return grad, None, None, None, None


def split_heads(qkv: Tensor, groups: int, width: int, table: RotaryTable | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [b, s, g, r, d], keys and values [b, s, g, 1, d] of the fused projection [b, s, g (r + 2) d].

    Args:
        groups: key-value groups, g.
        width: channels of a head, d.
        table: rotates queries and keys; None: they stay as they are.
    """
    if torch.compiler.is_compiling():
        q, k, v = _views(qkv, groups, width)
        return (q, k, v) if table is None else (rotate(q, table), rotate(k, table), v)
    cos, sin = (None, None) if table is None else table
    q, k, v = _SplitHeads.apply(qkv, groups, width, cos, sin)
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
