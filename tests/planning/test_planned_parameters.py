"""The parameters that a plan counts, against those of the built model: the paper's seven shapes, at any layout.

Run alone: python -m pytest tests/planning/test_planned_parameters.py
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from megatron_doremi.config import ModelConfig, gpt_config
from megatron_doremi.model.pipeline import layer_names, layer_specs
from megatron_doremi.model.unpipelined import GPTModel
from megatron_doremi.parallel.context import unsharded
from megatron_doremi.parallel.groups import TensorGroup
from megatron_doremi.parallel.layers import TensorParallel
from megatron_doremi.parallel.topology import stage_bounds
from megatron_doremi.planning.memory import parameter_counts, parameters_by_stage, unsharded_by_zero
from megatron_doremi.shapes import PAPER_SHAPES

VARIANTS = {
    "as in the paper": {},
    "untied": {"untie_embeddings_and_output_weights": True},
    "SwiGLU": {"swiglu": True},
    "untied, SwiGLU, no bias": {
        "untie_embeddings_and_output_weights": True,
        "swiglu": True,
        "disable_bias_linear": True,
    },
    "GPT-2": {"normalization": "LayerNorm", "position_embedding_type": "learned_absolute"},
    "grouped queries, norms": {"num_query_groups": 4, "qk_layernorm": True},
}
VOCABULARY = 50_257


def shape_of(size, variant, seq_length=1024):
    return gpt_config(ModelConfig(model_size=size, **VARIANTS[variant]), seq_length, VOCABULARY)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", PAPER_SHAPES)
def test_those_of_the_built_model(size, variant):
    gpt = shape_of(size, variant)
    with torch.device("meta"):
        model = GPTModel(gpt, unsharded(torch.device("meta")), seed=None)
    built = sum(parameter.numel() for parameter in model.parameters())
    assert parameter_counts(gpt, 1, 1) == (built, built)
    vectors = sum(p.numel() for p in model.parameters() if p.numel() <= 10 * gpt.hidden_size)
    assert unsharded_by_zero(gpt, 1) == vectors


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("size", "tensor", "pipe"), [("70m", 1, 3), ("280m", 2, 5), ("1b", 4, 4), ("8b", 2, 8)])
def test_those_of_a_stage(size, tensor, pipe, variant):
    """The layers of a stage, with the embedding's copy on the last one if it is tied."""
    gpt, tp = shape_of(size, variant), TensorParallel(TensorGroup(None, tensor, 0))
    names = layer_names(gpt)
    with torch.device("meta"):
        layers = [spec.build() for spec in layer_specs(gpt, tp)]
    first = names.index("layers.0")
    bounds = stage_bounds(gpt.num_layers, pipe, first, len(names) - first - gpt.num_layers)
    built = [sum(p.numel() for layer in layers[a:b] for p in layer.parameters()) for a, b in pairwise(bounds)]
    assert parameters_by_stage(gpt, tensor, pipe) == tuple(built)
