"""Group DRO over domains: the domain weights alpha_t from a step's losses (Xie et al. 2023, Algorithm 1).

With k domains, eta the step size and c the smoothing, at step t:

    lambda_i = sum of max(l - r, 0) over the batch's targets of domain i / their number
               (no target of i in the batch: the previous lambda_i, 0 before the first)
    alpha'_i = alpha_i * exp(eta * lambda_i)
    alpha_i  = (1 - c) * alpha'_i / sum_j alpha'_j + c / k

l is the proxy's token loss and r the reference's, in nats. The result is the mean of alpha_1 .. alpha_T.
All arithmetic is float64, in log space, on sums over the global batch: the weights are bit-identical on all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from megatron_doremi.config import DoReMiConfig
from megatron_doremi.mixture.controller import ControllerState, MixtureController
from megatron_doremi.mixture.early_stop import EarlyStop, EarlyStopState, FinalMean
from megatron_doremi.mixture.statistics import DomainStats
from megatron_doremi.storage.formats import Name

# Tolerance for the rounding error of a float64 sum over domains and steps.
_ROUNDING = 1e-6
# Settings that must not change when a run resumes.
_IDENTITY = (
    "doremi_step_size",
    "doremi_smoothing",
    "doremi_update",
    "doremi_weighting",
    "doremi_objective",
    "doremi_normalization",
)


def token_scores(loss: Tensor, reference: Tensor | None, objective: str) -> Tensor:
    """The term that each token adds to the sum in lambda.

    Args:
        loss: [batch, seq] the proxy's losses l in nats, float64.
        reference: [batch, seq] the reference's losses r in nats; None if the objective does not read them.
        objective: excess, max(l - r, 0); or, from the paper's ablation (Xie et al. 2023, Table 7), hardest, l, and
            easiest, -r, which is not clipped because it is never positive.
    """
    if objective == "hardest":
        return loss
    if reference is None:
        return torch.zeros_like(loss)
    if objective == "easiest":
        return -reference.double()
    reference = reference.double()
    # The product is NaN for an infinite reference loss, which clipping would otherwise turn into an excess of 0.
    return (loss - reference).clamp(min=0.0) + 0.0 * reference


def next_excess(last: Tensor, excess_sum: Tensor, targets: Tensor) -> Tensor:
    """lambda_t: [k] mean clipped excess loss of each domain, in nats; a domain absent from the batch keeps its last."""
    return torch.where(targets > 0, excess_sum / targets.clamp(min=1.0), last)


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
        excess: lambda_t; domains absent from the batch keep their last value.
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
        """The state after one more step.

        Args:
            excess_sum: [k] sums of the clipped excess over the global batch.
            targets: [k] numbers of targets in the global batch.
        """
        excess = next_excess(self.excess, excess_sum, targets)
        weights = next_weights(self.weights, excess, step_size, smoothing)
        return DomainWeights(weights, excess, self.weight_sum + weights, self.steps + 1)

    def mean(self) -> Tensor:
        """The mean of alpha over all steps; 1 / k before the first."""
        return self.weight_sum / self.steps if self.steps else self.weights

    def to_dict(self, names: Sequence[str]) -> dict[str, Any]:
        """The state for a checkpoint, keyed by domain name. JSON preserves the floats exactly."""
        vectors = {key: getattr(self, key).tolist() for key in ("weights", "excess", "weight_sum")}
        return {"steps": self.steps, **{key: dict(zip(names, v, strict=True)) for key, v in vectors.items()}}

    @staticmethod
    def from_dict(entry: Mapping[str, Any], names: Sequence[str], device: torch.device | str) -> DomainWeights:
        """The state that `to_dict` returned. Raises KeyError if a domain is missing."""

        def vector(key: str) -> Tensor:
            return torch.tensor([entry[key][name] for name in names], dtype=torch.float64, device=device)

        return DomainWeights(vector("weights"), vector("excess"), vector("weight_sum"), int(entry["steps"]))

    def to(self, device: torch.device | str) -> DomainWeights:
        """The state on a device."""
        return DomainWeights(self.weights.to(device), self.excess.to(device), self.weight_sum.to(device), self.steps)


class GroupDROState(ControllerState):
    """A proxy's domain weights in a checkpoint; see `DomainWeights`."""

    weights: dict[Name, Annotated[float, Field(ge=0, le=1)]]
    excess: dict[Name, float]
    weight_sum: dict[Name, Annotated[float, Field(ge=0)]]
    # Only of a run with --doremi-stop-drift.
    early_stop: EarlyStopState | None = None

    @model_validator(mode="after")
    def _sums(self) -> GroupDROState:
        if not self.weights.keys() == self.excess.keys() == self.weight_sum.keys():
            raise ValueError("weights, excess and weight_sum must name the same domains")
        for name, total, expected in (("weights", self.weights, 1.0), ("weight_sum", self.weight_sum, self.steps)):
            actual = math.fsum(total.values())
            if not math.isclose(actual, expected, rel_tol=_ROUNDING, abs_tol=_ROUNDING):
                raise ValueError(f"{name} must sum to {expected:g}, not {actual!r}")
        if self.early_stop is not None:
            if self.early_stop.sums.keys() != self.weights.keys():
                raise ValueError("early_stop.sums must name the domains of weights")
            if self.early_stop.steps and self.early_stop.steps[-1] > self.steps:
                raise ValueError(f"early_stop.steps must end at {self.steps} at the latest")
        return self


