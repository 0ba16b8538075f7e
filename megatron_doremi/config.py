"""Every setting of a run, once: frozen dataclasses from which the flags, the help and config.json follow.

A field's name is its flag (`num_layers` is `--num-layers`), its type says how the text is read, its metadata
holds the help and the choices. What follows from several settings is a function below the dataclasses, and
validation.py checks
all that can be checked before a file is opened.

Units stand in the help texts: tokens, windows (= samples, sequences of --seq-length tokens), iterations
(= steps of the optimizer, one global batch each), nats.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron_doremi.settings import (
    DECAY,
    EVALUATE,
    MAX_LAYERS,
    MINUTES,
    NO_EVALUATION,
    PHASES,
    POSITIVE_RATE,
    PROXY,
    RANKS,
    RATE,
    SCORE,
    SHARE,
    STEPS,
    TRAINING,
    WIDTH,
    Bounds,
    setting,
)
from megatron_doremi.shapes import PAPER_SHAPES, GPTConfig


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how much of it goes into a step."""

    default_phases: ClassVar[tuple[str, ...]] = PHASES

    phase: str = setting(
        "",
        "what to run: the reference model, the recording of its token losses, the proxy that learns the domain "
        "weights, the main model, or an evaluation",
        PHASES,
    )
    domains: str = setting("", "manifest of the domains (domains.json, or Megatron-LM's 'weight prefix ...' file)")
    domain_weights: str = setting(
        "",
        "how windows are sampled: uniform, natural (by token count N), temperature:T (by N^(1/T)), unimax (as uniform "
        "as --max-epochs-per-domain allows), given (the weights of a Megatron-LM list) or a weights file (default: "
        "uniform for a proxy, else given where there is such a list, else natural)",
        phases=NO_EVALUATION,
    )
    vocab_size: int = setting(
        0, "ids are below this; for a Megatron-LM list, which names no tokenizer", bounds=Bounds(0, 1 << 31)
    )
    allow_tokenizer_mismatch: bool = setting(
        False, "accept domain weights learned with another tokenizer", phases=NO_EVALUATION
    )
    change_domain_weights: bool = setting(
        False,
        "resume with other domain weights than before; no window is repeated or left out",
        phases=TRAINING,
    )
    seq_length: int = setting(1024, "length S of a window in tokens (next-token targets)", bounds=Bounds(1, 1 << 24))
    micro_batch_size: int = setting(
        1, "windows in one forward pass of one data-parallel rank", bounds=Bounds(1, 1 << 20)
    )
    global_batch_size: int = setting(
        0,
        "windows in one step over all ranks (default: one micro-batch a rank)",
        phases=NO_EVALUATION,
        bounds=Bounds(0, 1 << 30),
    )
    train_iters: int = setting(
        0,
        "steps of the whole training run; score: of the proxies to come, 0: all windows",
        phases=NO_EVALUATION,
        bounds=STEPS,
    )
    max_epochs_per_domain: float = setting(
        0.0,
        "refuse a mixture that would read a domain more often than this; unimax: fit the mixture to it; 0: any "
        "(domains that repeat are listed at the start)",
        phases=NO_EVALUATION,
        bounds=Bounds(0.0, 1e9),
    )
    eval_iters: int = setting(
        0,
        "an evaluation reads at most this many global batches (evaluate: those of the run that it loads) of held-out "
        "windows a domain, spread evenly over its held-out text; 0: all windows",
        phases=(*TRAINING, EVALUATE),
        bounds=STEPS,
    )
    eval_interval: int = setting(
        0, "steps between two evaluations; 0: only at the end of training", phases=TRAINING, bounds=STEPS
    )
    seed: int = setting(
        1234,
        "seed of the initial weights and of the order of windows",
        phases=NO_EVALUATION,
        bounds=Bounds(0, (1 << 63) - 1),
    )


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the transformer as the user gives it; `gpt_config` resolves it."""

    default_phases: ClassVar[tuple[str, ...]] = TRAINING

    model_size: str = setting("", "one of the paper's shapes, in place of the five sizes below", tuple(PAPER_SHAPES))
    num_layers: int = setting(0, "transformer blocks", bounds=Bounds(0, MAX_LAYERS))
    hidden_size: int = setting(0, "width of the residual stream", bounds=WIDTH)
    ffn_hidden_size: int = setting(0, "width of the feed-forward layer (default: 4 x hidden size)", bounds=WIDTH)
    num_attention_heads: int = setting(0, "query heads", bounds=WIDTH)
    num_query_groups: int = setting(
        0, "key-value heads, shared by groups of query heads (default: one a query head)", bounds=WIDTH
    )
    kv_channels: int = setting(0, "width of a head (default: hidden size / heads)", bounds=WIDTH)
    normalization: str = setting(
        "RMSNorm", "normalization before attention, feed-forward and output", ("RMSNorm", "LayerNorm")
    )
    norm_epsilon: float = setting(
        1e-5, "added to the variance in a normalization", bounds=Bounds(0.0, 1.0, above_low=True)
    )
    swiglu: bool = setting(False, "gated SiLU feed-forward in place of GELU")
    position_embedding_type: str = setting("rope", "how positions are told", ("rope", "learned_absolute"))
    rotary_base: float = setting(10000.0, "base of the rotary frequencies", bounds=Bounds(0.0, 1e12, above_low=True))
    untie_embeddings_and_output_weights: bool = setting(False, "give the output layer weights of its own")
    disable_bias_linear: bool = setting(False, "no bias in linear layers")
    make_vocab_size_divisible_by: int = setting(
        128,
        "pad the embedding table to a multiple of this; padding never enters a softmax",
        bounds=Bounds(1, WIDTH.high),
    )
    init_method_std: float = setting(
        0.02, "standard deviation of the initial weights", bounds=Bounds(0.0, 1e12, above_low=True)
    )


@dataclass(frozen=True)
class ParallelConfig:
    """How the model and the batch are spread over ranks; data parallel size follows from the world size."""

    default_phases: ClassVar[tuple[str, ...]] = PHASES

    tensor_model_parallel_size: int = setting(1, "ranks that share each layer", bounds=RANKS)
    pipeline_model_parallel_size: int = setting(1, "pipeline stages", bounds=RANKS)
    sequence_parallel: bool = setting(False, "split norms and residual stream over the tensor group by position")
    recompute_granularity: str = setting(
        "none",
        "what the backward pass computes again to save memory: nothing, attention's scores, or whole blocks",
        ("none", "selective", "full"),
        phases=TRAINING,
    )
    loss_chunk_tokens: int = setting(
        1024,
        "tokens whose logits are held at once; the backward pass computes them again. 0: hold those of whole "
        "micro-batches, computed once",
        bounds=Bounds(0, 1 << 30),
    )
    zero_stage: int = setting(
        0,
        "what DeepSpeed shards over the data group: 1 the optimizer's state, 2 gradients too, 3 weights too "
        "(2 and 3 without a pipeline)",
        (0, 1, 2, 3),
        phases=TRAINING,
    )
    cpu_offload: bool = setting(
        False, "ZeRO 2 and 3: keep the optimizer's state, and step it, in the host's memory", phases=TRAINING
    )


@dataclass(frozen=True)
class DoReMiConfig:
    """Group DRO over domains (Xie et al. 2023, Algorithm 1)."""

    default_phases: ClassVar[tuple[str, ...]] = (PROXY,)

    reference_load: str = setting("", "folder of the reference run (its --save folder)", phases=(SCORE, PROXY))
    reference_losses: str = setting(
        "online", "where the reference's token losses come from: online, or the folder that --phase score has filled"
    )
    shard: int = setting(0, "score: this task of an array job, from 0", phases=(SCORE,), bounds=STEPS)
    num_shards: int = setting(1, "score: tasks of the array job", phases=(SCORE,), bounds=RANKS)
    doremi_step_size: float = setting(1.0, "step size eta of the domain weights", bounds=RATE)
    doremi_smoothing: float = setting(1e-3, "smoothing c: each weight keeps at least c / k", bounds=DECAY)
    doremi_update: str = setting(
        "alternating",
        "a batch's gradient under the weights that it has moved (Algorithm 1), or under those before (1F1B)",
        ("alternating", "simultaneous"),
    )
    doremi_weighting: str = setting(
        "reweight",
        "the weights act on the loss while sampling stays, or on the next batch's sampling while the loss is plain",
        ("reweight", "resample"),
    )
    doremi_objective: str = setting(
        "excess",
        "what raises a domain's weight: the proxy's loss over the reference's, the proxy's loss alone, or the "
        "reference's alone, negative (the paper's ablation)",
        ("excess", "hardest", "easiest"),
    )
    doremi_normalization: str = setting(
        "domain",
        "the proxy's loss: weights times each domain's mean (the paper), or the mean over the batch's tokens under "
        "weights divided by sampling weights (the authors' repository)",
        ("domain", "batch"),
    )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and the learning rate."""

    default_phases: ClassVar[tuple[str, ...]] = TRAINING

    lr: float = setting(1e-3, "peak learning rate", bounds=POSITIVE_RATE)
    min_lr: float = setting(1e-4, "learning rate at the end of the decay", bounds=RATE)
    lr_decay_style: str = setting(
        "exponential", "shape of the decay", ("constant", "linear", "cosine", "exponential", "WSD")
    )
    lr_warmup_fraction: float = setting(0.06, "part of the run in which the rate rises linearly", bounds=SHARE)
    lr_warmup_iters: int = setting(0, "the same in iterations; overrules the fraction", bounds=STEPS)
    lr_wsd_decay_fraction: float = setting(
        0.1, "WSD: part of the run, at its end, in which the rate falls", bounds=SHARE
    )
    weight_decay: float = setting(0.01, "decoupled weight decay of matrices (biases and norms have none)", bounds=RATE)
    adam_beta1: float = setting(0.9, "decay of the first moment", bounds=DECAY)
    adam_beta2: float = setting(0.95, "decay of the second moment", bounds=DECAY)
    adam_eps: float = setting(1e-8, "added to the root of the second moment", bounds=POSITIVE_RATE)
    clip_grad: float = setting(1.0, "largest global norm of the gradient; 0: never clipped", bounds=RATE)
    bf16: bool = setting(False, "bfloat16 weights and activations, float32 master weights and gradients", phases=PHASES)


