"""Number of parameters of each layer, counted on the meta device."""

from __future__ import annotations

import torch

from megatron_doremi.config import GPTConfig
from megatron_doremi.model.gpt import Block
from megatron_doremi.model.pipeline import layer_names
from megatron_doremi.parallel.groups import TensorGroup
from megatron_doremi.parallel.layers import LearnedPositions, Norm, TensorParallel, VocabParallelEmbedding


def parameters_by_layer(gpt: GPTConfig, tensor_size: int) -> list[int]:
    """Parameters of each pipeline layer on one tensor rank; 0 for a tied output layer."""
    tp = TensorParallel(TensorGroup(None, tensor_size, 0))
    with torch.device("meta"):
        vocabulary = VocabParallelEmbedding(
            gpt.vocab_size, gpt.padded_vocab_size(tensor_size), gpt.hidden_size, 0.0, tp
        )
        layers = {
            "embedding": vocabulary,
            "positions": LearnedPositions(gpt.max_positions, gpt.hidden_size, 0.0, tp),
            "layers": Block(gpt, tp),
            "final_norm": Norm(gpt.hidden_size, gpt.normalization, gpt.norm_epsilon, tp),
            "output": vocabulary,
        }
    sizes = {name: sum(p.numel() for p in layer.parameters()) for name, layer in layers.items()}
    counts = [sizes[name.split(".")[0]] for name in layer_names(gpt)]
    if gpt.tied_embeddings:
        counts[-1] = 0
    return counts
