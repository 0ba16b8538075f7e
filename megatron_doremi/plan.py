"""The resolved run: everything that follows from settings, layout and data, derived once and read everywhere."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_doremi.config import Config, ParallelConfig
from megatron_doremi.data.blend import Blend
from megatron_doremi.execution import Execution
from megatron_doremi.parallel.topology import Topology
from megatron_doremi.shapes import GPTConfig, Shape


@dataclass(frozen=True)
class RunPlan:
    """A resolved run; every phase, --dry-run, DeepSpeed's configuration, resume and reports read it.

    Attributes:
        config: the settings as given.
        topology: the layout and this rank's place in it.
        shape: of the model that the run trains or loads.
        names: the k domains.
        window_counts: [k] windows of each domain's training stream; empty if the phase reads none.
        sampling_weights: [k] float64, sum 1, at the start of the run.
        global_batch_size: windows in a step, over all ranks.
        micro_batches: forward passes of a rank in a step.
    """

    config: Config
    topology: Topology
    shape: Shape
    names: tuple[str, ...]
    window_counts: tuple[int, ...]
    sampling_weights: NDArray[np.float64]
    global_batch_size: int
    micro_batches: int

    @property
    def gpt(self) -> GPTConfig:
        """The shape of a model of this program."""
        assert isinstance(self.shape, GPTConfig), self.shape
        return self.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and activations."""
        return torch.bfloat16 if self.config.optimizer.bf16 else torch.float32

    @property
    def batch_shape(self) -> tuple[int, int]:
        """(batch, seq) of a micro-batch."""
        return self.config.data.micro_batch_size, self.config.data.seq_length

    @property
    def blend(self) -> Blend:
        """The blend, which picks the windows of each step."""
        return Blend(self.names, self.window_counts, self.global_batch_size, self.config.data.seed)

    @property
    def step_tokens(self) -> int:
        """Tokens in a step, over all ranks."""
        return self.global_batch_size * self.config.data.seq_length

    @property
    def frozen_execution(self) -> Execution:
        """How a frozen model computes: it gains nothing from logits that are held."""
        parallel = self.config.parallel
        given = "loss_chunk_tokens" in self.config.given
        chunk = parallel.loss_chunk_tokens if given else ParallelConfig().loss_chunk_tokens
        return Execution("none", chunk, parallel.compile)

    def execution(self, alternating: bool) -> Execution:
        """How the trained model computes.

        Logits of one chunk are held for the backward pass where they are the only ones: they take no more memory than
        to compute them again, and save a product.

        Args:
            alternating: all forward passes of a step come before its first backward pass.
        """
        chunk, tokens = self.config.parallel.loss_chunk_tokens, self.batch_shape[0] * self.batch_shape[1]
        holds_one = not alternating or self.micro_batches == 1
        held = tokens <= chunk and holds_one
        parallel = self.config.parallel
        training = self.config.training
        return Execution(
            parallel.recompute_granularity,
            0 if held else chunk,
            parallel.compile,
            training.z_loss > 0.0,
            training.attention_dropout,
            training.hidden_dropout,
        )

    @property
    def windows(self) -> int:
        """Windows that the run reads, over all steps, ranks and domains."""
        return self.config.data.train_iters * self.global_batch_size

    @property
    def tokens(self) -> int:
        """Tokens that the run reads."""
        return run_tokens(self.config, self.topology.data_size)

    @property
    def windows_needed(self) -> tuple[int, ...]:
        """[k] windows of each domain that the run reads, rounded up by at most one; without --train-iters, all.

        The blend keeps each domain within one window of its share, so the count follows without running the blend.
        """
        if not self.config.data.train_iters:
            return self.window_counts
        pairs = zip(self.window_counts, self.sampling_weights, strict=True)
        return tuple(min(count, int(np.ceil(self.windows * weight)) + 1) for count, weight in pairs)

    @property
    def epochs(self) -> NDArray[np.float64]:
        """[k] epochs of each domain under the sampling weights, exact to within one window."""
        return self.windows * self.sampling_weights / np.array(self.window_counts, dtype=np.float64)


def batch_sizes(config: Config, data_size: int) -> tuple[int, int]:
    """(windows in a global batch, micro-batches per rank and step) on `data_size` replicas.

    Without --global-batch-size a step has one micro-batch per replica.
    """
    windows_per_pass = config.data.micro_batch_size * data_size
    global_batch_size = config.data.global_batch_size or windows_per_pass
    return global_batch_size, global_batch_size // windows_per_pass


def run_tokens(config: Config, data_size: int) -> int:
    """Tokens that a run on `data_size` replicas reads."""
    return config.data.train_iters * batch_sizes(config, data_size)[0] * config.data.seq_length


def make_plan(
    config: Config,
    topology: Topology,
    shape: Shape,
    names: tuple[str, ...],
    window_counts: tuple[int, ...],
    sampling_weights: NDArray[np.float64],
) -> RunPlan:
    """Resolves a run; see `RunPlan` for the arguments."""
    sizes = batch_sizes(config, topology.data_size)
    return RunPlan(config, topology, shape, names, window_counts, sampling_weights, *sizes)
