"""How much memory activations take: the formula of docs/memory.md, measured by tests/planning/test_memory.py.

Counted is what waits for the backward pass. Not counted: a few numbers a token (statistics of norms and softmax,
rotary angles), and what an operation needs while it runs.
"""

from __future__ import annotations

from megatron_doremi.config import GPTConfig, ParallelConfig


def block_bytes_per_token(gpt: GPTConfig, parallel: ParallelConfig, element: int) -> float:
    """Bytes that one transformer block keeps for a token of a micro-batch on one rank.

    Args:
        element: bytes of an activation, 2 in bfloat16, else 4. Norms keep their input in float32 in any case.
    """
    tensor, hidden = parallel.tensor_model_parallel_size, gpt.hidden_size
    # The residual stream is cut by position over the tensor group, or whole on each of its ranks.
    residual = hidden / tensor if parallel.sequence_parallel else hidden
    if parallel.recompute_granularity == "full":
        return element * residual
    queries = gpt.num_attention_heads * gpt.kv_channels / tensor
    keys = gpt.num_query_groups * gpt.kv_channels / tensor
    norms = 2 * (4 * residual + element * hidden)
    # The fused projection and the heads' outputs; rotated queries and keys beside it, unless they are made again.
    attention = queries + 2 * keys + queries
    if gpt.position_embedding_type == "rope" and parallel.recompute_granularity == "none":
        attention += queries + keys
    mlp = (4 if gpt.swiglu else 2) * gpt.ffn_hidden_size / tensor
    return norms + element * (attention + mlp)


def micro_batch_bytes(
    gpt: GPTConfig, parallel: ParallelConfig, tokens: int, element: int, blocks: int, stage: int
) -> float:
    """Bytes that a pipeline stage keeps of a micro-batch between its forward and its backward pass.

    Args:
        tokens: of the micro-batch.
        blocks: transformer blocks of the stage.
        stage: its number, from 0.
    """
    tensor, hidden = parallel.tensor_model_parallel_size, gpt.hidden_size
    residual = hidden / tensor if parallel.sequence_parallel else hidden
    last = stage == parallel.pipeline_model_parallel_size - 1
    # What was received and what was sent stays in the pipe's buffers.
    per_token = element * residual * ((stage > 0) + (not last))
    per_token += blocks * block_bytes_per_token(gpt, parallel, element)
    if last:
        # The final norm, the output layer's input, and its logits where they are not made again.
        per_token += 4 * residual + element * hidden
        if not parallel.loss_chunk_tokens:
            per_token += 4 * gpt.padded_vocab_size(tensor) / tensor
    return tokens * per_token


def held_micro_batches(alternating: bool, micro_batches: int, stages: int, stage: int, zero_stage: int) -> int:
    """Micro-batches whose activations a stage holds at the most.

    The alternating schedule holds all of a step; 1F1B those between a stage and the end of the pipe. ZeRO 3 scores a
    batch first and holds one.
    """
    if alternating and zero_stage < 3:
        return micro_batches
    return min(micro_batches, stages - stage)
