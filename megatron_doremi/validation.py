"""Faults of the settings by themselves: found, all of them, before data is opened or a model is built."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Collection
from os.path import realpath
from pathlib import Path

from megatron_doremi.config import (
    PAPER_SHAPES,
    SECTIONS,
    Config,
    DoReMiConfig,
    GPTConfig,
    ModelConfig,
    ParallelConfig,
    gpt_config,
    states_shape,
)
from megatron_doremi.errors import Fault
from megatron_doremi.layout_rules import (
    dry_run_faults,
    field_faults,
    layout_faults,
    split_faults,
    zero_faults,
)
from megatron_doremi.settings import EVALUATE, PHASES, PROXY, RESAMPLE, SCORE, UNIMAX, flag_of, phases_of


def find_faults(config: Config, world_size: int) -> list[Fault]:
    """All faults of the settings by themselves, before any file is opened."""
    model_faults = _model_faults(config.model, config.parallel) if _reads_shape(config) else []
    faults = [*_required(config), *_ranges(config), *_schedule_faults(config)]
    faults += [*_profile_faults(config, world_size), *model_faults]
    if not config.run.suggest_layout:
        return [*faults, *layout_faults(config, world_size), *zero_faults(config), *dry_run_faults(config)]
    if not faults and _reads_shape(config):
        gpt = gpt_config(config.model, config.data.seq_length, vocab_size=1)
        faults += split_faults(config, gpt, world_size)
    return [*faults, *zero_faults(config), *dry_run_faults(config)]


def _reads_shape(config: Config) -> bool:
    """Whether the model flags apply: a run that starts from another model, score and evaluate take its shape; they read
    the flags only where given, score and evaluate only in a dry run."""
    if config.data.phase in (SCORE, EVALUATE):
        return config.run.dry_run and states_shape(config.model)
    return not config.run.init_from or states_shape(config.model)


def _without_effect(flag: str, rule: str) -> Fault:
    return Fault(flag, "has no effect", rule, "leave it out")


def _holds_run(save: Path) -> bool:
    try:
        return any((save / "checkpoints").glob("iter_*"))
    except (OSError, ValueError):
        # Not a path; output_checks.py reports it.
        return False


def _required(config: Config) -> list[Fault]:
    data, run, faults = config.data, config.run, []

    def need(name: str, value: object, why: str) -> None:
        if not value:
            faults.append(Fault(flag_of(name), "not given", why, f"give {flag_of(name)}"))

    need("phase", data.phase, f"one of {', '.join(PHASES)}")
    need("domains", data.domains or data.data_path, "a manifest of the domains (or Megatron-LM's --data-path)")
    if data.domains and data.data_path:
        faults.append(Fault("--data-path", "given", "in place of --domains", "give one of the two"))
    try:
        _ = data.split_shares
    except ValueError:
        rule = "shares of train, valid and test: up to three numbers of 0 or more, the first above 0"
        faults.append(Fault("--split", data.split, rule, "give for example 969,30,1"))
    if data.phase == EVALUATE:
        need("load", run.load, "an evaluation loads a trained run")
    elif data.phase == SCORE:
        need("save", run.save or run.dry_run, "scoring writes the losses to a folder")
        need("reference_load", config.doremi.reference_load, "scoring loads a trained reference")
    elif data.phase:
        need("train_iters", data.train_iters, "training needs a number of steps")
        need("save", run.save or run.dry_run, "training writes its results to a folder")
    if data.domain_weights == UNIMAX and data.phase != EVALUATE:
        cap = "--domain-weights unimax fits the mixture to a cap on epochs per domain"
        need("max_epochs_per_domain", data.max_epochs_per_domain, cap)
        if data.phase == SCORE:
            need(
                "train_iters", data.train_iters, "--domain-weights unimax divides the tokens that the proxies will read"
            )
    elif data.phase == SCORE and data.max_epochs_per_domain:
        faults.append(_without_effect("--max-epochs-per-domain", "score reads it only for --domain-weights unimax"))
    if data.phase == SCORE and data.train_iters:
        need("global_batch_size", data.global_batch_size, "--train-iters counts steps of the proxies' global batch")
    if data.phase == PROXY:
        faults += [*_reference_faults(config.doremi), *_resampling_faults(config)]
    holds_run = bool(run.save) and _holds_run(Path(run.save))
    if data.phase != EVALUATE and holds_run and not run.load:
        faults.append(
            Fault(
                "--save",
                f"{run.save} holds a run",
                "a separate folder for each run",
                f"add --load {run.save} to resume it, or give another folder",
            )
        )
    if run.wandb_project and importlib.util.find_spec("wandb") is None:
        rule, remedy = "the Python package wandb, which is missing", "pip install wandb, or leave it out"
        faults.append(Fault("--wandb-project", run.wandb_project, rule, remedy))
    if run.init_from and run.load_step is not None:
        rule = f"one source of weights; --load {run.load} branches with weights and optimizer"
        faults.append(Fault("--init-from", run.init_from, rule, "give one of the two"))
    if "domain_weights" in config.given and not data.domain_weights:
        rule, remedy = "a mixture, or weights by name", "leave the flag out, or check the variable that it came from"
        faults.append(Fault("--domain-weights", "empty", rule, remedy))
    resumes = bool(run.load) and run.load_step is None
    if resumes and run.save and data.phase != EVALUATE and realpath(run.load) != realpath(run.save):
        faults.append(
            Fault(
                "--load",
                run.load,
                f"a run resumes in its own folder, --save {run.save}"
                + ("" if Path(run.load).is_dir() else "; and this folder does not exist"),
                f"give the same folder to --load and --save, or --load {run.load}@STEP to branch from a step",
            )
        )
    return faults


def _reference_faults(doremi: DoReMiConfig) -> list[Fault]:
    """Faults of a proxy's flags that name its reference."""
    online, load = doremi.online, doremi.reference_load
    if doremi.doremi_objective == "hardest":
        given = {"--reference-load": bool(load), "--reference-losses": not online}
        rule = "--doremi-objective hardest reads no reference"
        return [_without_effect(flag, rule) for flag, is_given in given.items() if is_given]
    if not doremi.reference_losses:
        rule = "online, or a folder that --phase score wrote"
        return [Fault("--reference-losses", "empty", rule, "give one of these, or leave it out")]
    if load and not online:
        rule = "--reference-losses already names the source of the reference losses"
        return [_without_effect("--reference-load", rule)]
    if online and not load:
        rule = "a proxy is trained against a reference's losses"
        return [Fault("--reference-load", "not given", rule, "give --reference-load")]
    return []


