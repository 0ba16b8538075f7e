"""The reference: a second, frozen model with its own configuration, on the layout of the proxy."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_doremi.checkpoint.reader import load_frozen
from megatron_doremi.checkpoint.run_config import RunConfigFile
from megatron_doremi.config import GPTConfig
from megatron_doremi.data.loader import MicroBatch
from megatron_doremi.data.manifest import Manifest
from megatron_doremi.errors import Fault, raise_if_any
from megatron_doremi.model.forward import forward_only
from megatron_doremi.parallel.context import ParallelContext


@dataclass(frozen=True)
class TrainedRun:
    """A run of this program whose model is loaded.

    Attributes:
        gpt: shape of the model.
        weights: folder of the weights in the checkpoint that is loaded.
        iteration: step of that checkpoint.
        global_batch_size: windows per step of that run.
        phase: of that run; "" if it does not exist yet (a dry run).
    """

    gpt: GPTConfig
    weights: Path
    iteration: int
    global_batch_size: int
    phase: str = ""


def check_reference(
    run_config: RunConfigFile, flag: str, folder: Path, manifest: Manifest, seq_length: int, vocab_size: int
) -> GPTConfig:
    """Checks that a run's model can score this data set, and returns its shape.

    Args:
        flag: the flag that names the run, for messages.
        folder: folder of the run, for messages.
        vocab_size: token ids of the data are below this.

    Raises:
        ConfigError: the run used other domains, another tokenizer, a smaller vocabulary or a shorter window.
    """
    subject, faults = f"{flag} {folder}", []
    gpt = run_config.gpt.gpt()
    ours = manifest.tokenizer.sha256 if manifest.tokenizer else None
    if run_config.tokenizer_sha256 != ours:
        faults.append(
            Fault(
                subject,
                f"tokenizer {str(run_config.tokenizer_sha256)[:12]}",
                f"the manifest's tokenizer, {str(ours)[:12]}",
                "train the model on this data set: losses of other tokens cannot be compared",
            )
        )
    if gpt.vocab_size < vocab_size:
        faults.append(
            Fault(
                subject,
                f"a vocabulary of {gpt.vocab_size:,}",
                f"at least the data's {vocab_size:,} ids",
                "train the model on this data set",
            )
        )
    if run_config.domains != list(manifest.names):
        extra = [name for name in manifest.names if name not in run_config.domains]
        remedy = "train the model on this manifest"
        if extra and [name for name in manifest.names if name not in extra] == run_config.domains:
            remedy = f"give --exclude-domains {shlex.quote(','.join(extra))}, or {remedy}"
        faults.append(
            Fault(
                subject,
                f"domains {', '.join(run_config.domains)}",
                f"the manifest's, in its order: {', '.join(manifest.names)}",
                remedy,
            )
        )
    if gpt.position_embedding_type == "learned_absolute" and gpt.max_positions < seq_length:
        faults.append(
            Fault(
                subject,
                f"learned positions up to {gpt.max_positions}",
                f"--seq-length {seq_length}",
                "train the model with this --seq-length",
            )
        )
    raise_if_any(faults)
    return gpt


class OnlineReference:
    """Scores the proxy's micro-batches with the reference during training: one more forward pass per micro-batch."""

    def __init__(
        self,
        run: TrainedRun,
        context: ParallelContext,
        dtype: torch.dtype,
        shape: tuple[int, int],
        loss_chunk_tokens: int,
    ):
        """Builds this rank's stage and loads its weights.

        Args:
            shape: (batch, seq) of a micro-batch.
            loss_chunk_tokens: see `token_losses` in parallel/cross_entropy.py.
        """
        self.context, self.shape = context, shape
        self.module = load_frozen(run.gpt, run.weights, context, dtype, loss_chunk_tokens)

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
