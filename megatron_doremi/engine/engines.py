"""DeepSpeed engines that minimize an objective: `OneStageEngine` without a pipeline, `PipelinedEngine` with one.

Both take a step on a rank's micro-batches of a global batch. With an objective that updates the domain weights from
the full batch before any backward pass (see objective.py), the pipeline engine runs `AlternatingSchedule`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.schedule import (
    BackwardPass,
    ForwardPass,
    OptimizerStep,
    PipeInstruction,
    PipeSchedule,
    RecvActivation,
    RecvGrad,
    ReduceGrads,
    ReduceTiedGrads,
    SendActivation,
    SendGrad,
)
from torch import Tensor, nn

from megatron_doremi.data.loader import MicroBatch
from megatron_doremi.engine.reduction import GradientReduction, flat_buckets, loose_buckets
from megatron_doremi.engine.schedule import AlternatingSchedule, UpdateDomainWeights
from megatron_doremi.engine.step_clock import BACKWARD, FORWARD, OPTIMIZER, PIPELINE, REDUCTION, make_clock
from megatron_doremi.mixture.objective import Objective
from megatron_doremi.parallel.context import ParallelContext
from megatron_doremi.parallel.deepspeed_gradients import flat_gradients, save_passes
from megatron_doremi.parallel.deepspeed_internals import (
    EngineHooks,
    PipelineEngineHooks,
    is_counted_in_gradient_norm,
    wraps_optimizer,
)
from megatron_doremi.parallel.sharded_optimizer import ShardedOptimizer

# Parts of a step by instruction; all others belong to the forward pass. That of the optimizer begins with the norm and
# the flags, which ranks exchange.
_PARTS: dict[type[PipeInstruction], str] = {
    **dict.fromkeys((RecvActivation, SendActivation, RecvGrad, SendGrad), PIPELINE),
    **dict.fromkeys((UpdateDomainWeights, ReduceTiedGrads, ReduceGrads, OptimizerStep), REDUCTION),
    BackwardPass: BACKWARD,
}


class TrainingEngine(EngineHooks):
    """An engine as the training loop uses it.

    Attributes:
        clock: measures the parts of a step from the forward pass on.
    """

    def __init__(
        self, objective: Objective, context: ParallelContext, clip_grad: float, z_loss: float = 0.0, **deepspeed: Any
    ):
        super().__init__(**deepspeed)
        save_passes(self)
        self.z_loss = z_loss
        self.objective, self.context, self.clip_grad = objective, context, clip_grad
        self.clock = make_clock(context.device)
        self._reduction = self._make_reduction()
        self._before_step: Callable[[Tensor | None], float | None] = lambda norm: None

    def train_step(
        self,
        micro_batches: Sequence[MicroBatch],
        targets: Tensor | None = None,
        before_step: Callable[[Tensor | None], float | None] = lambda norm: None,
    ) -> None:
        """One optimizer step on this rank's micro-batches; a collective call.

        Where `before_step` is not given the norm, DeepSpeed's optimizers skip a step whose gradient norm is NaN or Inf
        on all ranks, and `was_step_applied` is then false. Otherwise `before_step` must detect it.

        Args:
            targets: [k] float64 number of targets of each domain in the global batch; see `Objective.begin`.
            before_step: called on every rank after all losses are recorded and before any parameter is updated, with
                the global norm of the gradient, or None if the optimizer computes the norm within its step. It returns
                the norm's value, if it is finite on every rank: the optimizer then does not wait for it.
        """
        self._before_step = before_step
        self.clock.enter(FORWARD)
        self.objective.begin(targets, self.gradient_accumulation_steps())
        self.module.train()
        self._accumulate_and_step(micro_batches)
        self.clock.enter(REDUCTION)
        self.objective.end()
        self.clock.stop()

    def before_reduction(self) -> None:
        self.clock.enter(REDUCTION)

    def before_model_step(self) -> float | None:
        self.clock.enter(REDUCTION)
        known = self._before_step(self._norm_in_time())
        self.clock.enter(OPTIMIZER)
        return known

    def _make_reduction(self) -> GradientReduction | None:
        """The reduction beside a step's last backward pass; None with one replica, and where the optimizer reduces."""
        size = self.context.topology.data_size
        if size == 1 or self.collects_reduced_gradients() or isinstance(self.optimizer, ShardedOptimizer):
            return None
        tied = frozenset(self.tied_parameters())
        if wraps_optimizer(self):
            buckets = [bucket for group in flat_gradients(self) for bucket in flat_buckets(*group, alone=tied)]
        else:
            buckets = loose_buckets([parameter for _, parameter in self.module.model_parameters()], alone=tied)
        return GradientReduction(buckets, self.context.groups.data, size, tied)

    def tied_parameters(self) -> list[nn.Parameter]:
        """Parameters of which another stage has a copy."""
        return []

    def reduces_gradients(self) -> bool:
        # A sharded optimizer collects its gradients here, with one replica too.
        return self.collects_reduced_gradients()

    def _norm_in_time(self) -> Tensor | None:
        """The gradient's global norm; None if the optimizer computes it within its step. Clips the gradient, unless the
        optimizer does so."""
        # Without ZeRO and mixed precision, DeepSpeed reports no norm and would count tied copies and replicated
        # parameters several times; its sharded optimizers report a norm that counts each parameter once.
        topology, groups = self.context.topology, self.context.groups
        across = [groups.model] if topology.replica_size > 1 else []
        if isinstance(self.optimizer, ShardedOptimizer):
            counted = self.optimizer.gradient_pieces(is_counted_in_gradient_norm)
            across += [groups.data] if topology.data_size > 1 else []
            norm = self._clip(self.optimizer.gradients(), counted, across)
        elif wraps_optimizer(self):
            return self.optimizer_norm()
        else:
            parameters = [p for p in self.module.parameters() if p.grad is not None]
            counted = [p.grad for p in parameters if is_counted_in_gradient_norm(p)]
            norm = self._clip([p.grad for p in parameters], counted, across)
        self.set_grad_norm(norm)
        return norm

    def _clip(self, gradients: list[Tensor], counted: list[Tensor], groups: list[dist.ProcessGroup]) -> Tensor:
        """Clips this rank's gradients by the norm of those that are `counted` on all ranks of the groups' product."""
        norms = torch.stack(torch._foreach_norm(counted)).double() if counted else torch.zeros(1).double()
        total = norms.to(self.device).square().sum()
        for group in groups:
            dist.all_reduce(total, group=group)
        norm = total.sqrt()
        if self.clip_grad > 0.0:
            factor = (self.clip_grad / (norm + 1e-6)).clamp(max=1.0).float()
            torch._foreach_mul_(gradients, factor)
        return norm

    def _token_losses(self, output: Tensor) -> Tensor:
        """[batch, seq] token losses of what the model returns."""
        return output[0] if self.z_loss else output

    def _loss(self, output: Tensor, domains: Tensor) -> Tensor:
        """The scalar to differentiate: the objective's, and --z-loss (Chowdhery et al. 2022, section 5), a mean over
        the micro-batch's tokens that no domain weight multiplies.

        Args:
            output: what the model returns for a micro-batch.
        """
        loss = self.objective.loss(self._token_losses(output), domains)
        return loss + self.z_loss * output[1].square().mean() if self.z_loss else loss

    @abstractmethod
    def _accumulate_and_step(self, micro_batches: Sequence[MicroBatch]) -> None:
        """The forward and backward passes and the optimizer's step."""

    def grad_norm(self) -> float:
        """Global norm of the last step's gradient, before clipping."""
        return float(self.last_grad_norm())

    def set_learning_rate(self, lr: float) -> None:
        """Sets the learning rate of the next step."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr


class PipelinedEngine(TrainingEngine, PipelineEngineHooks):
    """Several stages, ZeRO 0 and 1: 1F1B, or the alternating schedule if the objective needs it."""

    # DeepSpeed's attribute: what the model returns after a forward pass, then the scalar for the next backward pass.
    loss: Tensor

    def __init__(self, **arguments: Any):
        super().__init__(**arguments)
        self._held: dict[int, tuple[Tensor, Tensor]] = {}
        self._coming: Iterator[MicroBatch] = iter(())
        self._backward_passes = 0

    def tied_parameters(self) -> list[nn.Parameter]:
        return self.module.tied_weights()

    def _accumulate_and_step(self, micro_batches: Sequence[MicroBatch]) -> None:
        # All copies to the device are issued here; DeepSpeed would issue them one by one and wait for each.
        batches = [batch.to(self.device) for batch in micro_batches]
        self._coming, self._backward_passes = iter(batches), 0
        self.run_schedule(iter([batch.as_pipe_batch() for batch in batches]))

    def schedule(self) -> PipeSchedule | None:
        if self.objective.before_backward:
            return AlternatingSchedule(self.micro_batches, self.num_stages, self.stage_id)
        return None

    def instructions(self) -> Mapping[type[PipeInstruction], Callable[..., None]]:
        return {UpdateDomainWeights: PipelinedEngine._update_domain_weights}

    def _update_domain_weights(self) -> None:
        self.objective.update_domain_weights()

    def before_instruction(self, kind: type[PipeInstruction]) -> None:
        self.clock.enter(_PARTS.get(kind, FORWARD))
        if kind is ForwardPass and self.module.every_stage_reads:
            # They come in order on every stage.
            batch = next(self._coming)
            self.module.tokens, self.module.keys, self.module.documents = batch.tokens, batch.keys, batch.documents
        if kind is ReduceGrads and self._reduction is not None:
            self._reduction.finish()

    def after_forward(self, buffer_id: int, labels: tuple[Tensor, ...]) -> None:
        output = self.loss
        _, domains, *reference = labels
        self.objective.record(self._token_losses(output), domains, *reference)
        if self.objective.before_backward:
            self._held[buffer_id] = (output, domains)
        else:
            self.loss = self._loss(output, domains)

    def before_backward(self, buffer_id: int) -> None:
        if buffer_id in self._held:
            self.loss = self._loss(*self._held.pop(buffer_id))
        self._backward_passes += 1
        if self._reduction is not None and self._backward_passes == self.micro_batches:
            self._reduction.start()


class OneStageEngine(TrainingEngine):
    """No pipeline, ZeRO 0 to 3; the module is a `GPTModel`.

    ZeRO 3 gathers a parameter for a forward pass and releases it afterwards. With several outstanding forward passes
    DeepSpeed's backward passes silently compute wrong gradients (0.19.8). If the weights depend on the batch, ZeRO 3
    therefore scores the batch first, without a graph, and repeats the forward passes for training: 4/3 of the
    arithmetic.
    """

    def _accumulate_and_step(self, micro_batches: Sequence[MicroBatch]) -> None:
        batches = [batch.to(self.device) for batch in micro_batches]
        if not self.objective.before_backward:
            for batch in batches:
                self._backpropagate(self._forward_and_record(batch), batch.domains)
        elif self._holds_forwards():
            held = [self._outputs(batch) for batch in batches]
            for output, batch in zip(held, batches, strict=True):
                self.objective.record(self._token_losses(output), batch.domains, batch.reference)
            self._update_domain_weights()
            while held:
                # Each backward pass frees the graph of its micro-batch.
                self._backpropagate(held.pop(0), batches.pop(0).domains)
        else:
            with torch.no_grad():
                for batch in batches:
                    self._forward_and_record(batch)
            self._update_domain_weights()
            for batch in batches:
                self.clock.enter(FORWARD)
                self._backpropagate(self._outputs(batch), batch.domains)

    def _update_domain_weights(self) -> None:
        self.clock.enter(REDUCTION)
        self.objective.update_domain_weights()

    def _forward_and_record(self, batch: MicroBatch) -> Tensor:
        """What the model returns, with token losses that the objective has recorded."""
        self.clock.enter(FORWARD)
        output = self._outputs(batch)
        self.objective.record(self._token_losses(output), batch.domains, batch.reference)
        return output

    def _outputs(self, batch: MicroBatch) -> Tensor:
        """What the model returns."""
        others = () if batch.keys is None and batch.documents is None else (batch.keys, batch.documents)
        output: Tensor = self(batch.tokens, batch.targets, *others)
        return output

    def _holds_forwards(self) -> bool:
        """Whether several forward passes may be outstanding."""
        return not self.zero_optimization_partition_weights()

    def _reduction_of_this_pass(self) -> GradientReduction | ShardedOptimizer | None:
        """What reduces gradients beside the next backward pass: under ZeRO 2 of each micro-batch, else of the last."""
        if isinstance(self.optimizer, ShardedOptimizer):
            return self.optimizer
        return self._reduction if self.is_gradient_accumulation_boundary() else None

    def _backpropagate(self, output: Tensor, domains: Tensor) -> None:
        self.clock.enter(BACKWARD)
        reduction = self._reduction_of_this_pass()
        if reduction is not None:
            reduction.start()
        self.backward(self._loss(output, domains))
        if reduction is not None:
            self.clock.enter(REDUCTION)
            reduction.finish()
        # Counts micro-batches, and updates the parameters after the last.
        self.step()
