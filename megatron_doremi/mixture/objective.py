"""What a step's token losses come to: the plain mean, or Group DRO over domains. The same for every engine.

An engine hands each micro-batch's token losses to `record` after its forward pass and asks `loss` for what to
differentiate. Where `before_backward` is set, the weights under which a batch's gradient is taken depend on the
whole batch: every micro-batch has to be recorded, and `turn` called, before the first `loss`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_doremi.mixture.domain_weights import DomainWeights
from megatron_doremi.mixture.statistics import (
    EXCESS,
    TARGETS,
    batch_coefficients,
    domain_coefficients,
    domain_sums,
    finite_windows,
    weighted_loss,
)
from megatron_doremi.parallel.groups import ProcessGroups
from megatron_doremi.parallel.topology import Topology


def reduce_sums(local: Tensor, topology: Topology, groups: ProcessGroups) -> Tensor:
    """Sums [rows, k] of the global batch on every rank, the same to the bit.

    One all-reduce over the data group at the end of the pipe, one broadcast to the rest of each replica. The
    first rank of the tensor group speaks for all of it, so that ranks which computed the same losses cannot
    disagree by a rounding.

    Args:
        local: [rows, k] float64 of this rank's micro-batches; read on the last stage only.
    """
    total = local.clone()
    if topology.data_size > 1 and topology.is_last_stage and topology.tensor_rank == 0:
        dist.all_reduce(total, group=groups.data)
    if topology.pipe_size * topology.tensor_size > 1:
        dist.broadcast(total, src=topology.loss_rank(), group=groups.model)
    return total


class MeanLoss:
    """The mean token loss of the global batch; per-domain sums are kept for the record.

    Attributes:
        local_sums: [3, k] of this rank's micro-batches of the step; zero away from the last stage.
        finite: `finite_windows` of each micro-batch of the step, in order; empty away from the last stage.
    """

    before_backward = False

    def __init__(self, num_domains: int, topology: Topology, groups: ProcessGroups, device: torch.device):
        self.num_domains, self.topology, self.groups = num_domains, topology, groups
        self.local_sums = torch.zeros(3, num_domains, dtype=torch.float64, device=device)
        self.finite: list[Tensor] = []

    def begin(self, targets: Tensor | None, micro_batches: int) -> None:
        """Starts a step.

        Args:
            targets: [k] float64 targets of each domain in the global batch; only Group DRO reads them.
            micro_batches: of a rank and step.
        """
        self.local_sums.zero_()
        self.finite.clear()

    def record(self, token_loss: Tensor, domains: Tensor, reference: Tensor | None = None) -> None:
        """Adds a micro-batch's [batch, seq] token losses, [batch] domains, to the step's sums.

        Args:
            reference: [batch, seq] the reference's losses on the same tokens; only Group DRO reads them.
        """
        self.local_sums += domain_sums(token_loss, domains, self.num_domains)
        self.finite.append(finite_windows(token_loss, None))

    def turn(self) -> None:
        """Called on every rank between a batch's forwards and its backwards, where `before_backward` is set."""
        raise AssertionError("the mean loss needs no turn")

    def loss(self, token_loss: Tensor, domains: Tensor) -> Tensor:
        """The scalar to differentiate; an engine divides its gradient by micro-batches and replicas."""
        return token_loss.mean()

    def end(self) -> None:
        """Called on every rank after the optimizer's step."""

    def step_sums(self) -> Tensor:
        """[3, k] float64 sums of the last global batch, on every rank; see statistics.py. A collective call."""
        return reduce_sums(self.local_sums, self.topology, self.groups)


@dataclass(frozen=True)
class DoReMiSettings:
    """How the domain weights move and what they do; DoReMiConfig in config.py says it of each.

    Attributes:
        sampling: [k] sampling weights of the blend, float64.
    """

    step_size: float
    smoothing: float
    update: str
    weighting: str
    objective: str
    normalization: str
    sampling: Tensor


class GroupDRO(MeanLoss):
    """A proxy's objective (Xie et al. 2023, Algorithm 1) and the state of its domain weights.

    `alternating`: alpha_t from this batch, then its gradient under alpha_t. `simultaneous`: the gradient under
    alpha_{t-1}, then alpha_t, the textbook step toward a saddle point. With `resample` the loss is the plain
    mean, the weights act on the sampling of the next batch, and both updates come to the same.

    Attributes:
        state: alpha_t and its history.
        gradient_weights: [k] the weights that the last step's gradient was taken under.
    """

    def __init__(self, settings: DoReMiSettings, topology: Topology, groups: ProcessGroups, device: torch.device):
        super().__init__(len(settings.sampling), topology, groups, device)
        self.settings = settings
        self.state = DomainWeights.start(self.num_domains, device)
        self.gradient_weights = self.state.weights
        self.resamples = settings.weighting == "resample"
        self.before_backward = settings.update == "alternating" and not self.resamples
        self._accumulation = 1
        self._sums = torch.zeros_like(self.local_sums)
        self._coefficients = torch.zeros_like(self.gradient_weights)

    def begin(self, targets: Tensor | None, micro_batches: int) -> None:
        super().begin(targets, micro_batches)
        self._accumulation = micro_batches * self.topology.data_size
        if not self.before_backward:
            assert targets is not None
            self._weigh(targets)

    def record(self, token_loss: Tensor, domains: Tensor, reference: Tensor | None = None) -> None:
        self.local_sums += domain_sums(token_loss, domains, self.num_domains, reference, self.settings.objective)
        self.finite.append(finite_windows(token_loss, reference))

    def turn(self) -> None:
        self._move()
        self._weigh(self._sums[TARGETS])

    def loss(self, token_loss: Tensor, domains: Tensor) -> Tensor:
        return token_loss.mean() if self.resamples else weighted_loss(token_loss, domains, self._coefficients)

    def end(self) -> None:
        if not self.before_backward:
            self._move()

    def step_sums(self) -> Tensor:
        """[3, k] float64 sums of the last global batch, reduced when the weights were moved."""
        return self._sums

    def _move(self) -> None:
        self._sums = reduce_sums(self.local_sums, self.topology, self.groups)
        step_size, smoothing = self.settings.step_size, self.settings.smoothing
        self.state = self.state.update(self._sums[EXCESS], self._sums[TARGETS], step_size, smoothing)

    def _weigh(self, targets: Tensor) -> None:
        weights = self.gradient_weights = self.state.weights
        if self.settings.normalization == "batch":
            self._coefficients = batch_coefficients(weights, targets, self.settings.sampling, self._accumulation)
        else:
            self._coefficients = domain_coefficients(weights, targets, self._accumulation)
