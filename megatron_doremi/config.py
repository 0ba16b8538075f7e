"""Every setting of a run, once: frozen dataclasses from which the flags, the help and config.json follow.

A field's name gives its flag (`num_layers`: `--num-layers`), its type says how the text is parsed, and its metadata
holds the help text and the choices. Values that follow from several settings are functions below the dataclasses.
validation.py checks everything that can be checked before a file is opened.

Help texts state the units: tokens, windows (= samples, sequences of --seq-length tokens), steps (= iterations, one
optimizer step on one global batch), nats.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron_doremi.optimizer_settings import OPTIMIZER_NAMES as OPTIMIZER_NAMES
from megatron_doremi.optimizer_settings import OptimizerConfig
from megatron_doremi.planning_settings import PlanningConfig
from megatron_doremi.run_settings import RunConfig, folder_and_step
from megatron_doremi.settings import (
    DECAY,
    EVALUATE,
    MAX_LAYERS,
    NO_EVALUATION,
    PHASES,
    PROXY,
    RANKS,
    RATE,
    RESAMPLE,
    SCORE,
    STEPS,
    TRAINING,
    WIDTH,
    Bounds,
    setting,
)
from megatron_doremi.shapes import PAPER_SHAPES, GPTConfig
from megatron_doremi.training_settings import STEP_NAMES as STEP_NAMES
from megatron_doremi.training_settings import TrainingConfig


@dataclass(frozen=True)
class DataConfig:
    """The data, and how much of it a step reads."""

    default_phases: ClassVar[tuple[str, ...]] = PHASES

    phase: str = setting(
        "",
        "train the reference model, record its token losses (score), train the proxy that learns the domain weights, "
        "train the main model, or evaluate a run",
        PHASES,
    )
    domains: str = setting(
        "", "manifest of the domains: domains.json, or a Megatron-LM file 'weight prefix weight prefix ...'"
    )
    data_path: tuple[str, ...] = setting(
        (), "Megatron-LM's list on the command line, in place of --domains: weight prefix ..., or prefixes alone"
    )
    split: str = setting(
        "",
        "shares of train, valid and test in each pair of a list of prefixes, such as 969,30,1, by documents in order "
        "as Megatron-LM splits them; default: all of each pair is for training",
    )
    domain_weights: str = setting(
        "",
        "sampling weights of the domains: uniform, natural (by token count N), temperature:T (by N^(1/T)), unimax (as "
        "uniform as --max-epochs-per-domain allows), given (those of a Megatron-LM list), weights by name as in "
        "A=0.5,B=0.5 (0 leaves a domain out) or a weights file: JSON, YAML, or FILE.csv@RUN (default: uniform for a "
        "proxy, else given if the list has weights, else natural)",
        phases=NO_EVALUATION,
    )
    domain_names: str = setting(
        "", "JSON file {name in the weights file: name in the manifest}; other names stay", phases=NO_EVALUATION
    )
    exclude_domains: tuple[str, ...] = setting(
        (), "domains of the manifest to leave out, as A,B or as separate words; names are those of the manifest"
    )
    vocab_size: int = setting(
        0,
        "number of token ids; for a Megatron-LM list, which names no tokenizer, and to plan (--dry-run) without data",
        bounds=Bounds(0, 1 << 31),
    )
    allow_tokenizer_mismatch: bool = setting(
        False, "accept domain weights learned with another tokenizer", phases=NO_EVALUATION
    )
    change_domain_weights: bool = setting(
        False,
        "resume with domain weights other than the checkpoint's; no window is repeated or skipped",
        phases=TRAINING,
    )
    seq_length: int = setting(1024, "length of a window in tokens (next-token targets)", bounds=Bounds(1, 1 << 24))
    micro_batch_size: int = setting(1, "windows in one forward pass of a data-parallel rank", bounds=Bounds(1, 1 << 20))
    global_batch_size: int = setting(
        0,
        "windows in one step over all ranks (default: one micro-batch per data-parallel rank)",
        phases=NO_EVALUATION,
        bounds=Bounds(0, 1 << 30),
    )
    train_iters: int = setting(
        0,
        "steps of the training run; score: steps of the proxies that will read the losses, 0: score all windows",
        phases=NO_EVALUATION,
        bounds=STEPS,
    )
    max_epochs_per_domain: float = setting(
        0.0,
        "refuse a mixture that reads any domain more than this many times; unimax: fit the mixture to this cap; 0: no "
        "cap (domains that repeat are listed at the start)",
        phases=NO_EVALUATION,
        bounds=Bounds(0.0, 1e9),
    )
    eval_iters: int = setting(
        0,
        "held-out windows that an evaluation reads per domain, in global batches (evaluate: of the loaded run), spread "
        "evenly over the held-out text; 0: all windows",
        phases=(*TRAINING, EVALUATE),
        bounds=STEPS,
    )
    eval_interval: int = setting(
        0, "steps between evaluations; 0: only at the end of training", phases=TRAINING, bounds=STEPS
    )
    seed: int = setting(
        1234,
        "seed of the initial weights and of the window order",
        phases=NO_EVALUATION,
        bounds=Bounds(0, (1 << 63) - 1),
    )

    @property
    def source(self) -> str:
        """What names the data, for messages."""
        return f"--domains {self.domains}" if self.domains else "--data-path"

    @property
    def split_shares(self) -> tuple[float, float, float] | None:
        """--split as shares of train, valid and test; None without it. Raises ValueError if it is malformed."""
        if not self.split:
            return None
        train, valid, test = ([float(word) for word in self.split.split(",")] + [0.0, 0.0])[:3]
        shares = (train, valid, test)
        if self.split.count(",") > 2 or train <= 0.0 or not all(0.0 <= share < 1e100 for share in shares):
            raise ValueError(self.split)
        return shares


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the transformer as given; `gpt_config` resolves it."""

    default_phases: ClassVar[tuple[str, ...]] = TRAINING

    model_size: str = setting(
        "",
        "a shape of the DoReMi paper (Xie et al. 2023), in place of sizes: layers, hidden, ffn, heads, channels",
        tuple(PAPER_SHAPES),
    )
    num_layers: int = setting(0, "transformer blocks", bounds=Bounds(0, MAX_LAYERS))
    hidden_size: int = setting(0, "width of the residual stream", bounds=WIDTH)
    ffn_hidden_size: int = setting(0, "width of the feed-forward layer (default: 4 x hidden size)", bounds=WIDTH)
    num_attention_heads: int = setting(0, "query heads", bounds=WIDTH)
    num_query_groups: int = setting(
        0, "key-value heads, each shared by a group of query heads (default: one per query head)", bounds=WIDTH
    )
    kv_channels: int = setting(0, "width of a head (default: hidden size / heads)", bounds=WIDTH)
    normalization: str = setting(
        "RMSNorm", "normalization before attention, feed-forward and output layer", ("RMSNorm", "LayerNorm")
    )
    norm_epsilon: float = setting(
        1e-5, "added to the variance in a normalization", bounds=Bounds(0.0, 1.0, above_low=True)
    )
    swiglu: bool = setting(False, "gated SiLU feed-forward in place of GELU")
    openai_gelu: bool = setting(False, "GELU by its tanh approximation, as in GPT-2")
    qk_layernorm: bool = setting(False, "normalize the queries and keys of each head before they are rotated")
    position_embedding_type: str = setting("rope", "position embedding", ("rope", "learned_absolute"))
    rotary_base: float = setting(
        10000.0, "rope: base of the rotary frequencies", bounds=Bounds(0.0, 1e12, above_low=True)
    )
    untie_embeddings_and_output_weights: bool = setting(False, "give the output layer its own weights")
    disable_bias_linear: bool = setting(False, "omit biases in linear layers")
    make_vocab_size_divisible_by: int = setting(
        128,
        "pad the embedding table to a multiple of this; padding rows never enter a softmax",
        bounds=Bounds(1, WIDTH.high),
    )
    init_method_std: float = setting(
        0.02, "standard deviation of the initial weights", bounds=Bounds(0.0, 1e12, above_low=True)
    )


