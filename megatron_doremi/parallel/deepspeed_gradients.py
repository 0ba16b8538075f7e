"""The float32 gradients of DeepSpeed's bfloat16 optimizer, by its private names; see deepspeed_internals.py.

It serves ZeRO 1 in float32 too: its gradients lie in one tensor, which replicas reduce in place beside the backward
pass. DeepSpeed's own optimizer for that copies them after it, which takes up to 16 bytes a parameter.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn


class LeanBF16Optimizer(BF16_Optimizer):
    """The bfloat16 optimizer without three passes over its float32 gradients a step.

    DeepSpeed casts each gradient before it adds it, and zeroes the sums twice. Here a step's first micro-batch writes
    the sums, and the others add to them, with the same result. So a parameter without a gradient would keep the last
    step's; our models have none.
    """

    @torch.no_grad()
    def _update_hp_grad(self, lp: nn.Parameter, group_idx: int, param_idx: int, clear_lp_grads: bool) -> None:
        if lp.grad is None:
            return
        assert not clear_lp_grads
        total = self.fp32_groups_gradients[group_idx][param_idx]
        has_gradient = self.fp32_groups_has_gradients[group_idx]
        gradient = lp.grad.reshape(-1)
        total.add_(gradient) if has_gradient[param_idx] else total.copy_(gradient)
        lp._hp_grad = total  # type: ignore[attr-defined]
        has_gradient[param_idx] = True

    def step(self, closure: None = None) -> None:
        """The optimizer's step."""
        assert all(map(all, self.fp32_groups_has_gradients)), "a parameter got no gradient"
        super().step(closure)

    def clear_hp_grads(self) -> None:
        """Forgets the sums, which the next step's first micro-batch overwrites."""
        self.fp32_groups_has_gradients = [[False] * len(group) for group in self.fp32_groups_gradients]


def make_float32_optimizer(engine: DeepSpeedEngine, optimizer: torch.optim.Optimizer) -> BF16_Optimizer:
    """The bfloat16 optimizer of an engine whose weights are float32, around a torch optimizer: it keeps float32 master
    weights and gradients, as for any weights."""
    return BF16_Optimizer(
        optimizer,
        engine.param_names,
        bfloat16_config=SimpleNamespace(enabled=True, immediate_grad_update=True),
        mpu=engine.mpu,
        clip_grad=engine.gradient_clipping(),
        allgather_bucket_size=engine.zero_allgather_bucket_size(),
        dp_process_group=engine.seq_data_parallel_group,
        grad_acc_dtype=torch.float32,
    )


def save_passes(engine: DeepSpeedEngine) -> None:
    """Makes a bfloat16 optimizer that was just built a lean one."""
    if type(engine.optimizer) is BF16_Optimizer:
        engine.optimizer.__class__ = LeanBF16Optimizer


def flat_gradients(engine: DeepSpeedEngine) -> list[tuple[list[nn.Parameter], Tensor]]:
    """The float32 gradients of the bfloat16 optimizer: for each of its groups the parameters, and their gradients, one
    after the other and then padding. The optimizer's hooks on the parameters add to them."""
    optimizer = engine.optimizer
    return list(zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients_flat, strict=True))
