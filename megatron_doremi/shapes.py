"""Shapes of transformers: the paper's by name, and one with every size resolved."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

# Shapes of Xie et al. 2023, Table 9: layers, heads, head width, hidden width, feed-forward width. The names
# of the small sizes count a 256k-token embedding.
PAPER_SHAPES: dict[str, tuple[int, int, int, int, int]] = {
    "70m": (3, 4, 64, 256, 1024),
    "150m": (6, 8, 64, 512, 2048),
    "280m": (12, 12, 64, 768, 3072),
    "510m": (12, 16, 64, 1024, 8192),
    "760m": (12, 20, 64, 1280, 8192),
    "1b": (16, 32, 64, 2048, 8192),
    "8b": (32, 32, 128, 4096, 24576),
}
# Fields of a shape that say whether it depends on where documents end.
RESETS = ("reset_position_ids", "reset_attention_mask")


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """A transformer with every size resolved: all that its forward pass and its parameters depend on.

    A default is the value of a config.json or checkpoint without the field, whatever the default of the flag. A new
    field needs a default that describes every model trained before it, and no default is ever changed. Sizes have none.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    normalization: str = "RMSNorm"
    norm_epsilon: float = 1e-5
    swiglu: bool = False
    openai_gelu: bool = False
    qk_layernorm: bool = False
    position_embedding_type: str = "rope"
    rotary_base: float = 10000.0
    tied_embeddings: bool = True
    bias_linear: bool = True
    vocab_size: int
    make_vocab_size_divisible_by: int = 128
    max_positions: int
    init_method_std: float = 0.02
    reset_position_ids: bool = False
    reset_attention_mask: bool = False
    eod: int | None = None

    @property
    def reads_documents(self) -> bool:
        """Whether a token's position, or what it attends to, depends on where documents end: after the id `eod`."""
        return self.reset_position_ids or self.reset_attention_mask

    def padded_vocab_size(self, tensor_size: int) -> int:
        """Rows of the embedding table on `tensor_size` ranks together; rows past `vocab_size` stay unused."""
        multiple = math.lcm(self.make_vocab_size_divisible_by, tensor_size)
        return -(-self.vocab_size // multiple) * multiple


@dataclass(frozen=True, kw_only=True)
class TransformersShape:
    """A model that Transformers runs, because `GPTConfig` cannot express it.

    Attributes:
        class_name: its class in Transformers.
        reason: the entries of config.json that `GPTConfig` cannot express.
        version: of Transformers.
        vocab_size: rows of its output layer.
        max_positions: longest window; None if its class has no limit.
        parameters: numbers in its weights files.
    """

    class_name: str
    reason: str
    version: str
    vocab_size: int
    max_positions: int | None
    parameters: int

    def padded_vocab_size(self, tensor_size: int) -> int:
        """Rows of the output layer: its class pads nothing."""
        return self.vocab_size

    def statement(self) -> str:
        """What runs the model, and why."""
        return f"{self.class_name}, run by Transformers {self.version}: this program's GPT cannot express {self.reason}"


# What a run trains or loads.
Shape = GPTConfig | TransformersShape


def with_defaults(shape: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `GPTConfig` in a file, with the defaults of missing fields."""
    defaults = {field.name: field.default for field in fields(GPTConfig) if field.default is not MISSING}
    return {**defaults, **shape}
