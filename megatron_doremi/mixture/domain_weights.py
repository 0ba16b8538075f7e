"""Domain weights: from a step's losses to alpha_t and their mean (Xie et al. 2023, Algorithm 1).

With k domains, eta the step size and c the smoothing, at step t:

    lambda_i = sum of max(l - r, 0) over the batch's targets of domain i / their number
               (no target of i in the batch: the last lambda_i seen, 0 before the first)
    alpha'_i = alpha_i * exp(eta * lambda_i)
    alpha_i  = (1 - c) * alpha'_i / sum_j alpha'_j + c / k

l is the proxy's token loss and r the reference's, in nats. The result is the mean of alpha_1 .. alpha_T.
Everything is float64, on logarithms, from sums that all ranks share: the same on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def next_excess(last: Tensor, excess_sum: Tensor, targets: Tensor) -> Tensor:
    """lambda_t: [k] mean clipped excess loss of each domain, in nats; absent domains keep their last."""
    seen = targets > 0
    return torch.where(seen, excess_sum / targets.clamp(min=1.0), last)


def next_weights(weights: Tensor, excess: Tensor, step_size: float, smoothing: float) -> Tensor:
    """alpha_t: [k] from alpha_{t-1} and lambda_t (Algorithm 1, lines 6 to 8)."""
    logs = weights.log() + step_size * excess
    normalized = torch.exp(logs - torch.logsumexp(logs, dim=0))
    return (1.0 - smoothing) * normalized + smoothing / weights.numel()


@dataclass(frozen=True)
class DomainWeights:
    """The state of the algorithm after `steps` updates. All vectors are [k] float64.

    Attributes:
        weights: alpha_t.
        excess: lambda_t, with the last value seen for domains that were absent.
        weight_sum: alpha_1 + ... + alpha_t.
        steps: t.
    """

    weights: Tensor
    excess: Tensor
    weight_sum: Tensor
    steps: int

    @staticmethod
    def start(num_domains: int, device: torch.device | str = "cpu") -> DomainWeights:
        """alpha_0 = 1 / k."""
        zeros = torch.zeros(num_domains, dtype=torch.float64, device=device)
        return DomainWeights(torch.full_like(zeros, 1.0 / num_domains), zeros, zeros.clone(), 0)

    def update(self, excess_sum: Tensor, targets: Tensor, step_size: float, smoothing: float) -> DomainWeights:
        """One step, from the global batch's [k] sums of clipped excess and [k] numbers of targets."""
        excess = next_excess(self.excess, excess_sum, targets)
        weights = next_weights(self.weights, excess, step_size, smoothing)
        return DomainWeights(weights, excess, self.weight_sum + weights, self.steps + 1)

    def mean(self) -> Tensor:
        """The result: the mean of alpha over all steps; 1 / k before the first."""
        return self.weight_sum / self.steps if self.steps else self.weights

    def to_dict(self, names: Sequence[str]) -> dict[str, Any]:
        """For a checkpoint, keyed by domain; floats survive JSON exactly."""
        vectors = {key: getattr(self, key).tolist() for key in ("weights", "excess", "weight_sum")}
        return {"steps": self.steps, **{key: dict(zip(names, v, strict=True)) for key, v in vectors.items()}}

    @staticmethod
    def from_dict(entry: Mapping[str, Any], names: Sequence[str], device: torch.device | str) -> DomainWeights:
        """The state that `to_dict` wrote. Raises KeyError where a domain is missing."""

        def vector(key: str) -> Tensor:
            return torch.tensor([entry[key][name] for name in names], dtype=torch.float64, device=device)

        return DomainWeights(vector("weights"), vector("excess"), vector("weight_sum"), int(entry["steps"]))

    def to(self, device: torch.device) -> DomainWeights:
        """The same on a device."""
        return DomainWeights(self.weights.to(device), self.excess.to(device), self.weight_sum.to(device), self.steps)
