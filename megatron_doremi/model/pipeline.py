"""The GPT as a DeepSpeed pipeline: its layers in order, the split into stages, and the token losses at its end.

The same module is used for training (inside an engine), for the frozen reference and for evaluation. Layers have the
names that parameters have in checkpoints ("layers.3.attention.qkv.weight"), regardless of the split into stages.
"""

from __future__ import annotations

import contextlib
import functools
import io
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator

import torch
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from deepspeed.runtime.pipe.topology import ProcessTopology
from torch import Tensor, nn

from megatron_doremi.config import GPTConfig
from megatron_doremi.execution import DEFAULT, Execution
from megatron_doremi.model.attention import AttentionShape, takes_documents
from megatron_doremi.model.dropout import EMBEDDINGS, Dropout, layer_keys
from megatron_doremi.model.gpt import Block
from megatron_doremi.model.positions import Positions, Window
from megatron_doremi.parallel.context import ParallelContext
from megatron_doremi.parallel.cross_entropy import losses_and_normalizers
from megatron_doremi.parallel.deepspeed_internals import (
    PipelineModuleHooks,
    count_in_gradient_norm,
    is_tied_copy,
    new_groups_replaced,
)
from megatron_doremi.parallel.layers import LearnedPositions, Norm, TensorParallel, VocabParallelEmbedding
from megatron_doremi.parallel.parameters import initialize, spec_of
from megatron_doremi.parallel.topology import Topology, stage_bounds

TIED_KEY = "embedding"


class OutputLayer(VocabParallelEmbedding):
    """An untied output layer. The product with its weight is part of the loss; see `token_losses`."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


def _pass_hidden(embedding: nn.Module, hidden: Tensor) -> Tensor:
    """The tied output layer: the product with its weight is part of the loss, as for `OutputLayer`."""
    return hidden


def layer_names(gpt: GPTConfig) -> list[str]:
    """Names of the pipeline's layers, in order. A tied output layer has the name of the embedding."""
    positions = ["positions"] if gpt.position_embedding_type == "learned_absolute" else []
    blocks = [f"layers.{i}" for i in range(gpt.num_layers)]
    return ["embedding", *positions, *blocks, "final_norm", "embedding" if gpt.tied_embeddings else "output"]


class NamedLayers:
    """The part of the GPT that a rank holds; the common base of `GPTPipeline` and `GPTModel`."""

    gpt: GPTConfig
    tp: TensorParallel
    positions: Positions
    execution: Execution

    @property
    def every_stage_reads(self) -> bool:
        """Whether all stages of a pipeline need the windows: token ids for documents, keys for dropout."""
        return self.gpt.reads_documents or bool(self.execution.attention_dropout or self.execution.hidden_dropout)

    @functools.cached_property
    def document_eod(self) -> int | None:
        """The id that ends a document, if the model takes `MicroBatch.documents`; None: it attends across documents, or
        by a mask."""
        gpt = self.gpt
        if not gpt.reset_attention_mask or self.execution.attention_dropout:
            return None
        parameter = next(self.model_parameters())[1]
        heads, groups = gpt.num_attention_heads // self.tp.size, gpt.num_query_groups // self.tp.size
        # Batch and length do not matter to the kernel.
        shape = AttentionShape(1, 128, heads, groups, gpt.kv_channels, parameter.dtype, False, True)
        return gpt.eod if takes_documents(shape, parameter.device) else None

    @abstractmethod
    def named_layers(self) -> Iterator[tuple[str, nn.Module]]:
        """The layers of this rank by name; a tied layer once."""

    @abstractmethod
    def run(
        self, x: Tensor, targets: Tensor | None, tokens: Tensor | None = None, documents: Tensor | None = None
    ) -> Tensor:
        """Passes a micro-batch through the layers of this rank.

        Args:
            x: token ids [batch, seq] on the first stage, elsewhere the output of the previous stage.
            targets: [batch, seq] on the last stage, elsewhere None.
            tokens: [batch, seq] ids, on every stage if `every_stage_reads`.
            documents: of `MicroBatch`, where tokens are given.

        Returns:
            [batch, seq] token losses in nats on the last stage, elsewhere hidden states (`activation_shape`).
        """

    def model_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of this rank by their names in the full model."""
        for prefix, layer in self.named_layers():
            for name, parameter in layer.named_parameters():
                yield f"{prefix}.{name}", parameter

    def activation_shape(self, micro_batch_size: int, seq_length: int) -> tuple[int, int, int]:
        """Shape of the output of every stage but the last."""
        return micro_batch_size, seq_length // self.tp.sequence_shards, self.gpt.hidden_size

    def _through(
        self,
        layers: Iterable[Callable[..., Tensor]],
        x: Tensor,
        tokens: Tensor | None,
        keys: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Passes token ids, or the output of the previous stage, through layers of this stage.

        Args:
            keys: of `MicroBatch`; None: no dropout.
            documents: of `MicroBatch`.
        """
        window = self._window(x, tokens, documents)
        for layer in layers:
            if isinstance(layer, Block):
                if keys is not None:
                    window = window._replace(keys=layer_keys(keys, layer.number))
                if layer.number == 0:
                    x = layer.dropped(x, window, EMBEDDINGS)
                x = layer(x, window)
            elif isinstance(layer, LearnedPositions):
                x = layer(x, window.positions)
            else:
                x = layer(x)
        return x

    def _window(self, x: Tensor, tokens: Tensor | None, documents: Tensor | None) -> Window:
        if self.gpt.reads_documents:
            assert tokens is not None, "every stage reads the tokens"
            # Read for another model, such as the reference.
            taken = documents if self.document_eod is not None else None
            if taken is not None and self.execution.compiled:
                # One graph for any number of documents.
                torch._dynamo.mark_dynamic(taken, 0)
            return self.positions.of_documents(tokens, next(self.model_parameters())[1].dtype, taken)
        # Token ids are never split by position.
        shards = self.tp.sequence_shards if x.is_floating_point() else 1
        return self.positions.of_window(x.shape[1] * shards, x.device)


