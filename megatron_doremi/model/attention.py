"""Which of torch's kernels computes attention on a GPU: an order of preference, and what torch's own checks say.

A kernel is chosen by torch at each call, from the shapes and from an order that is set once (`in_order`). The same
checks at the start of a run tell which one that will be.

Where documents attend within themselves only, a kernel for sequences of variable length (torch.nn.attention.varlen)
takes each document as a sequence, and computes no score between two documents.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

Check = Callable[[SDPAParams], bool]
# (queries, keys, values, bounds, longest): see `adapted`.
DocumentKernel = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]

CUDNN, FLASH, EFFICIENT, MATH = "cuDNN", "flash", "memory-efficient", "math"
_BACKENDS = {
    CUDNN: SDPBackend.CUDNN_ATTENTION,
    FLASH: SDPBackend.FLASH_ATTENTION,
    EFFICIENT: SDPBackend.EFFICIENT_ATTENTION,
    MATH: SDPBackend.MATH,
}
CHECKS: Mapping[str, Check] = {
    CUDNN: can_use_cudnn_attention,
    FLASH: can_use_flash_attention,
    EFFICIENT: can_use_efficient_attention,
}
# Data center GPUs of Hopper and Blackwell, and the first cuDNN with which torch prefers its kernel (torch 2.13,
# aten/src/ATen/native/transformers/cuda/sdp_utils.cpp).
_CUDNN_CAPABILITIES, _CUDNN_VERSION = ((9, 0), (10, 0), (10, 3)), 91501
# Limits of all kernels but math.
_WIDEST, _WIDTHS = 256, 8


def kernel_order(capability: tuple[int, int], cudnn: int | None) -> tuple[str, ...]:
    """The kernels in order of preference on a GPU.

    Args:
        capability: compute capability, (major, minor).
        cudnn: version as torch gives it, 91501 for 9.15.1; None: torch has none.
    """
    first = capability in _CUDNN_CAPABILITIES and cudnn is not None and cudnn >= _CUDNN_VERSION
    # Where it is not preferred it is left out: torch 2.11 would put an older cuDNN first on its own.
    return (CUDNN, FLASH, EFFICIENT, MATH) if first else (FLASH, EFFICIENT, MATH)


def in_order(order: Sequence[str]) -> AbstractContextManager[object]:
    """While it is entered torch takes the first of these kernels that can; costs nothing at a call."""
    manager: AbstractContextManager[object] = sdpa_kernel([_BACKENDS[name] for name in order], set_priority=True)
    return manager


def repeats_groups(dtype: torch.dtype, masked: bool) -> bool:
    """Whether keys and values are repeated for each query of their group on a GPU: the memory-efficient kernel, the
    only one with a mask or in float32, knows no groups in torch 2.11, and the math kernel would hold all scores."""
    return masked or dtype == torch.float32


@dataclass(frozen=True)
class AttentionShape:
    """The attention of a model on one rank.

    Attributes:
        batch, seq: of a micro-batch.
        heads, groups: query heads and key-value groups of a rank.
        width: channels of a head.
        masked: a mask of [batch, 1, seq, seq] is added to the scores.
        trains: there is a backward pass.
    """

    batch: int
    seq: int
    heads: int
    groups: int
    width: int
    dtype: torch.dtype
    masked: bool
    trains: bool


class KernelChoice(NamedTuple):
    """The kernel of a model's attention, and a warning if it is the one that holds all scores, else ""."""

    name: str
    warning: str


def choose_kernel(
    shape: AttentionShape, order: Sequence[str], device: torch.device, checks: Mapping[str, Check] = CHECKS
) -> KernelChoice:
    """The first kernel in the order that takes the shape.

    Args:
        checks: torch's, by kernel.
    """
    params = _params(shape, device)
    name = next(each for each in order if each == MATH or checks[each](params))
    return KernelChoice(name, _math_warning(shape) if name == MATH else "")


