"""The reference: a second, frozen model with its own configuration on the proxy's layout, or its recorded losses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_doremi.config import GPTConfig
from megatron_doremi.data.loader import MicroBatch
from megatron_doremi.data.manifest import Manifest
from megatron_doremi.data.scores import RecordedLosses
from megatron_doremi.errors import ConfigError, Fault, raise_if_any
from megatron_doremi.model.forward import forward_only
from megatron_doremi.model.weights import load_frozen
from megatron_doremi.parallel.layers import TensorParallel
from megatron_doremi.parallel.topology import Topology


@dataclass(frozen=True)
class ReferenceRun:
    """What a finished run of this program says of its model.

    Attributes:
        gpt: shape of the model.
        weights: folder of its newest complete checkpoint's weights.
        iteration: step of that checkpoint.
    """

    gpt: GPTConfig
    weights: Path
    iteration: int


def check_reference(
    run_config: dict[str, Any], flag: str, folder: Path, manifest: Manifest, seq_length: int
) -> GPTConfig:
    """Checks that a run's model can score this data, and returns its shape.

    Args:
        run_config: the run's config.json.
        flag: the flag that named it, for messages.
        folder: where it lies, for messages.

    Raises:
        ConfigError: the run used other domains, another tokenizer or a shorter window than this one.
    """
    what, faults = f"{flag} {folder}", []
    try:
        gpt = GPTConfig(**run_config["gpt"])
        names, tokenizer = run_config["domains"], run_config["tokenizer_sha256"]
    except (KeyError, TypeError) as error:
        raise ConfigError(
            Fault(what, f"config.json: {error}", "a config.json of this program", "train that model again")
        ) from error
    ours = manifest.tokenizer.sha256 if manifest.tokenizer else None
    if tokenizer != ours:
        faults.append(
            Fault(
                what,
                f"tokenizer {str(tokenizer)[:12]}",
                f"the manifest's tokenizer, {str(ours)[:12]}",
                "train the model on this data set: losses of other tokens cannot be compared",
            )
        )
    if list(names) != list(manifest.names):
        faults.append(
            Fault(
                what,
                f"domains {', '.join(names)}",
                f"the manifest's, in its order: {', '.join(manifest.names)}",
                "train the model on this manifest",
            )
        )
    if gpt.position_embedding_type == "learned_absolute" and gpt.max_positions < seq_length:
        faults.append(
            Fault(
                what,
                f"learned positions up to {gpt.max_positions}",
                f"--seq-length {seq_length}",
                "train the model with this --seq-length",
            )
        )
    raise_if_any(faults)
    return gpt


def read_run_config(folder: Path, flag: str) -> dict[str, Any]:
    """The config.json of a run's folder. Raises ConfigError where it is none."""
    path = folder / "config.json"
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(entry, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise ConfigError(
            Fault(
                f"{flag} {folder}",
                f"config.json: {error}",
                "the --save folder of a run of this program",
                "give that folder",
            )
        ) from error
    return entry


class OnlineReference:
    """Scores the proxy's micro-batches with the reference as they come, a forward pass each."""

    def __init__(
        self,
        run: ReferenceRun,
        topology: Topology,
        tp: TensorParallel,
        dtype: torch.dtype,
        shape: tuple[int, int],
        loss_chunk_tokens: int,
    ):
        """Builds this rank's stage and loads its weights.

        Args:
            shape: (batch, seq) of a micro-batch.
            loss_chunk_tokens: see `token_losses` in parallel/cross_entropy.py.
        """
        self.topology, self.shape = topology, shape
        self.module = load_frozen(run.gpt, run.weights, topology, tp, dtype, loss_chunk_tokens)

    def token_losses(self, micro_batches: Sequence[MicroBatch], count: int) -> list[Tensor]:
        """On the last stage, [batch, seq] losses in nats of each of `count` micro-batches; elsewhere nothing."""
        return forward_only(self.module, micro_batches, count, self.shape, self.topology)


class RecordedReference:
    """Token losses that --phase score has written, in place of a reference model."""

    def __init__(self, recorded: RecordedLosses, topology: Topology, device: torch.device):
        self.recorded, self.topology, self.device = recorded, topology, device

    def token_losses(self, micro_batches: Sequence[MicroBatch], count: int) -> list[Tensor]:
        """On the last stage, [batch, seq] losses in nats of each of `count` micro-batches; elsewhere nothing."""
        if not self.topology.is_last_stage:
            return []
        assert len(micro_batches) == count
        return [
            torch.from_numpy(self.recorded.losses(batch.domains.numpy(), batch.windows.numpy())).to(self.device)
            for batch in micro_batches
        ]
