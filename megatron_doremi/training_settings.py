"""The settings of what a training step computes beside the plain loss. Part of config.py, which re-exports them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron_doremi.settings import DECAY, RATE, TRAINING, setting


@dataclass(frozen=True)
class TrainingConfig:
    """What people turn on: the borders of documents, a penalty of large logits, dropout."""

    default_phases: ClassVar[tuple[str, ...]] = TRAINING

    reset_position_ids: bool = setting(
        False, "count positions from 0 after each end-of-document token of a window, whatever reads it later"
    )
    reset_attention_mask: bool = setting(
        False, "attend within a document only: a window's tokens see none before the last end-of-document token"
    )

    z_loss: float = setting(
        0.0,
        "add this times the mean squared logarithm of the softmax's normalizer to the loss (PaLM: 1e-4); losses that "
        "are reported, and that move domain weights, are without it",
        bounds=RATE,
    )

    attention_dropout: float = setting(0.0, "share of attention probabilities that a step drops", bounds=DECAY)
    hidden_dropout: float = setting(
        0.0,
        "share that a step drops of the embeddings, and of what attention and feed-forward layer add to the residual "
        "stream",
        bounds=DECAY,
    )

    @property
    def drops(self) -> bool:
        """Whether there is any dropout."""
        return self.attention_dropout > 0.0 or self.hidden_dropout > 0.0

    @property
    def reads_documents(self) -> bool:
        """Whether the model depends on where documents end."""
        return self.reset_position_ids or self.reset_attention_mask


# The settings that a run's identity states beside the model's shape, which has the others.
STEP_NAMES = ("z_loss", "attention_dropout", "hidden_dropout")