@dataclass(frozen=True)
class ParallelConfig:
    """The layout over ranks; the data parallel size follows from the world size."""

    default_phases: ClassVar[tuple[str, ...]] = PHASES

    tensor_model_parallel_size: int = setting(1, "ranks that each layer is sharded over", bounds=RANKS)
    pipeline_model_parallel_size: int = setting(1, "pipeline stages", bounds=RANKS)
    sequence_parallel: bool = setting(
        False,
        "shard norms and the residual stream over the tensor parallel group, by position; needs two ranks in it",
    )
    recompute_granularity: str = setting(
        "none",
        "activations that the backward pass recomputes to save memory: none, attention's inner part, or full blocks; "
        "not given: none while they fit the device, else full blocks",
        ("none", "selective", "full"),
        phases=TRAINING,
    )
    loss_chunk_tokens: int = setting(
        1024,
        "tokens whose logits are computed at a time, and again in the backward pass. 0: compute the logits of each "
        "micro-batch once and hold them. Not given: 0 while they fit the GPU, else 4096 while these do, else 1024",
        bounds=Bounds(0, 1 << 30),
    )
    compile: bool = setting(
        False, "compile each block and the losses by torch.compile; takes a minute or two at the start"
    )
    zero_stage: int = setting(
        0,
        "what DeepSpeed shards over the data parallel group: 1 optimizer state, 2 gradients too, 3 weights too (2 and "
        "3 only without a pipeline)",
        (0, 1, 2, 3),
        phases=TRAINING,
    )
    cpu_offload: bool = setting(
        False, "ZeRO 2 and 3: hold the optimizer state in host memory and step it there", phases=TRAINING
    )


