"""config.json in a run's --save folder: the model and the settings, validated when another run reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

from megatron_doremi.config import GPTConfig
from megatron_doremi.errors import ConfigError, Fault
from megatron_doremi.settings import MAX_LAYERS, MAX_WIDTH
from megatron_doremi.storage.formats import Count, Name, Positive, Schema, read_checked

_Width = Annotated[int, Field(ge=1, le=MAX_WIDTH)]
# Of a matrix whose size in bytes fits in 64 bits.
_Rows = Annotated[int, Field(ge=1, lt=2**40)]


class GPTEntry(Schema):
    """A `GPTConfig` in a file. A missing field takes the default of `GPTConfig`.

    An unknown field is a fault: it describes a model that this version cannot build.
    """

    model_config = ConfigDict(extra="forbid")

    num_layers: Annotated[int, Field(ge=1, le=MAX_LAYERS)]
    hidden_size: _Width
    ffn_hidden_size: _Width
    num_attention_heads: _Width
    num_query_groups: _Width
    kv_channels: _Width
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    norm_epsilon: Annotated[float, Field(gt=0)] = GPTConfig.norm_epsilon
    swiglu: bool = GPTConfig.swiglu
    openai_gelu: bool = GPTConfig.openai_gelu
    qk_layernorm: bool = GPTConfig.qk_layernorm
    position_embedding_type: Literal["rope", "learned_absolute"] = "rope"
    rotary_base: Annotated[float, Field(gt=0)] = GPTConfig.rotary_base
    tied_embeddings: bool = GPTConfig.tied_embeddings
    bias_linear: bool = GPTConfig.bias_linear
    vocab_size: _Rows
    make_vocab_size_divisible_by: Positive = GPTConfig.make_vocab_size_divisible_by
    max_positions: _Rows
    init_method_std: Annotated[float, Field(gt=0)] = GPTConfig.init_method_std
    reset_position_ids: bool = GPTConfig.reset_position_ids
    reset_attention_mask: bool = GPTConfig.reset_attention_mask
    eod: Count | None = GPTConfig.eod

    @model_validator(mode="after")
    def _heads_divide(self) -> GPTEntry:
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError("num_attention_heads must be a multiple of num_query_groups")
        if self.position_embedding_type == "rope" and self.kv_channels % 2:
            raise ValueError("rope rotates pairs of channels: kv_channels must be even")
        return self

    @model_validator(mode="after")
    def _documents_end(self) -> GPTEntry:
        resets = self.reset_position_ids or self.reset_attention_mask
        if resets and (self.eod is None or self.eod >= self.vocab_size):
            raise ValueError("eod must be a token id where positions or attention reset at the ends of documents")
        return self

    def gpt(self) -> GPTConfig:
        """The model shape."""
        return GPTConfig(**self.model_dump())


class IdentityEntry(Schema):
    """A run's identity in a file (phases/identity.py); this schema lists the entries that the program uses.

    None is required, because version 0.1 recorded fewer.
    """

    model_config = ConfigDict(extra="allow")

    phase: Name | None = None
    gpt: GPTEntry | None = None
    domains: list[Name] | None = None
    tokenizer_sha256: str | None = None
    data_fingerprint: str | None = None
    data_content: str | None = None
    sampling_weights: dict[Name, Annotated[float, Field(gt=0, le=1)]] | None = None
    seq_length: Positive | None = None
    global_batch_size: Positive | None = None
    seed: Count | None = None
    train_iters: Count | None = None

    def entries(self) -> dict[str, Any]:
        """The entries in the file; `gpt` is complete, its missing fields take their defaults."""
        recorded = self.model_dump(exclude_unset=True)
        return recorded if self.gpt is None else recorded | {"gpt": self.gpt.model_dump()}


class RunConfigFile(Schema):
    """config.json of a training run, as `write_run_config` (phases/identity.py) writes it."""

    FORMAT: ClassVar[str] = "megatron-doremi-run/1"
    FORMAT_OPTIONAL: ClassVar[bool] = True

    program: str = ""
    versions: dict[str, str] = Field(default_factory=dict)
    phase: Name
    gpt: GPTEntry
    domains: Annotated[list[Name], Field(min_length=1)]
    sampling_weights: dict[Name, Annotated[float, Field(gt=0, le=1)]] = Field(default_factory=dict)
    tokenizer_sha256: str | None
    data_fingerprint: str = ""
    global_batch_size: Positive
    topology: dict[str, Count] = Field(default_factory=dict)
    settings: dict[str, dict[str, Any]] = Field(default_factory=dict)
    identity: IdentityEntry | None = None
    overrides: list[dict[str, Any]] = Field(default_factory=list)

    def train_iters(self) -> int:
        """--train-iters of the run; 0 if the file does not record it."""
        steps = self.settings.get("data", {}).get("train_iters", 0)
        return steps if isinstance(steps, int) and not isinstance(steps, bool) else 0


def read_run_config(folder: Path, flag: str) -> RunConfigFile:
    """Reads config.json of a run's folder. Raises ConfigError with every fault, each naming `flag`."""
    if not folder.is_dir():
        rule, remedy = "the --save folder of a run", "correct the path, or train the run first"
        raise ConfigError(Fault(f"{flag} {folder}", "no such folder", rule, remedy))
    subject = f"{flag} {folder}: config.json"
    return read_checked(folder / "config.json", subject, RunConfigFile, "give the --save folder of a run, unchanged")
