"""AdamW over matrices and the rest, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from megatron_doremi.config import OptimizerConfig
from megatron_doremi.parallel.parameters import spec_of


def make_optimizer(parameters: Iterable[tuple[str, nn.Parameter]], optim: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019); biases and norms, the vectors, do not decay."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for _, parameter in parameters:
        # Not its own shape, which is [0] where ZeRO 3 has cut it.
        (matrices if len(spec_of(parameter).shape) > 1 else vectors).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": optim.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=optim.lr,
        betas=(optim.adam_beta1, optim.adam_beta2),
        eps=optim.adam_eps,
        fused=True,
    )


def warmup_steps(optim: OptimizerConfig, train_iters: int) -> int:
    """Steps of linear warmup."""
    return optim.lr_warmup_iters or round(optim.lr_warmup_fraction * train_iters)


def learning_rate(step: int, optim: OptimizerConfig, train_iters: int) -> float:
    """The rate of step `step` (the first is 1) of `train_iters`.

    It rises linearly to the peak over the warmup and then falls to `min_lr` at the last step: linearly, along
    half a cosine, exponentially, not at all, or (WSD) linearly over the last part of the run only.
    """
    warmup = warmup_steps(optim, train_iters)
    if step <= warmup:
        return optim.lr * step / warmup
    if optim.lr_decay_style == "constant":
        return optim.lr
    first = warmup
    if optim.lr_decay_style == "WSD":
        first = max(warmup, train_iters - round(optim.lr_wsd_decay_fraction * train_iters))
    done = min(1.0, max(0.0, (step - first) / max(1, train_iters - first)))
    if optim.lr_decay_style == "cosine":
        return optim.min_lr + (optim.lr - optim.min_lr) * 0.5 * (1.0 + math.cos(math.pi * done))
    if optim.lr_decay_style == "exponential":
        return optim.lr * (optim.min_lr / optim.lr) ** done
    return optim.lr + (optim.min_lr - optim.lr) * done