def _params(shape: AttentionShape, device: torch.device) -> SDPAParams:
    """What the checks look at: tensors that are laid out as the model's."""
    repeated = repeats_groups(shape.dtype, shape.masked)
    groups = shape.heads if repeated else shape.groups

    def made(heads: int) -> Tensor:
        part = torch.empty(shape.batch, shape.seq, heads, shape.width, dtype=shape.dtype, device=device)
        return part.requires_grad_(shape.trains).transpose(1, 2)

    mask = None
    if shape.masked:
        mask = torch.empty(shape.batch, 1, shape.seq, shape.seq, dtype=shape.dtype, device=device)
    return SDPAParams(made(shape.heads), made(groups), made(groups), mask, 0.0, mask is None, groups != shape.heads)


def _math_warning(shape: AttentionShape) -> str:
    """What a fall back to the math kernel costs, why it comes, and what to do."""
    mib = 4 * shape.batch * shape.heads * shape.seq**2 / 2**20
    cost = f"attention falls back to torch's math kernel, which holds {mib:,.0f} MiB of scores in each layer"
    if shape.width > _WIDEST:
        why = f"heads have {shape.width} channels and the fast kernels take {_WIDEST} at most"
        return f"{cost}: {why}; give more --num-attention-heads, or --kv-channels of {_WIDEST} or less"
    if shape.width % _WIDTHS:
        why = f"heads have {shape.width} channels and the fast kernels take multiples of {_WIDTHS}"
        return f"{cost}: {why}; give other --num-attention-heads or --kv-channels"
    why = f"torch's checks refuse its other kernels on this GPU for {str(shape.dtype).removeprefix('torch.')}"
    return f"{cost}: {why}, {shape.heads} heads of {shape.width} channels; try --bf16 and a GPU from Ampere on"


def adapted(varlen_attn: Callable[..., Any]) -> DocumentKernel:
    """torch's kernel for sequences of variable length, causal and with groups, by the signature that it has.

    torch 2.10 takes `is_causal`, later ones `window_size`, of which (-1, 0) is causal; 2.12 and later `enable_gqa`.

    Returns:
        a function of queries [tokens, heads, width], keys and values [tokens, groups, width], bounds as
        `MicroBatch.documents` and an upper bound of the longest document; it returns [tokens, heads, width].
    """
    parameters = inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in parameters else {"is_causal": True}
    knows_groups = "enable_gqa" in parameters

    def attend(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int) -> Tensor:
        repeats, named = q.shape[1] // k.shape[1], dict(causal)
        if repeats > 1 and knows_groups:
            named["enable_gqa"] = True
        elif repeats > 1:
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        out: Tensor = varlen_attn(q, k, v, bounds, bounds, longest, longest, **named)
        return out

    return attend


def takes_documents(shape: AttentionShape, device: torch.device, checks: Mapping[str, Check] = CHECKS) -> bool:
    """Whether a kernel takes each document as a sequence: FlashAttention's, where torch can use it for the shape.

    Args:
        shape: whose `masked` does not count.
        checks: torch's, by kernel; those of a CPU refuse.
    """
    return checks[FLASH](_params(replace(shape, masked=False), device))


def flash_takes(width: int) -> bool:
    """Whether FlashAttention takes heads of this many channels, in half precision on a GPU that has it."""
    return width <= _WIDEST and width % _WIDTHS == 0


def attend_documents(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
    """Causal attention within documents.

    Args:
        q: [batch, seq, heads, width]; k, v: [batch, seq, groups, width].
        bounds: of the documents of the micro-batch; see `MicroBatch.documents`.

    Returns:
        [batch, seq, heads, width].
    """
    batch, seq = q.shape[:2]
    out = document_kernel(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), bounds, seq)
    return out.unflatten(0, (batch, seq))


def _torchs_kernel() -> DocumentKernel:
    """torch's kernel. Its import brings in torch's compiler, a second that nothing without a GPU has to wait for."""
    from torch.nn.attention.varlen import varlen_attn

    return adapted(varlen_attn)


def _refused(*_: object) -> Tensor:
    raise RuntimeError("torch's kernel for sequences of variable length needs a GPU (see `takes_documents`)")


document_kernel: DocumentKernel = _torchs_kernel() if torch.cuda.is_available() else _refused