def _resampling_faults(config: Config) -> list[Fault]:
    """Faults of flags of a proxy that samples by the weights that it learns, and so weighs no loss."""
    if config.doremi.doremi_weighting != RESAMPLE:
        return []
    rules = {
        "doremi_update": "--doremi-weighting resample samples the next batch by the weights, after this one's update",
        "doremi_normalization": "--doremi-weighting resample has a plain loss: the mean over all tokens",
        "domain_weights": "--doremi-weighting resample samples by the weights that it learns, from uniform ones; "
        "--exclude-domains leaves domains out",
    }
    return [_without_effect(flag_of(name), rule) for name, rule in rules.items() if name in config.given]


def phase_faults(phase: str, given: Collection[str]) -> list[Fault]:
    """Faults of flags that the phase does not read: they would be ignored silently.

    A dry run of any phase accepts the model flags: they give the shape of a run that does not exist yet.
    """
    if phase not in PHASES:
        return []
    unread: dict[tuple[bool, tuple[str, ...]], list[str]] = {}
    for section, cls in SECTIONS.items():
        for field in dataclasses.fields(cls):
            phases = phases_of(cls, field)
            if section == "model" and "dry_run" in given:
                phases = PHASES
            if field.name in given and phase not in phases:
                unread.setdefault((section == "model", phases), []).append(flag_of(field.name))
    faults = []
    for (is_model, phases), flags in unread.items():
        remedy = "leave it out" if len(flags) == 1 else "leave them out"
        if is_model:
            remedy += f"; the model is that of {'--load' if phase == EVALUATE else '--reference-load'}"
        rule = f"flags that --phase {phase} reads; {'this one is' if len(flags) == 1 else 'these are'} for "
        faults.append(Fault(", ".join(flags), "no effect in this phase", rule + ", ".join(phases), remedy))
    return faults


def _ranges(config: Config) -> list[Fault]:
    faults: list[Fault] = []

    def check(holds: bool, name: str, value: object, rule: str) -> None:
        if not holds:
            faults.append(Fault(flag_of(name), str(value), rule, f"give {flag_of(name)} a value in that range"))

    for section in SECTIONS:
        values = getattr(config, section)
        for field in dataclasses.fields(values):
            bounds, value = field.metadata["bounds"], getattr(values, field.name)
            rule = bounds.broken_rule(value) if bounds is not None else None
            check(rule is None, field.name, value, rule or "")
    doremi, optim, steps = config.doremi, config.optimizer, config.data.train_iters
    check(doremi.shard < max(1, doremi.num_shards), "shard", doremi.shard, "from 0 to --num-shards - 1")
    if optim.lr_decay_style != "constant":
        check(optim.min_lr <= optim.lr, "min_lr", optim.min_lr, f"between 0 and --lr {optim.lr}")
    if optim.lr_decay_style == "exponential":
        check(optim.min_lr > 0, "min_lr", optim.min_lr, "above 0 where the decay is exponential")
    if steps > 0:
        warmup = optim.lr_warmup_iters
        check(
            warmup <= steps, "lr_warmup_iters", warmup, f"at most --train-iters {steps}, else the peak is never reached"
        )
    return faults


