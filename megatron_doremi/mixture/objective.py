"""What a step's token losses come to: the plain mean, or a mean weighted by domain. The same for every engine.

An engine hands each micro-batch's token losses to `record` after its forward pass and asks `loss` for what to
differentiate. Where `before_backward` is set, the weights under which a batch's gradient is taken depend on the
whole batch: every micro-batch has to be recorded, and `update_domain_weights` called, before the first `loss`.
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
    """Sums over the global batch on every rank, the same to the bit.

    One all-reduce over the data group at the end of the pipe, one broadcast to the rest of each replica. The
    first rank of the tensor group speaks for all of it, so that ranks which computed the same losses cannot
    disagree by a rounding.

    Args:
        local: of this rank's micro-batches; read on the last stage only.
    """
    topology, groups = context.topology, context.groups
    total = local.stack()
    if topology.data_size > 1 and topology.is_last_stage and topology.tensor_rank == 0:
        dist.all_reduce(total, group=groups.data)
    if topology.pipe_size * topology.tensor_size > 1:
        dist.broadcast(total, src=topology.loss_rank(), group=groups.model)
    return DomainStats.unstack(total)


class StepRecord:
    """This rank's micro-batches of the current step.

    Attributes:
        stats: their sums by domain; zero away from the last stage.
        finite: `finite_windows` of each, in order; empty away from the last stage.
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
        """Adds a micro-batch: [batch, seq] token losses, [batch] domains, and [batch, seq] the reference's losses and
        the tokens' scores, where there are any."""
        self.stats = self.stats + domain_stats(token_loss, domains, self._num_domains, scores)
        self.finite.append(finite_windows(token_loss, reference))


class Objective(Protocol):
    """What an engine descends.

    Attributes:
        context: of this rank.
        before_backward: see above.
        current: this rank's micro-batches of the current step.
    """

    context: ParallelContext
    before_backward: bool
    current: StepRecord

    def begin(self, targets: Tensor | None, micro_batches: int) -> None:
        """Starts a step, on every rank.

        Args:
            targets: [k] float64 targets of each domain in the global batch; the plain mean does not read them.
            micro_batches: of a rank and step.
        """

    def record(self, token_loss: Tensor, domains: Tensor, reference: Tensor | None = None) -> None:
        """Adds a micro-batch's losses to the step; on the last stage only.

        Args:
            token_loss: [batch, seq] losses in nats.
            domains: [batch] number of each window's domain.
            reference: [batch, seq] the reference's losses on the same tokens, where there is one.
        """

    def update_domain_weights(self) -> None:
        """Called on every rank between a batch's forwards and its backwards, where `before_backward` is set."""

    def loss(self, token_loss: Tensor, domains: Tensor) -> Tensor:
        """The scalar to differentiate; an engine divides its gradient by micro-batches and replicas."""

    def end(self) -> None:
        """Called on every rank after the optimizer's step."""

    def stats(self) -> DomainStats:
        """Sums over the last global batch, on every rank. A collective call."""


class MeanObjective:
    """The mean token loss of the global batch; the sums by domain are reduced only where somebody asks for them."""

    before_backward = False

    def __init__(self, num_domains: int, context: ParallelContext):
        self.context, self.current = context, StepRecord(num_domains, context.device)

    def begin(self, targets: Tensor | None, micro_batches: int) -> None:
        self.current.clear()

    def record(self, token_loss: Tensor, domains: Tensor, reference: Tensor | None = None) -> None:
        self.current.add(token_loss, domains, reference)

    def update_domain_weights(self) -> None:
        raise AssertionError("a plain mean has no domain weights")

    def loss(self, token_loss: Tensor, domains: Tensor) -> Tensor:
        return token_loss.mean()

    def end(self) -> None:
        pass

    def stats(self) -> DomainStats:
        return reduce_stats(self.current.stats, self.context)


class WeightedObjective:
    """The weighted sum of the domains' mean losses, under weights that a controller moves at every step.

    Where the controller gives no loss weights it observes every step all the same, and the loss is the plain mean.

    Attributes:
        controller: what moves the weights.
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
            sampling: [k] sampling weights of the blend, float64.
            normalization: domain, weights times each domain's mean; or batch, see `batch_coefficients`.
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
            self._weigh(targets)

    def record(self, token_loss: Tensor, domains: Tensor, reference: Tensor | None = None) -> None:
        scores = self.controller.token_scores(token_loss.detach().double(), reference)
        self.current.add(token_loss, domains, reference, scores)

    def update_domain_weights(self) -> None:
        self._observe()
        self._weigh(self._stats.targets)

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

    def _weigh(self, targets: Tensor) -> None:
        weights = self.controller.loss_weights()
        if weights is None:
            self._coefficients = None
        elif self.normalization == "batch":
            self._coefficients = batch_coefficients(weights, targets, self._sampling, self._accumulation)
        else:
            self._coefficients = domain_coefficients(weights, targets, self._accumulation)