class GroupDRO(MixtureController):
    """Algorithm 1 as a controller.

    `alternating`: alpha_t is computed from this batch, then its gradient under alpha_t. `simultaneous`: the gradient
    under alpha_{t-1}, then alpha_t, the textbook step toward a saddle point. With `resample` the loss is the mean over
    the batch's tokens and the weights determine the sampling of the next batch, so both updates are the same.

    Attributes:
        state: alpha_t and its history.
    """

    learns = True
    state_name = "doremi"
    state_schema = GroupDROState
    vanishing_remedy = "give --doremi-smoothing above 0, or a smaller --doremi-step-size"

    def __init__(self, doremi: DoReMiConfig, sampling: NDArray[np.float64], early_stop: EarlyStop | None = None):
        """
        Args:
            sampling: [k] sampling weights of the domains; not used with `resample`.
            early_stop: decides when the run stops early; None: it takes all of its steps.
        """
        self._early_stop = early_stop
        self.stop_rule = early_stop.rule if early_stop is not None else ""
        self._objective, self._sampling = doremi.doremi_objective, sampling
        self._step_size, self._smoothing = doremi.doremi_step_size, doremi.doremi_smoothing
        self._identity = {name: getattr(doremi, name) for name in _IDENTITY}
        self._resamples = doremi.doremi_weighting == "resample"
        self.method = (
            f"doremi, {doremi.doremi_update}, {doremi.doremi_objective}, {doremi.doremi_weighting}, "
            f"{doremi.doremi_normalization}"
        )
        self.needs_reference = doremi.doremi_objective != "hardest"
        self.before_backward = doremi.doremi_update == "alternating" and not self._resamples
        self.samples_ahead = not self._resamples
        self.state = DomainWeights.start(len(sampling))
        # Of the last step: the weights in its gradient, and its statistics.
        self._gradient_weights = self.state.weights
        self._stats = DomainStats.zeros(len(sampling))

    def to(self, device: torch.device) -> None:
        self.state = self.state.to(device)

    def token_scores(self, loss: Tensor, reference: Tensor | None) -> Tensor:
        return token_scores(loss, reference, self._objective)

    def observe(self, stats: DomainStats) -> None:
        before = self.state
        self.state = before.update(stats.score, stats.targets, self._step_size, self._smoothing)
        self._gradient_weights = self.state.weights if self.before_backward else before.weights
        self._stats = stats
        if self._early_stop is not None:
            self._early_stop.observe(self.state.steps, self.state.weight_sum)

    def settled(self) -> FinalMean | None:
        return None if self._early_stop is None else self._early_stop.settled

    def loss_weights(self) -> Tensor | None:
        return None if self._resamples else self.state.weights

    def sampling_weights(self, step: int) -> NDArray[np.float64]:
        return self.state.weights.cpu().numpy() if self._resamples else self._sampling

    def result(self) -> NDArray[np.float64]:
        settled = self.settled()
        return self.state.mean().cpu().numpy() if settled is None else settled.mean

    def settings(self) -> dict[str, Any]:
        stop = {} if self._early_stop is None else {"stop_drift": self._early_stop.drift}
        return {"step_size": self._step_size, "smoothing": self._smoothing, **stop}

    def identity(self) -> dict[str, Any]:
        return self._identity

    def entries(self, names: Sequence[str]) -> dict[str, Any]:
        """lambda_t (the excess of Algorithm 1, or the score of another objective), alpha_t, and the objective: the sum
        of the domains' mean losses times their weights in the gradient."""
        vectors = (self.state.excess, self.state.weights, self._gradient_weights, self._stats.loss, self._stats.targets)
        # One synchronization with the device, not five.
        scores, weights, gradient_weights, loss, targets = torch.stack(vectors).tolist()
        means = [s / t if t else 0.0 for s, t in zip(loss, targets, strict=True)]
        estimate = None if self._early_stop is None else self._early_stop.estimate
        score_name = "domain_excess" if self._objective == "excess" else "domain_score"
        return {
            score_name: dict(zip(names, scores, strict=True)),
            "domain_weights": dict(zip(names, weights, strict=True)),
            "dro_loss": sum(w * m for w, m in zip(gradient_weights, means, strict=True)),
            **({} if estimate is None else {"final_weights_error": estimate.half_width}),
        }

    def state_dict(self, names: Sequence[str]) -> dict[str, Any]:
        history = {} if self._early_stop is None else {"early_stop": self._early_stop.to_dict(names)}
        return {**self.state.to_dict(names), **history}

    def load_state_dict(self, state: Mapping[str, Any], names: Sequence[str]) -> None:
        self.state = DomainWeights.from_dict(state, names, self.state.weights.device)
        if self._early_stop is not None and state.get("early_stop") is not None:
            self._early_stop.load(state["early_stop"], names, self.state.steps)

    def resume_notes(self, state: Mapping[str, Any]) -> list[str]:
        history, flag = state.get("early_stop"), "--doremi-stop-drift"
        if self._early_stop is None:
            return [] if history is None else [f"without {flag} the run takes all of its steps"]
        if history is None:
            return [f"{flag} is new: the checkpoint holds no history of the weights, which begins now"]
        before, now = history["drift"], self._early_stop.drift
        return [] if before == now else [f"{flag} changed from {before:g} to {now:g}"]
