"""DeepSpeed's pipeline engine with what DoReMi needs: per-domain sums, and the proxy's turn between F and B.

`TrainingEngine` trains on the plain mean loss with 1F1B and keeps the step's per-domain sums.
`ProxyEngine` by default runs `AlternatingSchedule`: it holds every micro-batch's token losses, moves the domain
weights on the reduced sums of the whole global batch, and passes back the losses under the moved weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass, PipeSchedule
from torch import Tensor

from megatron_doremi.data.loader import MicroBatch
from megatron_doremi.doremi.domain_weights import DomainWeights
from megatron_doremi.doremi.losses import (
    EXCESS,
    TARGETS,
    batch_coefficients,
    domain_coefficients,
    domain_sums,
    weighted_loss,
)
from megatron_doremi.doremi.schedule import AlternatingSchedule, UpdateDomainWeights
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


class TrainingEngine(PipelineEngine):
    """Trains on the mean token loss of the global batch."""

    def __init__(self, topology: Topology, groups: ProcessGroups, num_domains: int, clip_grad: float, **deepspeed: Any):
        super().__init__(**deepspeed)
        self.topology, self.groups = topology, groups
        self.num_domains, self.clip_grad = num_domains, clip_grad
        self._local_sums = torch.zeros(3, num_domains, dtype=torch.float64, device=self.device)

    def train_step(self, micro_batches: Sequence[MicroBatch]) -> None:
        """One step of the optimiser on this rank's micro-batches of a global batch."""
        self._local_sums.zero_()
        self.set_dataiterator(iter([batch.as_pipe_batch() for batch in micro_batches]))
        self.module.train()
        self.total_loss = None
        self._compute_loss = True
        self._exec_schedule(self._train_schedule())

    def step_sums(self) -> Tensor:
        """[3, k] float64 sums of the last step's global batch, on every rank; see losses.py for the rows."""
        return reduce_sums(self._local_sums, self.topology, self.groups)

    def grad_norm(self) -> float:
        """Global norm of the last step's gradient before clipping."""
        return float(self._global_grad_norm)

    def set_learning_rate(self, lr: float) -> None:
        """Sets the rate of the next step."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def _exec_forward_pass(self, buffer_id: int) -> None:
        super()._exec_forward_pass(buffer_id)
        if self.is_last_stage():
            self._after_forward(buffer_id, self.loss, self.pipe_buffers["labels"][buffer_id][1])

    def _after_forward(self, buffer_id: int, token_loss: Tensor, domains: Tensor) -> None:
        self._local_sums += domain_sums(token_loss, domains, self.num_domains)
        self.loss = token_loss.mean()

    def _take_model_step(self, *args: Any, **kwargs: Any) -> None:
        # Without ZeRO or mixed precision DeepSpeed neither reports a norm nor counts tied copies and
        # replicated parameters once; its sharded optimisers do both.
        if self.optimizer is self.basic_optimizer:
            self._global_grad_norm = self._clip_gradients()
        super()._take_model_step(*args, **kwargs)

    def _clip_gradients(self) -> Tensor:
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        counted = [p.grad for p in parameters if p.model_parallel]
        norms = torch.stack(torch._foreach_norm(counted)).double() if counted else torch.zeros(1).double()
        total = norms.to(self.device).square().sum()
        dist.all_reduce(total, group=self.groups.model)
        norm = total.sqrt()
        if self.clip_grad > 0.0:
            factor = (self.clip_grad / (norm + 1e-6)).clamp(max=1.0).float()
            torch._foreach_mul_([p.grad for p in parameters], factor)
        return norm

    # DeepSpeed looks instructions up here, not among the methods.
    _INSTRUCTION_MAP: ClassVar[dict[type, Any]] = {**PipelineEngine._INSTRUCTION_MAP, ForwardPass: _exec_forward_pass}


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


class ProxyEngine(TrainingEngine):
    """Trains a proxy by Group DRO over domains.

    `alternating`: alpha_t from this batch, then its gradient under alpha_t (Algorithm 1), all forwards first.
    `simultaneous`: the gradient under alpha_{t-1}, then alpha_t, the textbook step towards a saddle point, on
    1F1B. With `resample` the loss is the plain mean, the weights act on the sampling of the next batch, and
    both updates come to the same.
    """

    def __init__(self, *, settings: DoReMiSettings, **training: Any):
        super().__init__(**training)
        self.settings = settings
        self.dro = DomainWeights.start(self.num_domains, self.device)
        self._reference: Sequence[Tensor] = ()
        self._forwards = 0
        self._held: dict[int, tuple[Tensor, Tensor]] = {}
        self._sums = torch.zeros_like(self._local_sums)
        self._coefficients = torch.zeros(self.num_domains, dtype=torch.float64, device=self.device)
        self._resamples = settings.weighting == "resample"
        self._alternates = settings.update == "alternating" and not self._resamples
        # The weights that the last step's gradient was taken under.
        self.gradient_weights = self.dro.weights

    def train_proxy_step(
        self, micro_batches: Sequence[MicroBatch], reference: Sequence[Tensor], targets: Tensor
    ) -> None:
        """One step on this rank's micro-batches.

        Args:
            reference: on the last stage, [batch, seq] token losses of the reference for each micro-batch; empty
                where the objective asks for none.
            targets: [k] float64 targets of each domain in the global batch.
        """
        self._reference, self._forwards = reference, 0
        if self._alternates:
            self.train_step(micro_batches)
            return
        self._weigh_gradient(targets)
        self.train_step(micro_batches)
        self._move_weights()

    def step_sums(self) -> Tensor:
        """[3, k] float64 sums of the last step's global batch, reduced when the weights were moved."""
        return self._sums

    def _train_schedule(self) -> PipeSchedule:
        if self._alternates:
            return AlternatingSchedule(self.micro_batches, self.num_stages, self.stage_id)
        return super()._train_schedule()

    def _after_forward(self, buffer_id: int, token_loss: Tensor, domains: Tensor) -> None:
        # 1F1B reuses buffers: micro-batches are counted, not told by their buffer.
        reference = self._reference[self._forwards] if self._reference else None
        self._forwards += 1
        self._local_sums += domain_sums(token_loss, domains, self.num_domains, reference, self.settings.objective)
        if self._alternates:
            self._held[buffer_id] = (token_loss, domains)
        elif self._resamples:
            self.loss = token_loss.mean()
        else:
            self.loss = weighted_loss(token_loss, domains, self._coefficients)

    def _exec_update_domain_weights(self) -> None:
        self._move_weights()
        self._weigh_gradient(self._sums[TARGETS])

    def _move_weights(self) -> None:
        self._sums = reduce_sums(self._local_sums, self.topology, self.groups)
        step_size, smoothing = self.settings.step_size, self.settings.smoothing
        self.dro = self.dro.update(self._sums[EXCESS], self._sums[TARGETS], step_size, smoothing)

    def _weigh_gradient(self, targets: Tensor) -> None:
        accumulation = self.micro_batches * self.topology.data_size
        self.gradient_weights = self.dro.weights
        if self.settings.normalization == "batch":
            self._coefficients = batch_coefficients(self.dro.weights, targets, self.settings.sampling, accumulation)
        else:
            self._coefficients = domain_coefficients(self.dro.weights, targets, accumulation)

    def _exec_backward_pass(self, buffer_id: int) -> None:
        if self._alternates and self.is_last_stage():
            self.loss = weighted_loss(*self._held.pop(buffer_id), self._coefficients)
        super()._exec_backward_pass(buffer_id)

    _INSTRUCTION_MAP: ClassVar[dict[type, Any]] = {
        **TrainingEngine._INSTRUCTION_MAP,
        UpdateDomainWeights: _exec_update_domain_weights,
        BackwardPass: _exec_backward_pass,
    }
