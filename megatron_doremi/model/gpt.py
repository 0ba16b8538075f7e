"""The pre-norm transformer block: attention and feed-forward layer, each added to the residual stream.

Shapes: b batch, s seq, h hidden, n query heads, g key-value heads, d head width, t ranks of the tensor group.
Between blocks activations are [b, s, h], or [b, s / t, h] with sequence parallelism. The block knows how its layers
are sharded (`TensorParallel`), but nothing about stages or engines.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_doremi.config import GPTConfig
from megatron_doremi.model.attention import attend_documents, repeats_groups
from megatron_doremi.model.dropout import (
    AFTER_ATTENTION,
    AFTER_MLP,
    NONE,
    Dropout,
    drop_hidden,
    drop_probabilities,
)
from megatron_doremi.model.fused import rotate, split_heads, swiglu
from megatron_doremi.model.positions import Window
from megatron_doremi.parallel.layers import (
    ColumnParallelLinear,
    Norm,
    RowParallelLinear,
    TensorParallel,
)


def residual_std(gpt: GPTConfig) -> float:
    """Standard deviation of projections onto the residual stream (Radford et al. 2019, section 2.3)."""
    return gpt.init_method_std / math.sqrt(2.0 * gpt.num_layers)


def recomputed(function: Callable[..., Tensor], *inputs: Tensor | Window) -> Tensor:
    """Calls a function and keeps only its inputs; the backward pass recomputes the rest (Chen et al. 2016).

    There is no random state to restore: masks of dropout are computed (dropout.py).
    """
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class Attention(nn.Module):
    """Causal self-attention with grouped queries; heads are sharded over the tensor-parallel group by key-value group.

    The fused projection holds, for each key-value group, its query heads, its key and its value, so that each shard
    of its rows holds complete groups. With qk_layernorm a norm over the channels of each head, shared by all heads,
    precedes the rotation (Dehghani et al. 2023, section 2; as in Qwen3).
    """

    def __init__(self, gpt: GPTConfig, tp: TensorParallel, recompute: bool, dropout: float = 0.0):
        super().__init__()
        self.recompute, self.dropout = recompute, dropout
        self.first_head = tp.group.rank * (gpt.num_attention_heads // tp.size)
        self.groups = gpt.num_query_groups // tp.size
        self.queries_per_group = gpt.num_attention_heads // gpt.num_query_groups
        self.width, self.shards = gpt.kv_channels, tp.sequence_shards
        fused = (gpt.num_attention_heads + 2 * gpt.num_query_groups) * gpt.kv_channels
        heads = gpt.num_attention_heads * gpt.kv_channels
        self.qkv = ColumnParallelLinear(gpt.hidden_size, fused, gpt.bias_linear, gpt.init_method_std, tp)
        self.proj = RowParallelLinear(heads, gpt.hidden_size, gpt.bias_linear, residual_std(gpt), tp, batch_first=True)
        self.q_norm = self.k_norm = None
        if gpt.qk_layernorm:
            norm = (gpt.kv_channels, gpt.normalization, gpt.norm_epsilon, tp, True)
            self.q_norm, self.k_norm = Norm(*norm), Norm(*norm)

    def forward(self, x: Tensor, window: Window) -> Tensor:
        qkv = self.qkv(x)
        mixed = recomputed(self._mix, qkv, window) if self.recompute else self._mix(qkv, window)
        return self.proj(mixed)

    def _mix(self, qkv: Tensor, window: Window) -> Tensor:
        """Attention of the fused projection, [b, s, (n + 2 g) d / t], or with sequence parallelism [t b, s / t, ...] in
        the order of ranks -> heads' outputs, [b, s, n d / t]."""
        rotary, mask = window.rotary, window.mask
        normalized = self.q_norm is not None and self.k_norm is not None
        q, k, v = split_heads(qkv, self.groups, self.width, None if normalized else rotary, self.shards)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
            if rotary is not None:
                q, k = rotate(q, rotary), rotate(k, rotary)
        # [b, s, heads, d]
        q, k, v = (part.flatten(2, 3) for part in (q, k, v))
        if window.documents is not None:
            assert not self.dropout, "a kernel that takes documents holds no probabilities"
            return attend_documents(q, k, v, window.documents).flatten(2)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if self.dropout and window.keys is not None:
            return self._with_dropout(q, k, v, mask, window.keys).transpose(1, 2).flatten(2)
        grouped = self.queries_per_group > 1
        if grouped and q.is_cuda and repeats_groups(q.dtype, mask is not None):
            k, v, grouped = *(part.repeat_interleave(self.queries_per_group, dim=1) for part in (k, v)), False
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
        return out.transpose(1, 2).flatten(2)

    def _with_dropout(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, keys: Tensor) -> Tensor:
        """Attention, [b, heads, s, d], that holds its probabilities: kernels that do not would draw their own masks."""
        k, v = (part.repeat_interleave(self.queries_per_group, dim=1) for part in (k, v))
        scores = (q @ k.transpose(2, 3)).float() / math.sqrt(self.width)
        if mask is None:
            later = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(later, float("-inf"))
        else:
            scores = scores + mask
        return drop_probabilities(scores.softmax(-1), keys, self.first_head, self.dropout).to(v.dtype) @ v