class GPTPipeline(NamedLayers, PipelineModuleHooks):
    """This rank's stage of the GPT; initial values depend only on `seed` and the parameters' names.

    Attributes:
        tokens: [batch, seq] ids of the next forward pass, if `every_stage_reads`; DeepSpeed passes on one tensor.
        keys: [batch] keys of its dropout masks; None: no dropout.
        documents: of its `MicroBatch`.
    """

    tokens: Tensor | None = None
    keys: Tensor | None = None
    documents: Tensor | None = None

    def __init__(
        self,
        gpt: GPTConfig,
        context: ParallelContext,
        seed: int | None,
        execution: Execution = DEFAULT,
        dtype: torch.dtype | None = None,
    ):
        """Builds and initializes the layers of this stage.

        Args:
            seed: None leaves the parameters uninitialized, for weights that are about to be loaded.
            dtype: of the parameters; None: float32.
        """
        topology, tp = context.topology, context.tensor_parallel
        self.gpt, self.tp, self.execution = gpt, tp, execution
        self.names, self.positions = layer_names(gpt), Positions(gpt)
        axes = ProcessTopology(
            axes=["pipe", "data", "model"],
            dims=[topology.pipe_size, topology.data_size, topology.tensor_size],
        )
        # Suppresses DeepSpeed's tables of topology and stages; ours are in config.json and the dry run.
        groups = new_groups_replaced(context.groups.instead_of_new_group)
        with contextlib.redirect_stdout(io.StringIO()), groups:
            super().__init__(
                layers=layer_specs(gpt, tp, execution),
                topology=axes,
                loss_fn=self.token_losses,
                partition_method="uniform",
            )
        # Before any value is drawn: its memory was not touched yet.
        self.to(dtype)
        if execution.compiled:
            compile_layers(layer for _, layer in self.named_layers())
        if seed is not None:
            initialize(self.named_layers(), seed, tp.group)
        mark_for_gradient_norm((p for _, p in self.model_parameters()), topology)

    def layer_bounds(self, num_stages: int) -> list[int]:
        first = self.names.index("layers.0")
        after = len(self.names) - first - self.gpt.num_layers
        return stage_bounds(self.gpt.num_layers, num_stages, first, after)

    def named_layers(self) -> Iterator[tuple[str, nn.Module]]:
        seen: set[str] = set()
        for index in self.stage_layers():
            name = self.names[index]
            if name in seen:
                continue
            seen.add(name)
            tied = name == "embedding" and self.has_tied_layer(TIED_KEY)
            yield name, self.tied_layer(TIED_KEY) if tied else self.untied_layer(index)

    def forward(self, x: Tensor) -> Tensor:
        """Replaces DeepSpeed's forward pass, which gives every layer one input: blocks also take positions."""
        return self._through(self.layer_functions(), x, self.tokens, self.keys, self.documents)

    def run(
        self, x: Tensor, targets: Tensor | None, tokens: Tensor | None = None, documents: Tensor | None = None
    ) -> Tensor:
        self.tokens, self.keys, self.documents = tokens, None, documents
        x = self(x)
        return x if targets is None else self.token_losses(x, (targets,))

    def token_losses(self, hidden: Tensor, labels: tuple[Tensor, ...]) -> Tensor:
        """Token losses on the last stage.

        Args:
            hidden: what the last layer returns.
            labels: (targets [batch, seq], ...); further entries are ignored.

        Returns:
            see `output_losses`.
        """
        output = self.tied_layer(TIED_KEY) if self.gpt.tied_embeddings else self.untied_layer(len(self.names) - 1)
        return output_losses(
            hidden, output.get_parameter("weight"), labels[0], self.gpt, self.tp, self.execution, self.training
        )


