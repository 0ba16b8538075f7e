"""Muon (Jordan et al. 2024) for the matrices of the blocks, AdamW for everything else.

Muon moves a matrix along its momentum with all singular values made about 1. Scaled as in Moonlight (Liu et al. 2025,
section 2.2) its updates have the size of AdamW's, so that one learning rate and weight decay serve both.

A matrix that is sharded over the tensor-parallel group is joined for this, so that every layout takes the same steps.
What the fused projections hold (queries, keys, values; gate, up) counts as matrices of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_doremi.config import OptimizerConfig
from megatron_doremi.engine.optimizer import adam_settings, parameter_groups
from megatron_doremi.parallel.collectives import all_gather_into
from megatron_doremi.parallel.groups import TensorGroup
from megatron_doremi.parallel.parameters import ParameterSpec, shard, spec_of, unshard
from megatron_doremi.shapes import GPTConfig

# The quintic of Jordan et al.; five steps bring singular values between about 0.7 and 1.2.
_COEFFICIENTS, _STEPS = (3.4445, -4.7750, 2.0315), 5
# Root mean square of AdamW's updates in practice (Liu et al. 2025).
_RMS = 0.2


def is_moved_by_muon(name: str, parameter: Tensor) -> bool:
    """Whether a parameter of the model is a matrix of a block: not an embedding, an output layer or a vector."""
    return name.startswith("layers.") and len(spec_of(parameter).shape) == 2


def orthogonalized(matrix: Tensor) -> Tensor:
    """A matrix with the singular vectors of this one, and singular values of about 1, by Newton-Schulz iterations."""
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(_STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def parts_of(name: str, matrix: Tensor, gpt: GPTConfig) -> list[Tensor]:
    """The matrices that a full parameter holds, as views: queries, keys and values, or gate and up; else itself."""
    if name.endswith("attention.qkv.weight"):
        of_groups = matrix.view(gpt.num_query_groups, -1, gpt.kv_channels, matrix.shape[1])
        return [of_groups[:, :-2], of_groups[:, -2], of_groups[:, -1]]
    return list(matrix.chunk(2)) if name.endswith("mlp.fc1.weight") and gpt.swiglu else [matrix]


def update_of(name: str, momentum: Tensor, gpt: GPTConfig) -> Tensor:
    """The step of a full parameter at a learning rate of 1."""
    result = torch.empty_like(momentum)
    for source, target in zip(parts_of(name, momentum, gpt), parts_of(name, result, gpt), strict=True):
        matrix = source.reshape(-1, momentum.shape[1])
        scale = _RMS * math.sqrt(max(matrix.shape))
        target.copy_((orthogonalized(matrix) * scale).view(target.shape))
    return result


def make_muon(
    parameters: Iterable[tuple[str, nn.Parameter]],
    optim: OptimizerConfig,
    gpt: GPTConfig,
    tp: TensorGroup,
    replicas: TensorGroup | None = None,
) -> MuonAndAdamW:
    """Muon for the matrices of the blocks; AdamW for the rest, as `make_optimizer` has it.

    Args:
        replicas: over which ZeRO 1 shards the state; None without ZeRO.
    """
    names: dict[nn.Parameter, str] = {}
    rest: list[tuple[str, nn.Parameter]] = []
    for name, parameter in parameters:
        if is_moved_by_muon(name, parameter):
            names[parameter] = name
        else:
            rest.append((name, parameter))
    moved = {
        "params": list(names),
        "weight_decay": optim.weight_decay,
        "muon": True,
        "momentum": optim.muon_momentum,
    }
    return MuonAndAdamW([moved, *parameter_groups(rest, optim)], names, gpt, tp, replicas, **adam_settings(optim))


class MuonAndAdamW(torch.optim.AdamW):
    """Groups with `muon` are moved by Muon, the others by AdamW.

    The state has AdamW's names at every parameter: a matrix's momentum is its exp_avg, and its exp_avg_sq stays 0.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        names: Mapping[nn.Parameter, str],
        gpt: GPTConfig,
        tp: TensorGroup,
        replicas: TensorGroup | None,
        **adam: Any,
    ):
        """Args:
        names: of the parameters that Muon moves, in the order of their group.
        replicas: see `make_muon`.
        """
        super().__init__(groups, **adam)
        self._names, self._gpt, self._tp, self._replicas = dict(names), gpt, tp, replicas

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step; gradients are those of the full batch, the same on every replica. A collective call."""
        assert closure is None
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group.get("muon")]
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group.get("muon"):
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._move(parameter, group)

    def _move(self, parameter: nn.Parameter, group: Mapping[str, Any]) -> None:
        """One step of a matrix, or under ZeRO 1 of this replica's range of all matrices in a row."""
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if "exp_avg" not in state:
            state["step"] = torch.tensor(0.0, device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        momentum = state["exp_avg"].lerp_(gradient, 1.0 - group["momentum"])
        # Nesterov's.
        ahead = gradient.lerp(momentum, group["momentum"])
        update = self._update(parameter, ahead) if self._replicas is None else self._updates(ahead, self._replicas)
        parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"])

    def _update(self, parameter: nn.Parameter, ahead: Tensor) -> Tensor:
        """This rank's shard of the step of a matrix, from its shard of the momentum."""
        spec = spec_of(parameter)
        update = update_of(self._names[parameter], self._joined(ahead, spec), self._gpt)
        return shard(update, spec, self._tp.size, self._tp.rank)

    def _updates(self, ahead: Tensor, replicas: TensorGroup) -> Tensor:
        """This replica's range of the steps of all matrices, from its range of their momentum.

        DeepSpeed lays the parameters of a group in a row, in their order, with padding at the end, and gives each
        replica an equal range of it. Every replica computes all steps.
        """
        row, start = ahead, 0
        if replicas.size > 1:
            row = ahead.new_empty(replicas.size * len(ahead))
            # A list of outputs would be gathered into a second row first.
            all_gather_into(row, ahead.contiguous(), group=replicas.group)
        for parameter in self._names:
            stop = start + parameter.numel()
            row[start:stop] = self._update(parameter, row[start:stop].view(parameter.shape)).reshape(-1)
            start = stop
        row[start:] = 0.0
        return row.narrow(0, replicas.rank * len(ahead), len(ahead))

    def _joined(self, local: Tensor, spec: ParameterSpec) -> Tensor:
        """The full tensor of this rank's shard and those of the other ranks of the tensor group."""
        if self._tp.size == 1 or spec.dim is None:
            return local
        shards = [torch.empty_like(local) for _ in range(self._tp.size)]
        dist.all_gather(shards, local.contiguous(), group=self._tp.group)
        return unshard(shards, spec)
