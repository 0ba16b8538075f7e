"""Bytes that a transformer block holds for the backward pass, and works with there, per token; see memory.py."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from megatron_doremi.config import GPTConfig, ParallelConfig, TrainingConfig
from megatron_doremi.planning.document_memory import document_backward_bytes_per_token, repeated_bytes_per_token

# Without dropout.
PLAIN = TrainingConfig()


class _Widths(NamedTuple):
    """Numbers per token on a rank: of the residual stream, sharded by position over the tensor parallel group or
    replicated on each of its ranks; of the queries; of the keys, or the values; of the feed-forward layer's inside."""

    residual: float
    queries: float
    keys: float
    mlp: float


def _widths(gpt: GPTConfig, parallel: ParallelConfig) -> _Widths:
    tensor = parallel.tensor_model_parallel_size
    return _Widths(
        gpt.hidden_size / tensor if parallel.sequence_parallel else gpt.hidden_size,
        gpt.num_attention_heads * gpt.kv_channels / tensor,
        gpt.num_query_groups * gpt.kv_channels / tensor,
        (3 if gpt.swiglu else 2) * gpt.ffn_hidden_size / tensor,
    )


def block_bytes_per_token(
    gpt: GPTConfig, parallel: ParallelConfig, element: int, training: TrainingConfig = PLAIN
) -> float:
    """Bytes that one transformer block holds per token of a micro-batch on one rank.

    Args:
        element: bytes of an activation, 2 in bfloat16, else 4.
        training: its dropout.
    """
    tensor, hidden = parallel.tensor_model_parallel_size, gpt.hidden_size
    residual, queries, keys, mlp = _widths(gpt, parallel)
    if parallel.recompute_granularity == "full":
        return element * residual
    # Both norms' inputs and outputs: with sequence parallelism this rank's positions, since the outputs are gathered
    # again; a compiled block keeps them as gathered.
    norms = 2 * (residual + (hidden if parallel.compile else residual))
    attention = _attention_numbers(gpt, parallel, queries, keys)
    # One byte for each number of a mask.
    dropped = 2 * residual if training.hidden_dropout else 0.0
    if training.attention_dropout and parallel.recompute_granularity == "none":
        # Probabilities in float32, their masks, and what is left of them (compiled at most these, by torch's choice);
        # keys and values of each query.
        attention += 2 * (queries - keys)
        dropped += (5 + element) * gpt.num_attention_heads * gpt.max_positions / tensor
    repeated = repeated_bytes_per_token(gpt, parallel, element, training)
    return element * (norms + attention + mlp) + dropped + repeated


def _attention_numbers(gpt: GPTConfig, parallel: ParallelConfig, queries: float, keys: float) -> float:
    """Numbers per token that a block holds between the projections of its attention."""
    fused, output = queries + 2 * keys, queries
    recomputes, rotates = parallel.recompute_granularity == "selective", gpt.position_embedding_type == "rope"
    if not parallel.compile:
        # Queries, keys and values as the attention reads them; norms of queries and keys hold their inputs.
        return fused + output + (queries + keys if gpt.qk_layernorm and not recomputes else 0.0)
    # In a compiled block values are a view of the fused projection, so all of it is held. Queries and keys are copies
    # if they are rotated or normalized; else views as well, except queries of several to a group.
    if recomputes:
        return fused
    if rotates or gpt.qk_layernorm:
        return fused + queries + keys + output
    return fused + output + (queries if gpt.num_query_groups < gpt.num_attention_heads else 0.0)


def dropout_bytes_per_token(
    gpt: GPTConfig, parallel: ParallelConfig, element: int, training: TrainingConfig = PLAIN
) -> float:
    """Bytes at work per token while the masks of a block's dropout are computed, beyond what it holds later: in a
    stage's last block, or with recomputation in the one that is computed again."""
    hidden, (residual, queries, keys, mlp) = gpt.hidden_size, _widths(gpt, parallel)
    # Four arrays of int64.
    at_work = 32.0 * residual if training.hidden_dropout else 0.0
    if not training.attention_dropout:
        return at_work
    probabilities = gpt.num_attention_heads * gpt.max_positions / parallel.tensor_model_parallel_size
    # Beside the probabilities in float32.
    hashes = 36.0 * probabilities
    if parallel.recompute_granularity == "full":
        return max(at_work, hashes + element * (3 * hidden + queries + 2 * keys))
    # The block does not hold yet, or no longer, what follows attention.
    after = element * (2 * residual + mlp)
    if parallel.recompute_granularity == "selective":
        return max(at_work, hashes + element * (2 * hidden + queries + 2 * keys) - after)
    return max(at_work, hashes - (5 + element) * probabilities - after)


def block_backward_bytes_per_token(
    gpt: GPTConfig, parallel: ParallelConfig, element: int, training: TrainingConfig = PLAIN
) -> float:
    """Bytes at work in the backward pass of a block per token: gradients of the residual stream and of the feed-forward
    layer's inner parts, or later those of attention by document; with full recomputation also all that the block holds
    otherwise."""
    inner = element * _widths(gpt, parallel).mlp
    inner = max(inner, document_backward_bytes_per_token(gpt, parallel, element, training))
    again = 0.0
    if parallel.recompute_granularity == "full":
        again = block_bytes_per_token(gpt, replace(parallel, recompute_granularity="none"), element, training)
    return element * 2 * gpt.hidden_size + inner + again