class MLP(nn.Module):
    """Feed-forward layer: GELU (exact, or its tanh approximation), or SwiGLU with gate and up projection fused."""

    def __init__(self, gpt: GPTConfig, tp: TensorParallel):
        super().__init__()
        self.swiglu = gpt.swiglu
        self.approximate = "tanh" if gpt.openai_gelu else "none"
        blocks = 2 if gpt.swiglu else 1
        inner, std = gpt.ffn_hidden_size, gpt.init_method_std
        self.fc1 = ColumnParallelLinear(gpt.hidden_size, blocks * inner, gpt.bias_linear, std, tp, blocks)
        self.fc2 = RowParallelLinear(inner, gpt.hidden_size, gpt.bias_linear, residual_std(gpt), tp)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if self.swiglu:
            return self.fc2(swiglu(x))
        return self.fc2(F.gelu(x, approximate=self.approximate))


class Block(nn.Module):
    """One transformer block: [b, s, h] -> [b, s, h]."""

    def __init__(
        self, gpt: GPTConfig, tp: TensorParallel, recompute: str = "none", dropout: Dropout = NONE, number: int = 0
    ):
        """Args:
        recompute: see `Execution`.
        number: of the block in the model, from 0.
        """
        super().__init__()
        self.recompute, self.dropout, self.tp, self.number = recompute == "full", dropout.hidden, tp, number
        self.attention_norm = Norm(gpt.hidden_size, gpt.normalization, gpt.norm_epsilon, tp)
        self.attention = Attention(gpt, tp, recompute == "selective", dropout.attention)
        self.mlp_norm = Norm(gpt.hidden_size, gpt.normalization, gpt.norm_epsilon, tp)
        self.mlp = MLP(gpt, tp)

    def forward(self, x: Tensor, window: Window) -> Tensor:
        """Args:
        window: of the full sequence, also where `x` is split by position.
        """
        return recomputed(self._forward, x, window) if self.recompute else self._forward(x, window)

    def _forward(self, x: Tensor, window: Window) -> Tensor:
        x = x + self.dropped(self.attention(self.attention_norm(x), window), window, AFTER_ATTENTION)
        return x + self.dropped(self.mlp(self.mlp_norm(x)), window, AFTER_MLP)

    def dropped(self, x: Tensor, window: Window, site: int) -> Tensor:
        """Hidden dropout of [b, s, h], or [b, s / t, h], in training."""
        if not self.dropout or window.keys is None:
            return x
        first = self.tp.group.rank * x.shape[1] if self.tp.sequence_parallel else 0
        return drop_hidden(x, window.keys, site, first, self.dropout)
