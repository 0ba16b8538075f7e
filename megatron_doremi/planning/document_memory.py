"""Bytes that attention by document takes (--reset-attention-mask): of a mask, or of the kernel that takes documents.

A plan in bfloat16 is taken to be for a GPU, where FlashAttention for sequences of variable length takes each document
(model/attention.py) and no mask exists. In float32, with attention dropout, or with heads that it does not take,
the blocks share a mask; so they do in bfloat16 on a CPU, of which a plan does not know.
"""

from __future__ import annotations

import torch

from megatron_doremi.config import GPTConfig, ParallelConfig, TrainingConfig
from megatron_doremi.data.loader import TOKENS_A_DOCUMENT
from megatron_doremi.model.attention import flash_takes

# Rows that the kernel's backward pass adds for each document to the sum of the queries' gradient, which is float32 and
# whose heads have a multiple of so many channels (FlashAttention 2 in torch 2.11, mha_varlen_bwd).
_ROWS, _CHANNELS = 128, 32
# Whether this torch's kernel takes fewer heads of keys and values; else they are repeated (`adapted`).
KERNEL_KNOWS_GROUPS = torch.__version__ >= "2.12"


def by_kernel(gpt: GPTConfig, element: int, training: TrainingConfig) -> bool:
    """Whether a kernel takes the documents, as far as a plan can know.

    Args:
        element: bytes of an activation, 2 in bfloat16, else 4.
        training: its dropout.
    """
    plain = element == 2 and not training.attention_dropout
    return gpt.reset_attention_mask and plain and flash_takes(gpt.kv_channels)


def document_bytes_per_token(gpt: GPTConfig, element: int, training: TrainingConfig) -> float:
    """Bytes per token that a micro-batch holds once for all blocks: the mask, or at most the bounds of documents."""
    if not gpt.reset_attention_mask:
        return 0.0
    return 4.0 / TOKENS_A_DOCUMENT if by_kernel(gpt, element, training) else float(element * gpt.max_positions)


def repeated_bytes_per_token(gpt: GPTConfig, parallel: ParallelConfig, element: int, training: TrainingConfig) -> float:
    """Bytes per token that a block holds of keys and values that are repeated for each query of a group, because the
    kernel of this torch (2.11) knows no groups; beyond the keys and values. With recomputation they are not held."""
    if KERNEL_KNOWS_GROUPS or parallel.recompute_granularity != "none" or not by_kernel(gpt, element, training):
        return 0.0
    repeated = gpt.num_attention_heads - gpt.num_query_groups
    return 2.0 * element * repeated * gpt.kv_channels / parallel.tensor_model_parallel_size


def document_backward_bytes_per_token(
    gpt: GPTConfig, parallel: ParallelConfig, element: int, training: TrainingConfig
) -> float:
    """Bytes at work per token in the backward pass of a block's attention by that kernel, beyond gradients of the
    residual stream, and less the feed-forward layer's inputs, which are no longer held: with as many documents as a
    micro-batch may have for the kernel to be taken. 0 or less: the feed-forward layer's backward pass takes more."""
    if not by_kernel(gpt, element, training):
        return 0.0
    tensor = parallel.tensor_model_parallel_size
    heads, groups = gpt.num_attention_heads / tensor, gpt.num_query_groups / tensor
    summed = 4.0 * (1 + _ROWS / TOKENS_A_DOCUMENT) * heads * (-(-gpt.kv_channels // _CHANNELS) * _CHANNELS)
    # Of the output, queries, keys and values; grouped keys and values have theirs for each query first.
    gradients = 2 * heads + 2 * groups + (2 * heads if groups < heads else 0.0)
    inner = (3 if gpt.swiglu else 2) * gpt.ffn_hidden_size / tensor
    return summed + element * (gradients * gpt.kv_channels - inner)