@dataclass(frozen=True)
class RunConfig:
    """Where results go and when."""

    default_phases: ClassVar[tuple[str, ...]] = TRAINING

    save: str = setting("", "folder of the results: config, metrics, checkpoints, domain weights", phases=PHASES)
    load: str = setting(
        "",
        "resume from this folder's newest complete checkpoint, or start where it has none",
        phases=(*TRAINING, EVALUATE),
    )
    override_resume: tuple[str, ...] = setting(
        (),
        "resume although these entries of the run's identity changed, such as lr or data_content; printed, and kept in "
        "every later checkpoint",
    )
    allow_unfinished: bool = setting(
        False,
        "accept a reference or learned domain weights whose run has not taken all of its steps",
        phases=NO_EVALUATION,
    )
    save_interval: int = setting(
        0, "steps between two checkpoints, besides those by time and at the end; 0: none", bounds=STEPS
    )
    save_interval_in_mins: float = setting(
        10.0,
        "minutes between two checkpoints, besides those of --save-interval; one taken for this alone is deleted as "
        "soon as a newer one is complete; 0: none",
        bounds=MINUTES,
    )
    keep_checkpoints: int = setting(0, "keep this many of the newest complete checkpoints; 0: all", bounds=STEPS)
    exit_interval: int = setting(
        0, "save and leave with exit code 0 when this iteration divides by it; 0: never", bounds=STEPS
    )
    exit_duration_in_mins: float = setting(
        0.0,
        "save and leave with exit code 3 so many minutes after the start; 0: never",
        phases=NO_EVALUATION,
        bounds=MINUTES,
    )
    exit_margin_in_mins: float = setting(
        5.0,
        "save and exit (code 3) this many minutes before SLURM_JOB_END_TIME, at most 10 % of the remaining allocation; "
        "0: never",
        phases=NO_EVALUATION,
        bounds=MINUTES,
    )
    distributed_timeout_minutes: float = setting(
        8.0,
        "end the run when no rank has made progress for so long, and name the one that hangs",
        phases=PHASES,
        bounds=Bounds(0.0, MINUTES.high, above_low=True),
    )
    check_ranks_interval: int = setting(
        1000,
        "steps between two comparisons of what ranks must hold alike; a difference stops the run; 0: only before saves",
        bounds=STEPS,
    )
    log_interval: int = setting(
        10,
        "steps between two lines on the console (a proxy's metrics.jsonl has each step)",
        bounds=Bounds(1, STEPS.high),
    )
    tensorboard_dir: str = setting("", "folder of the TensorBoard events (default: SAVE/tensorboard)")
    dry_run: bool = setting(
        False,
        "print the run as resolved and exit: settings, model, layout, memory a rank, domains; write nothing. What an "
        "earlier stage has yet to write is stood in for (score and evaluate: give the model flags of their run)",
        phases=PHASES,
    )


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    data: DataConfig
    model: ModelConfig
    parallel: ParallelConfig
    doremi: DoReMiConfig
    optimizer: OptimizerConfig
    run: RunConfig

    def to_dict(self) -> dict[str, Any]:
        """The settings by group, as config.json holds them."""
        return dataclasses.asdict(self)


SECTIONS: dict[str, type] = {
    "data": DataConfig,
    "model": ModelConfig,
    "parallel": ParallelConfig,
    "doremi": DoReMiConfig,
    "optimizer": OptimizerConfig,
    "run": RunConfig,
}


def gpt_config(model: ModelConfig, seq_length: int, vocab_size: int) -> GPTConfig:
    """Resolves the shape of the transformer. The settings must have passed `find_faults`."""
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


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Replicas of the model on `world_size` ranks."""
    return world_size // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)
