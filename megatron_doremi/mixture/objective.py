"""The loss that training minimizes: the mean over tokens, or a mean weighted by domain. The same for every engine.

An engine passes each micro-batch's token losses to `record` after its forward pass, and calls `loss` for the scalar to
differentiate. If `before_backward` is set, the weights in a batch's gradient depend on the full batch: all
micro-batches must be recorded, and `update_domain_weights` called, before the first `loss`.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_doremi.mixture.controller import MixtureController
from megatron_doremi.mixture.statistics import (
    DomainStats,
    batch_coefficients,
    domain_coefficients,
    domain_stats,
    finite_windows,
    weighted_loss,
)
from megatron_doremi.parallel.context import ParallelContext


def reduce_stats(local: DomainStats, context: ParallelContext) -> DomainStats:
    """Sums statistics over the global batch, as `reduce_sums`.

    Args:
        local: statistics of this rank's micro-batches; read on the last stage only.
    """
    return DomainStats.unstack(reduce_sums(local.stack(), context))


def reduce_sums(total: Tensor, context: ParallelContext) -> Tensor:
    """Adds up what the replicas' last stages hold; bit-identical on all ranks. A collective call.

    One all-reduce over the data group on the last stage, then one broadcast to the rest of each replica. Only the
    first rank of each tensor group contributes, so that ranks that computed the same losses cannot differ by rounding.

    Args:
        total: sums over this rank's micro-batches, of one shape on all ranks; becomes the result.
    """
    topology, groups = context.topology, context.groups
    if topology.data_size > 1 and topology.is_last_stage and topology.tensor_rank == 0:
        dist.all_reduce(total, group=groups.data)
    if topology.replica_size > 1:
        dist.broadcast(total, src=topology.loss_rank(), group=groups.model)
    return total


class StepRecord:
    """Statistics of this rank's micro-batches of the current step.

    Attributes:
        stats: sums by domain; zero on all stages but the last.
        finite: `finite_windows` of each micro-batch, in order; empty on all stages but the last.
    """

    def __init__(self, num_domains: int, device: torch.device):
        self._num_domains, self._device = num_domains, device
        self.clear()

    def clear(self) -> None:
        """Starts a step."""
        self.stats = DomainStats.zeros(self._num_domains, self._device)
        self.finite: list[Tensor] = []

    def add(
        self, token_loss: Tensor, domains: Tensor, reference: Tensor | None = None, scores: Tensor | None = None
    ) -> None:
        """Adds a micro-batch; see `domain_stats` and `finite_windows`."""
        self.stats = self.stats + domain_stats(token_loss, domains, self._num_domains, scores)
        self.finite.append(finite_windows(token_loss, reference))


class Objective(Protocol):
    """The loss that an engine minimizes.

    Attributes:
        context: this rank's context.
        before_backward: see the module's docstring.
        current: statistics of this rank's micro-batches of the current step.
    """

    context: ParallelContext
    before_backward: bool
    current: StepRecord

    def begin(self, targets: Tensor | None, micro_batches: int) -> None:
        """Starts a step, on every rank.

        Args:
            targets: [k] float64 number of targets of each domain in the global batch; not read by `MeanObjective`.
            micro_batches: micro-batches of a rank per step.
        """

    def record(self, token_loss: Tensor, domains: Tensor, reference: Tensor | None = None) -> None:
        """Adds a micro-batch's losses to the step; on the last stage only.

        Args:
            token_loss: [batch, seq] losses in nats.
            domains: [batch] domain index of each window.
            reference: [batch, seq] the reference's losses on the same tokens in nats, if there is a reference.
        """

    def update_domain_weights(self) -> None:
        """Called on every rank between a batch's forward and backward passes if `before_backward` is set."""

    def loss(self, token_loss: Tensor, domains: Tensor) -> Tensor:
        """The scalar to differentiate; an engine divides its gradient by the numbers of micro-batches and replicas."""

    def end(self) -> None:
        """Ends a step, on every rank, after the optimizer's step."""

    def stats(self) -> DomainStats:
        """Statistics of the last global batch, on every rank; a collective call."""


class MeanObjective:
    """The mean token loss of the global batch; statistics by domain are reduced only when `stats` is called."""

    before_backward = False

    def __init__(self, num_domains: int, context: ParallelContext):
        self.context, self.current = context, StepRecord(num_domains, context.device)

    def begin(self, targets: Tensor | None, micro_batches: int) -> None:
        self.current.clear()

    def record(self, token_loss: Tensor, domains: Tensor, reference: Tensor | None = None) -> None:
        self.current.add(token_loss, domains, reference)

    def update_domain_weights(self) -> None:
        raise AssertionError("MeanObjective has no domain weights")

    def loss(self, token_loss: Tensor, domains: Tensor) -> Tensor:
        return token_loss.mean()

    def end(self) -> None:
        pass

    def stats(self) -> DomainStats:
        return reduce_stats(self.current.stats, self.context)


class WeightedObjective:
    """The weighted sum of the domains' mean losses, with weights that a controller updates at every step.

    If the controller returns no loss weights, the loss is the mean over tokens; the controller still observes every
    step.

    Attributes:
        controller: updates the weights.
    """

    def __init__(
        self,
        controller: MixtureController,
        sampling: Tensor,
        context: ParallelContext,
        normalization: str = "domain",
    ):
        """
        Args:
            sampling: [k] float64 sampling weights of the blend.
            normalization: "domain": the weights multiply the domains' mean losses; "batch": see `batch_coefficients`.
        """
        controller.to(context.device)
        self.controller, self.context, self.normalization = controller, context, normalization
        self.before_backward = controller.before_backward
        self.current = StepRecord(len(sampling), context.device)
        self._sampling = sampling.to(context.device)
        self._accumulation = 1
        self._stats = self.current.stats
        self._coefficients: Tensor | None = None

    def begin(self, targets: Tensor | None, micro_batches: int) -> None:
        self.current.clear()
        self._accumulation = micro_batches * self.context.topology.data_size
        if not self.before_backward:
            assert targets is not None
            self._set_coefficients(targets)

    def record(self, token_loss: Tensor, domains: Tensor, reference: Tensor | None = None) -> None:
        scores = self.controller.token_scores(token_loss.detach().double(), reference)
        self.current.add(token_loss, domains, reference, scores)

    def update_domain_weights(self) -> None:
        self._observe()
        self._set_coefficients(self._stats.targets)

    def loss(self, token_loss: Tensor, domains: Tensor) -> Tensor:
        if self._coefficients is None:
            return token_loss.mean()
        return weighted_loss(token_loss, domains, self._coefficients)

    def end(self) -> None:
        if not self.before_backward:
            self._observe()

    def stats(self) -> DomainStats:
        return self._stats

    def _observe(self) -> None:
        self._stats = reduce_stats(self.current.stats, self.context)
        self.controller.observe(self._stats)

    def _set_coefficients(self, targets: Tensor) -> None:
        weights = self.controller.loss_weights()
        if weights is None:
            self._coefficients = None
        elif self.normalization == "batch":
            self._coefficients = batch_coefficients(weights, targets, self._sampling, self._accumulation)
        else:
            self._coefficients = domain_coefficients(weights, targets, self._accumulation)
