"""A frozen model: of scoring, of an evaluation, or the reference, a second model on the layout of the proxy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_doremi.checkpoint.reader import load_frozen
from megatron_doremi.checkpoint.source import Weights
from megatron_doremi.data.loader import MicroBatch
from megatron_doremi.execution import Execution
from megatron_doremi.hugging_face.transformers_model import load_by_transformers
from megatron_doremi.model.forward import Stage, forward_only
from megatron_doremi.parallel.context import ParallelContext
from megatron_doremi.shapes import GPTConfig, Shape, TransformersShape


@dataclass(frozen=True)
class TrainedModel:
    """A model to score, to evaluate or to start from: of a run of this program, or of a folder.

    Attributes:
        shape: its shape.
        weights: None if the model does not exist yet (a dry run), or Transformers reads them.
        path: of the checkpoint or the folder, for messages.
        files: folder of the files of the weights.
        checksums: SHA-256 of these files by name, as recorded; empty where none are.
        stamp: a small file that changes with the model.
        iteration: steps that the model was trained; 0 if it is not a run's.
        global_batch_size: windows per step of the run; 1 if it is not a run's.
        phase: of the run; "" if it is not a run's.
    """

    shape: Shape
    weights: Weights | None
    path: Path
    files: Path
    checksums: Mapping[str, str]
    stamp: Path
    iteration: int = 0
    global_batch_size: int = 1
    phase: str = ""

    @property
    def gpt(self) -> GPTConfig:
        """The shape of a model of this program."""
        assert isinstance(self.shape, GPTConfig), self.shape
        return self.shape

    def hashed_files(self) -> list[Path]:
        """The files that identify the model. config.json decides what Transformers computes with the weights."""
        extra = [self.files / "config.json"] if isinstance(self.shape, TransformersShape) else []
        return [*sorted(self.files.glob("*.safetensors")), *extra]

    def opened_weights(self) -> Weights:
        """The weights of a model that exists."""
        assert self.weights is not None, self.path
        return self.weights


def load_trained(model: TrainedModel, context: ParallelContext, dtype: torch.dtype, execution: Execution) -> Stage:
    """This rank's part of a model, for forward passes only; of a model that Transformers runs, all of it.

    Raises:
        ConfigError: a file is damaged or belongs to another model.
    """
    if isinstance(model.shape, TransformersShape):
        return load_by_transformers(model.path, dtype, context.device, execution.loss_chunk_tokens)
    return load_frozen(model.gpt, model.opened_weights(), context, dtype, execution)


class OnlineReference:
    """Scores the proxy's micro-batches with the reference during training: one more forward pass per micro-batch."""

    def __init__(
        self,
        model: TrainedModel,
        context: ParallelContext,
        dtype: torch.dtype,
        shape: tuple[int, int],
        execution: Execution,
    ):
        """Builds this rank's stage and loads its weights.

        Args:
            shape: (batch, seq) of a micro-batch.
        """
        self.context, self.shape = context, shape
        self.module = load_trained(model, context, dtype, execution)

    def score(self, micro_batches: Sequence[MicroBatch], count: int) -> tuple[MicroBatch, ...]:
        """Adds the reference's losses to micro-batches; a collective call.

        Args:
            micro_batches: of this rank; empty on the middle stages.
            count: number of micro-batches, on every rank of the replica.

        Returns:
            the micro-batches, with the reference's losses on the last stage and unchanged on all others.
        """
        losses = forward_only(self.module, micro_batches, count, self.shape, self.context)
        if not losses:
            return tuple(micro_batches)
        pairs = zip(micro_batches, losses, strict=True)
        return tuple(replace(batch, reference=loss) for batch, loss in pairs)
