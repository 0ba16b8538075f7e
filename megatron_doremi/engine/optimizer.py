"""AdamW with weight decay on matrices only, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megatron_doremi.config import OptimizerConfig
from megatron_doremi.engine.reduction import loose_buckets
from megatron_doremi.parallel.parameters import spec_of


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], optim: OptimizerConfig, in_buckets: bool = False
) -> list[dict[str, Any]]:
    """AdamW's groups: matrices, and vectors (biases and norm weights), which have no weight decay.

    Args:
        in_buckets: the groups are buckets of these, in the order in which backward passes fill them.
    """
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for _, parameter in parameters:
        # By the shape in its spec: with ZeRO 3 the parameter's own shape is [0].
        (matrices if len(spec_of(parameter).shape) > 1 else vectors).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": optim.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if in_buckets:
        groups = [
            {**group, "params": list(each.parameters)} for group in groups for each in loose_buckets(group["params"])
        ]
    return [group for group in groups if group["params"]]


def adam_settings(optim: OptimizerConfig) -> dict[str, Any]:
    """The arguments of torch's AdamW (Loshchilov and Hutter 2019)."""
    return {
        "lr": optim.lr,
        "betas": (optim.adam_beta1, optim.adam_beta2),
        "eps": optim.adam_eps,
        "fused": True,
    }


def make_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]], optim: OptimizerConfig, in_buckets: bool = False
) -> torch.optim.AdamW:
    """AdamW of a model's parameters; `in_buckets`: see `parameter_groups`."""
    return torch.optim.AdamW(parameter_groups(parameters, optim, in_buckets), **adam_settings(optim))


@dataclass(frozen=True)
class LearningRate:
    """The learning rate as a function of the step.

    It rises linearly to the peak over the warmup and then decays to the minimum at the last step: linearly, along half
    a cosine, exponentially, not at all, or (WSD) linearly over the last part of the run only.

    Attributes:
        style: --lr-decay-style.
        peak: rate at the end of the warmup.
        minimum: rate at the last step, unless the style is constant.
        warmup: steps of linear warmup.
        decay_start: last step before the decay.
        train_iters: last step.
    """

    style: str
    peak: float
    minimum: float
    warmup: int
    decay_start: int
    train_iters: int

    def at(self, step: int) -> float:
        """The learning rate of a step; the first step is 1."""
        if step <= self.warmup:
            return self.peak * step / self.warmup
        if self.style == "constant":
            return self.peak
        done = min(1.0, max(0.0, (step - self.decay_start) / max(1, self.train_iters - self.decay_start)))
        if self.style == "cosine":
            return self.minimum + (self.peak - self.minimum) * 0.5 * (1.0 + math.cos(math.pi * done))
        if self.style == "exponential":
            return self.peak * (self.minimum / self.peak) ** done
        return self.peak + (self.minimum - self.peak) * done


def same_until(before: LearningRate, now: LearningRate, step: int) -> bool:
    """Whether all steps up to `step` have the same rate under two schedules with warmup, stable phase and decay (WSD):
    that of a branch and of its run, whose decays have not begun."""
    if before.style != "WSD" or now.style != "WSD":
        return before == now
    stable = (before.peak, before.warmup) == (now.peak, now.warmup)
    return before == now or (stable and step <= min(before.decay_start, now.decay_start))


def make_learning_rate(optim: OptimizerConfig, train_iters: int) -> LearningRate:
    """The learning rate schedule of a run of `train_iters` steps."""
    warmup = optim.warmup_steps(train_iters)
    decay_start = warmup
    if optim.lr_decay_style == "WSD":
        decay = optim.lr_wsd_decay_iters or round(optim.lr_wsd_decay_fraction * train_iters)
        decay_start = max(warmup, train_iters - decay)
    return LearningRate(optim.lr_decay_style, optim.lr, optim.min_lr, warmup, decay_start, train_iters)