def output_losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    gpt: GPTConfig,
    tp: TensorParallel,
    execution: Execution,
    training: bool,
) -> Tensor:
    """Token losses of the residual stream under the output layer's `weight`; see `losses_and_normalizers`.

    Args:
        training: the module is in training mode.

    Returns:
        [batch, seq] losses in nats, float32, the same on every rank of the tensor group; in training with
        `Execution.normalizers` [2, batch, seq], losses and normalizers.
    """
    both = losses_and_normalizers(hidden, weight, targets, gpt.vocab_size, tp.group, execution, tp.sequence_parallel)
    return torch.stack(both) if execution.normalizers and training else both[0]


def layer_specs(gpt: GPTConfig, tp: TensorParallel, execution: Execution = DEFAULT) -> list[LayerSpec]:
    """The specs of the layers in `layer_names`, in order."""
    padded = gpt.padded_vocab_size(tp.size)
    embedding = (gpt.vocab_size, padded, gpt.hidden_size, gpt.init_method_std, tp)
    specs: list[LayerSpec] = []
    if gpt.tied_embeddings:
        specs.append(TiedLayerSpec(TIED_KEY, VocabParallelEmbedding, *embedding))
    else:
        specs.append(LayerSpec(VocabParallelEmbedding, *embedding))
    if gpt.position_embedding_type == "learned_absolute":
        specs.append(LayerSpec(LearnedPositions, gpt.max_positions, gpt.hidden_size, gpt.init_method_std, tp))
    dropout = Dropout(execution.attention_dropout, execution.hidden_dropout)
    specs += [LayerSpec(Block, gpt, tp, execution.recompute, dropout, number) for number in range(gpt.num_layers)]
    specs.append(LayerSpec(Norm, gpt.hidden_size, gpt.normalization, gpt.norm_epsilon, tp))
    if gpt.tied_embeddings:
        specs.append(TiedLayerSpec(TIED_KEY, VocabParallelEmbedding, *embedding, forward_fn=_pass_hidden))
    else:
        specs.append(LayerSpec(OutputLayer, *embedding))
    return specs


def compile_layers(layers: Iterable[nn.Module]) -> None:
    """Compiles blocks and the final norm, each at its first call.

    Blocks have the same code and shapes, so that the first one's graph serves all.
    """
    for layer in layers:
        if isinstance(layer, Block | Norm):
            layer.compile(fullgraph=True, dynamic=False)


def mark_for_gradient_norm(parameters: Iterable[nn.Parameter], topology: Topology) -> None:
    """Marks the parameters that this rank counts in the global gradient norm, so that each is counted once."""
    for parameter in parameters:
        replicated = spec_of(parameter).dim is None
        first = not replicated or topology.tensor_rank == 0
        count_in_gradient_norm(parameter, first and not is_tied_copy(parameter))
