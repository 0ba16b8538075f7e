"""A model in one process, without process groups: for logits and for generating text."""

from __future__ import annotations

import torch

from megatron_doremi.checkpoint.source import Weights
from megatron_doremi.config import GPTConfig
from megatron_doremi.model.unpipelined import GPTModel
from megatron_doremi.parallel.context import unsharded
from megatron_doremi.parallel.parameters import spec_of


@torch.no_grad()
def load_model(gpt: GPTConfig, weights: Weights, device: torch.device, dtype: torch.dtype) -> GPTModel:
    """A model with its weights, for forward passes only."""
    context = unsharded(device)
    module = GPTModel(gpt, context, seed=None).to(device, dtype)
    for name, parameter in module.model_parameters():
        parameter.copy_(weights.local_shard(name, spec_of(parameter), context.topology))
    return module.requires_grad_(False).eval()
