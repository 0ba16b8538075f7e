"""The GPT as one module whose forward pass returns token losses, for layouts without a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_doremi.config import GPTConfig
from megatron_doremi.execution import DEFAULT, Execution
from megatron_doremi.model.pipeline import (
    GPTPipeline,
    NamedLayers,
    OutputLayer,
    compile_layers,
    layer_names,
    layer_specs,
    mark_for_gradient_norm,
    output_losses,
)
from megatron_doremi.model.positions import Positions
from megatron_doremi.parallel.context import ParallelContext
from megatron_doremi.parallel.layers import TensorParallel
from megatron_doremi.parallel.parameters import initialize


class LossHead(nn.Module):
    """The output layer and the token losses under it: hidden [batch, seq, hidden] -> [batch, seq].

    Projection and softmax are one module, so that ZeRO 3 gathers the weight once for both.
    """

    def __init__(self, weight: nn.Parameter, gpt: GPTConfig, tp: TensorParallel, execution: Execution):
        super().__init__()
        self.weight, self.gpt, self.tp, self.execution = weight, gpt, tp, execution

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return output_losses(hidden, self.weight, targets, self.gpt, self.tp, self.execution, self.training)


class GPTModel(NamedLayers, nn.Module):
    """All layers of the GPT, sharded by tensor parallelism alone: token ids and targets to token losses."""

    def __init__(
        self,
        gpt: GPTConfig,
        context: ParallelContext,
        seed: int | None,
        execution: Execution = DEFAULT,
        partition: Callable[[nn.Module], None] | None = None,
        dtype: torch.dtype | None = None,
    ):
        """Builds the layers one by one, on this rank's device, and initializes them.

        Args:
            seed: None leaves the parameters uninitialized, for weights that are about to be loaded.
            partition: called with each layer once it is initialized; partitions its parameters over the data-parallel
                group (ZeRO 3), so that a rank never holds more than one full layer.
            dtype: of the parameters; None: float32.
        """
        nn.Module.__init__(self)
        tp = context.tensor_parallel
        self.gpt, self.tp, self.names, self.positions = gpt, tp, layer_names(gpt), Positions(gpt)
        self.execution = execution
        self.layers = nn.ModuleList()
        for name, spec in zip(self.names, layer_specs(gpt, tp, execution), strict=True):
            if name in self.names[: len(self.layers)]:
                # The tied output layer.
                self.layers.append(LossHead(self.layers[0].get_parameter("weight"), gpt, tp, execution))
                continue
            layer = spec.build()
            if isinstance(layer, OutputLayer):
                layer = LossHead(layer.weight, gpt, tp, execution)
            # Its memory was not touched yet: the host never holds the model for another device or in another type.
            layer.to(context.device, dtype)
            if seed is not None and partition is not None:
                initialize([(name, layer)], seed, tp.group)
            mark_for_gradient_norm(layer.parameters(), context.topology)
            if partition is not None:
                partition(layer)
            self.layers.append(layer)
        if seed is not None and partition is None:
            initialize(self.named_layers(), seed, tp.group)
        if execution.compiled:
            compile_layers(self.layers)

    def named_layers(self) -> Iterator[tuple[str, nn.Module]]:
        seen: set[str] = set()
        for name, layer in zip(self.names, self.layers, strict=True):
            if name not in seen:
                seen.add(name)
                yield name, layer

    def forward(
        self, tokens: Tensor, targets: Tensor, keys: Tensor | None = None, documents: Tensor | None = None
    ) -> Tensor:
        """[batch, seq] ids and targets -> [batch, seq] losses in nats, float32; see `output_losses`.

        Args:
            keys: of `MicroBatch`; None: no dropout.
            documents: of `MicroBatch`.
        """
        return self.layers[-1](self._through(self.layers[:-1], tokens, tokens, keys, documents), targets)

    def logits(self, tokens: Tensor) -> Tensor:
        """[batch, seq] ids -> [batch, seq, vocab] logits, on one tensor-parallel rank."""
        assert self.tp.size == 1
        hidden = self._through(self.layers[:-1], tokens, tokens)
        return F.linear(hidden, self.layers[-1].get_parameter("weight")[: self.gpt.vocab_size])

    def run(
        self, x: Tensor, targets: Tensor | None, tokens: Tensor | None = None, documents: Tensor | None = None
    ) -> Tensor:
        assert targets is not None
        return self(x, targets, None, documents)


# The part of the GPT that a rank holds, in either form.
GPT = GPTPipeline | GPTModel


def make_gpt(
    gpt: GPTConfig,
    context: ParallelContext,
    seed: int | None,
    execution: Execution = DEFAULT,
    partition: Callable[[nn.Module], None] | None = None,
    dtype: torch.dtype | None = None,
) -> GPT:
    """This rank's part of the GPT: its stage of a pipeline, or without one all layers; see `GPTModel`."""
    if context.topology.pipe_size > 1:
        assert partition is None, "ZeRO 3 has no pipeline"
        return GPTPipeline(gpt, context, seed, execution, dtype)
    return GPTModel(gpt, context, seed, execution, partition, dtype)
