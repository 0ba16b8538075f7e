"""The alternating schedule of a proxy's step, as DeepSpeed pipeline instructions. Pure: uses no process group.

In Algorithm 1 a batch's gradient is weighted by domain weights that depend on the losses of the same batch. With
several micro-batches, all forward passes precede the first backward pass: F F .. F, UpdateDomainWeights, B B .. B.
With M micro-batches and P stages it costs the same arithmetic as 1F1B and has the same bubble, (M + P - 1) / M; it
holds the activations of M micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator

from deepspeed.runtime.pipe.schedule import (
    BackwardPass,
    ForwardPass,
    LoadMicroBatch,
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


class UpdateDomainWeights(PipeInstruction):
    """Reduces the step's statistics by domain over all ranks and updates the domain weights."""


class AlternatingSchedule(PipeSchedule):
    """All forward passes, the update of the domain weights, all backward passes, the optimizer's step."""

    def steps(self) -> Iterator[list[PipeInstruction]]:
        for buffer in range(self.micro_batches):
            yield self._forward(buffer)
        yield [UpdateDomainWeights()]
        for buffer in range(self.micro_batches):
            yield self._backward(buffer)
        yield [ReduceTiedGrads(), ReduceGrads(), OptimizerStep()]

    def num_pipe_buffers(self) -> int:
        """All micro-batches are in flight when the domain weights are updated."""
        return int(self.micro_batches)

    def _forward(self, buffer: int) -> list[PipeInstruction]:
        commands: list[PipeInstruction] = []
        if not self.is_first_stage:
            commands.append(RecvActivation(buffer))
        if self.is_first_stage or self.is_last_stage:
            commands.append(LoadMicroBatch(buffer))
        commands.append(ForwardPass(buffer))
        if not self.is_last_stage:
            commands.append(SendActivation(buffer))
        return commands

    def _backward(self, buffer: int) -> list[PipeInstruction]:
        commands: list[PipeInstruction] = []
        if not self.is_last_stage:
            commands.append(RecvGrad(buffer))
        commands.append(BackwardPass(buffer))
        if not self.is_first_stage:
            commands.append(SendGrad(buffer))
        return commands