def _schedule_faults(config: Config) -> list[Fault]:
    """Faults of flags that another optimizer or decay reads, and of a decay that the run has no room for."""
    optim, steps, faults = config.optimizer, config.data.train_iters, []
    if "muon_momentum" in config.given and optim.optimizer != "muon":
        faults.append(_without_effect("--muon-momentum", "--optimizer muon reads it"))
    if "min_lr" in config.given and optim.lr_decay_style == "constant":
        faults.append(_without_effect("--min-lr", "--lr-decay-style constant stays at --lr"))
    if {"lr_warmup_iters", "lr_warmup_fraction"} & config.given == {"lr_warmup_iters"} and not optim.lr_warmup_iters:
        rule = f"at least 1 step: 0 stands for not given, and --lr-warmup-fraction is {optim.lr_warmup_fraction}"
        faults.append(Fault("--lr-warmup-iters", "0", rule, "for no warmup give --lr-warmup-fraction 0"))
    if optim.lr_decay_style != "WSD":
        names = [name for name in ("lr_wsd_decay_fraction", "lr_wsd_decay_iters") if name in config.given]
        return faults + [_without_effect(flag_of(name), "--lr-decay-style WSD reads it") for name in names]
    warmup, decay = optim.warmup_steps(steps), optim.lr_wsd_decay_iters
    if 0 < steps < warmup + decay:
        rule = f"at most {steps - warmup}: --train-iters {steps} less {warmup} steps of warmup"
        remedy = "give a value in that range, more steps, or a shorter --lr-warmup-iters"
        faults.append(Fault("--lr-wsd-decay-iters", str(decay), rule, remedy))
    return faults


def _profile_faults(config: Config, world_size: int) -> list[Fault]:
    """Faults of the flags of a step's trace."""
    run, steps = config.run, config.data.train_iters
    if not run.profile:
        return [_without_effect("--profile-rank", "--profile names the step to record")] if run.profile_rank else []
    faults = []
    if 0 < steps < run.profile:
        rule = f"a step of the run: at most --train-iters {steps}"
        faults.append(Fault("--profile", str(run.profile), rule, "give a step in that range"))
    if run.profile_rank >= world_size:
        rule, remedy = f"a rank of the run: below {world_size}", "give a rank in that range"
        faults.append(Fault("--profile-rank", str(run.profile_rank), rule, remedy))
    return faults


def _model_faults(model: ModelConfig, parallel: ParallelConfig) -> list[Fault]:
    sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels")
    faults: list[Fault] = []
    given = [name for name in sizes if getattr(model, name)]
    needed = ("num_layers", "hidden_size", "num_attention_heads")
    if model.model_size and given:
        faults.append(
            Fault(
                "--model-size",
                model.model_size,
                "in place of " + ", ".join(map(flag_of, given)),
                "give either --model-size or the sizes",
            )
        )
    missing = [name for name in needed if not getattr(model, name)]
    if not model.model_size and missing:
        faults.append(
            Fault(
                ", ".join(map(flag_of, missing)),
                "not given",
                "a model needs layers, width and heads",
                f"give them, or --model-size {{{','.join(PAPER_SHAPES)}}}",
            )
        )
    wrong = any(
        field.metadata["bounds"] is not None and field.metadata["bounds"].broken_rule(getattr(model, field.name))
        for field in dataclasses.fields(model)
    )
    if faults or wrong:
        return faults
    if model.swiglu and model.openai_gelu:
        faults.append(_without_effect("--openai-gelu", "--swiglu replaces GELU"))
    if model.position_embedding_type != "rope" and model.rotary_base != ModelConfig.rotary_base:
        faults.append(_without_effect("--rotary-base", "--position-embedding-type rope reads it"))
    return [*faults, *_shape_faults(gpt_config(model, seq_length=1, vocab_size=1), model, parallel)]


def _shape_faults(gpt: GPTConfig, model: ModelConfig, parallel: ParallelConfig) -> list[Fault]:
    faults: list[Fault] = []

    def divides(name: str, value: int, by_name: str, by: int) -> None:
        if by > 0 and value % by:
            faults.append(
                Fault(
                    flag_of(name),
                    str(value),
                    f"must be a multiple of {flag_of(by_name)} {by}",
                    f"give for example {-(-value // by) * by}, or change {flag_of(by_name)}",
                )
            )

    if not model.model_size and not model.kv_channels:
        divides("hidden_size", gpt.hidden_size, "num_attention_heads", gpt.num_attention_heads)
    divides("num_attention_heads", gpt.num_attention_heads, "num_query_groups", gpt.num_query_groups)
    if gpt.position_embedding_type == "rope" and gpt.kv_channels % 2:
        faults.append(
            Fault(
                "--kv-channels",
                str(gpt.kv_channels),
                "an even width: rope rotates pairs of channels",
                "give an even --kv-channels, or --position-embedding-type learned_absolute",
            )
        )
    return [*faults, *field_faults(gpt, parallel)]
