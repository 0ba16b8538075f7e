"""The order of a proxy's step, as DeepSpeed pipeline instructions. Pure: no process group is touched.

Algorithm 1 weighs a batch's gradient by weights that the same batch has moved. With several micro-batches
that takes every forward before the first backward: F F .. F, UpdateDomainWeights, B B .. B. It costs no more
arithmetic than 1F1B and has the same bubble, (M + P - 1) / M; it holds the activations of M micro-batches.
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
    """Reduces the step's per-domain sums over all ranks and moves the domain weights."""


class AlternatingSchedule(PipeSchedule):
    """All forwards, the update of the domain weights, all backwards, the optimizer's step."""

    def steps(self) -> Iterator[list[PipeInstruction]]:
        for buffer in range(self.micro_batches):
            yield self._forward(buffer)
        yield [UpdateDomainWeights()]
        for buffer in range(self.micro_batches):
            yield self._backward(buffer)
        yield [ReduceTiedGrads(), ReduceGrads(), OptimizerStep()]

    def num_pipe_buffers(self) -> int:
        """Every micro-batch is in flight at the turn."""
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
