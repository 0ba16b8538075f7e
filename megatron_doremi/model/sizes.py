"""The parameters of the model and their number by layer, on the meta device."""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_doremi.config import GPTConfig
from megatron_doremi.model.gpt import Block
from megatron_doremi.model.pipeline import layer_names, layer_specs
from megatron_doremi.parallel.groups import TensorGroup
from megatron_doremi.parallel.layers import LearnedPositions, Norm, TensorParallel, VocabParallelEmbedding
from megatron_doremi.parallel.parameters import ParameterSpec, spec_of


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


def parameter_specs(gpt: GPTConfig) -> dict[str, ParameterSpec]:
    """The parameters of the full model by name, in the order of its layers, unsharded and without padding."""
    tp, names = TensorParallel(), layer_names(gpt)
    specs: dict[str, ParameterSpec] = {}
    for name, layer in zip(names, layer_specs(replace(gpt, make_vocab_size_divisible_by=1), tp), strict=True):
        if name == "embedding" and specs:
            # The tied output layer.
            continue
        with torch.device("meta"):
            module = layer.build()
        specs |= {f"{name}.{parameter}": spec_of(value) for parameter, value in module.named_parameters()}
    return specs