@dataclass(frozen=True)
class DoReMiConfig:
    """Group DRO over domains (Xie et al. 2023, Algorithm 1)."""

    default_phases: ClassVar[tuple[str, ...]] = (PROXY,)

    reference_load: str = setting(
        "",
        "the reference: a run (its --save folder; the newest checkpoint, or with DIR@STEP the one of this step, of a "
        "finished run or not), a model folder or a Hugging Face folder",
        phases=(SCORE, PROXY),
    )
    reference_losses: str = setting(
        "online",
        "source of the reference's token losses: online (a forward pass), or a folder that --phase score wrote",
    )
    shard: int = setting(0, "score: index of this task of an array job; 0: the first", phases=(SCORE,), bounds=STEPS)
    num_shards: int = setting(1, "score: number of tasks of the array job", phases=(SCORE,), bounds=RANKS)
    doremi_step_size: float = setting(1.0, "step size eta of the domain weights", bounds=RATE)
    doremi_smoothing: float = setting(1e-3, "smoothing c: each of k weights stays at least c / k", bounds=DECAY)
    doremi_update: str = setting(
        "alternating",
        "weigh a batch's gradient by the weights after the batch's own update (Algorithm 1) or before it (1F1B)",
        ("alternating", "simultaneous"),
    )
    doremi_weighting: str = setting(
        "reweight",
        "apply the weights to the loss, with fixed sampling, or to the sampling of the next batch, with a plain loss",
        ("reweight", RESAMPLE),
    )
    doremi_objective: str = setting(
        "excess",
        "score that raises a domain's weight: the excess of the proxy's loss over the reference's, the proxy's loss "
        "(hardest), or minus the reference's loss (easiest); the last two are the paper's ablation",
        ("excess", "hardest", "easiest"),
    )
    doremi_normalization: str = setting(
        "domain",
        "normalize the proxy's loss by domain (weights times each domain's mean; the paper) or by batch (mean over all "
        "tokens, each weighed by weight / sampling weight; the authors' repository)",
        ("domain", "batch"),
    )
    doremi_stop_drift: float = setting(
        0.0,
        "stop early, once the mean weights of all --train-iters steps are known to within this for every domain (95 % "
        "interval, from drift and noise over the last half of the steps taken); the result is the extrapolated mean; "
        "0: never",
        bounds=DECAY,
    )

    @property
    def online(self) -> bool:
        """Whether the reference scores a proxy's batches as they come; else its losses are read from disk."""
        return self.reference_losses == "online"

    @property
    def reference_folder(self) -> str:
        """The folder of --reference-load, without @STEP."""
        return folder_and_step(self.reference_load)[0]

    @property
    def reference_step(self) -> int | None:
        """STEP of --reference-load DIR@STEP; None without it."""
        return folder_and_step(self.reference_load)[1]


@dataclass(frozen=True)
class Config:
    """All settings of a run.

    Attributes:
        given: names of the settings that the command line states, even if with their default values.
    """

    data: DataConfig
    model: ModelConfig
    parallel: ParallelConfig
    doremi: DoReMiConfig
    optimizer: OptimizerConfig
    run: RunConfig
    planning: PlanningConfig = dataclasses.field(default_factory=PlanningConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    given: frozenset[str] = dataclasses.field(default=frozenset(), compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The settings by group, as config.json holds them."""
        return {section: dataclasses.asdict(getattr(self, section)) for section in SECTIONS}


SECTIONS: dict[str, type] = {
    "data": DataConfig,
    "model": ModelConfig,
    "parallel": ParallelConfig,
    "doremi": DoReMiConfig,
    "training": TrainingConfig,
    "optimizer": OptimizerConfig,
    "run": RunConfig,
    "planning": PlanningConfig,
}


def gpt_config(model: ModelConfig, seq_length: int, vocab_size: int) -> GPTConfig:
    """The resolved shape of the transformer. The settings must have passed `find_faults`."""
    layers, heads, channels, hidden, ffn = PAPER_SHAPES.get(
        model.model_size,
        (
            model.num_layers,
            model.num_attention_heads,
            model.kv_channels,
            model.hidden_size,
            model.ffn_hidden_size,
        ),
    )
    return GPTConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn or 4 * hidden,
        num_attention_heads=heads,
        num_query_groups=model.num_query_groups or heads,
        kv_channels=channels or hidden // heads,
        normalization=model.normalization,
        norm_epsilon=model.norm_epsilon,
        swiglu=model.swiglu,
        openai_gelu=model.openai_gelu,
        qk_layernorm=model.qk_layernorm,
        position_embedding_type=model.position_embedding_type,
        rotary_base=model.rotary_base,
        tied_embeddings=not model.untie_embeddings_and_output_weights,
        bias_linear=not model.disable_bias_linear,
        vocab_size=vocab_size,
        make_vocab_size_divisible_by=model.make_vocab_size_divisible_by,
        max_positions=seq_length,
        init_method_std=model.init_method_std,
    )


def states_shape(model: ModelConfig) -> bool:
    """Whether any model flag was given a value other than its default."""
    return model != ModelConfig()


def planned_world_size(run: RunConfig, launched: int) -> int:
    """Ranks of the run that the settings describe, in a process of a launch of `launched` ranks."""
    dry_run_world_size = run.dry_run_world_size if run.dry_run else 0
    return max(1, dry_run_world_size or run.nproc_per_node or launched)


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Replicas of the model on `world_size` ranks."""
    return world_size // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)
