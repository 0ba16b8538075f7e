"""The identity of a run: everything that determines its result; compared on resume and by the report.

An identity is a flat dictionary of JSON values; an entry that a flag determines has the name of the flag. Every
checkpoint and config.json hold it, with the overrides that the user has requested.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from megatron_doremi import __version__
from megatron_doremi.checkpoint.run_config import RunConfigFile
from megatron_doremi.config import OPTIMIZER_NAMES, STEP_NAMES, Config
from megatron_doremi.engine.optimizer import LearningRate, make_learning_rate, same_until
from megatron_doremi.errors import ConfigError, Fault
from megatron_doremi.mixture.controller import MixtureController
from megatron_doremi.parallel.exchange import gather_json
from megatron_doremi.phases.run_data import RunData
from megatron_doremi.plan import RunPlan
from megatron_doremi.settings import PROXY, RESAMPLE, flag_of, without_unread
from megatron_doremi.storage.files import atomic_write_text, make_folder
from megatron_doremi.version import versions

# Entries that no --override-resume can change: with another value the trained parameters would be useless.
FIXED = ("phase", "gpt", "domains", "tokenizer_sha256", "seq_length")
_REMEDY = "resume with the settings and data that the run began with, or start a new folder"
# Entries that differ wherever the domains do.
_OF_THE_DOMAINS = ("data_fingerprint", "data_content", "sampling_weights")
_REMEDIES = {
    "global_batch_size": "give the --global-batch-size that the run began with; its default follows from the ranks",
    "sampling_weights": "give the weights that the run began with, or --change-domain-weights to resume with these",
}
# What only the decay of a WSD run reads.
OF_THE_DECAY = ("lr_wsd_decay_fraction", "lr_wsd_decay_iters", "min_lr")
Identity = dict[str, Any]


def run_identity(
    plan: RunPlan,
    data: RunData,
    controller: MixtureController,
    reference: str | None = None,
    initial: str | None = None,
) -> Identity:
    """The identity of a training run.

    Args:
        controller: of the mixture; gives the settings of its method.
        reference: hash of the weights of a proxy's reference; None without a reference.
        initial: hash of the weights of --init-from; None without it.
    """
    config = plan.config
    identity: Identity = {
        "phase": config.data.phase,
        "gpt": asdict(plan.gpt),
        "precision": "bfloat16" if config.optimizer.bf16 else "float32",
        "domains": list(plan.names),
        "tokenizer_sha256": data.tokenizer_sha256,
        "data_fingerprint": data.manifest.fingerprint(),
        "data_content": data.content,
        "sampling_weights": dict(zip(plan.names, plan.sampling_weights.tolist(), strict=True)),
        "seq_length": config.data.seq_length,
        "global_batch_size": plan.global_batch_size,
        "seed": config.data.seed,
        "train_iters": config.data.train_iters,
        **{name: getattr(config.optimizer, name) for name in OPTIMIZER_NAMES},
    }
    identity |= {name: getattr(config.training, name) for name in STEP_NAMES}
    identity |= controller.identity()
    if config.data.phase == PROXY:
        source = "online" if config.doremi.online else "recorded"
        identity |= {"reference": reference, "reference_losses": source}
    if config.run.init_from:
        identity["init_from"] = initial
    return identity


def write_run_config(
    plan: RunPlan,
    data: RunData,
    identity: Mapping[str, Any],
    overrides: Sequence[Mapping[str, Any]],
) -> None:
    """Writes SAVE/config.json: every resolved value of the run.

    Args:
        identity: of the run.
        overrides: entries of the identity that the user has changed, with their iterations.
    """
    save = Path(plan.config.run.save)
    make_folder(save, "--save")
    entry = {
        "format": RunConfigFile.FORMAT,
        "program": f"megatron-doremi {__version__}",
        # Of this start. Not part of the identity: a run may resume under other versions.
        "versions": versions(),
        "phase": plan.config.data.phase,
        "gpt": asdict(plan.gpt),
        "domains": list(plan.names),
        "sampling_weights": dict(zip(plan.names, plan.sampling_weights.tolist(), strict=True)),
        "tokenizer_sha256": data.tokenizer_sha256,
        "data_fingerprint": data.manifest.fingerprint(),
        "held_out_content": data.held_out_content,
        "held_out_text": data.held_out_text,
        "global_batch_size": plan.global_batch_size,
        "topology": {k: v for k, v in asdict(plan.topology).items() if k != "rank"},
        "identity": dict(identity),
        "overrides": list(overrides),
        "settings": plan.config.to_dict(),
    }
    atomic_write_text(save / "config.json", json.dumps(entry, indent=2) + "\n")


def identity_hash(identity: Mapping[str, Any]) -> str:
    """SHA-256 of an identity, in hex: runs with equal hashes compute the same, up to rounding by layout."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], subject: str, allowed: Collection[str]
) -> tuple[list[Fault], list[str]]:
    """Compares a run's identity with that of the checkpoint from which it resumes.

    Args:
        before: the checkpoint's identity; missing entries were not recorded and are not compared.
        now: this run's identity. `train_iters` is not compared: a run may be extended (see `schedule_change`).
        subject: name of the checkpoint in messages.
        allowed: names of --override-resume.

    Returns:
        the faults, and the names of entries that differ and are allowed to.
    """
    faults, overridden = [], []
    before, now = compared_entries(before), compared_entries(now)
    other_domains = "domains" in before and "domains" in now and before["domains"] != now["domains"]
    if other_domains:
        faults.append(_domains_fault(before["domains"], now["domains"], subject))
    for name, value in now.items():
        if name not in before or before[name] == value or name in ("train_iters", "domains"):
            continue
        if other_domains and name in _OF_THE_DOMAINS:
            continue
        if name in allowed and name not in FIXED:
            overridden.append(name)
            continue
        remedy = _REMEDIES.get(name, _REMEDY)
        if name not in FIXED and name not in _REMEDIES:
            remedy += f", or give --override-resume {name} to change it on purpose"
        old = before[name]
        if name == "gpt":
            # What is unread under one of the two shapes, such as the base of its rotation, is no difference.
            old, value = ({key: each[key] for key in each if key in old and key in value} for each in (old, value))
        was, now_is = for_message(old, value), for_message(value, old)
        given = f"{name} was {was}, and is {now_is} in this start"
        faults.append(Fault(subject, given, f"one {name} from a run's first step to its last", remedy))
    return faults, overridden


def compared_entries(identity: Mapping[str, Any]) -> Identity:
    """An identity without what no step reads: see `without_unread`; a proxy that samples by its weights starts from
    uniform ones, whatever the weights of --domain-weights."""
    read = without_unread(identity)
    if "gpt" in read:
        read["gpt"] = without_unread(read["gpt"])
    if read.get("doremi_weighting") == RESAMPLE:
        read.pop("sampling_weights", None)
    return read


def _domains_fault(before: Sequence[str], now: Sequence[str], subject: str) -> Fault:
    """The fault of a resume with other domains."""
    left_out = ", ".join(repr(name) for name in before if name not in now)
    added = ", ".join(repr(name) for name in now if name not in before)
    value = "; ".join([f"without {left_out}"] * bool(left_out) + [f"with {added} in addition"] * bool(added))
    remedy = _REMEDY
    if left_out and not added:
        remedy = (
            "if the data still hold them, give a small weight, such as 1e-6, in place of 0 and of --exclude-domains, "
            "and --change-domain-weights; else start a new folder"
        )
    value = f"domains: {value or 'in another order'}"
    return Fault(subject, value, "the same domains from a run's first step to its last", remedy)


def override_faults(allowed: Sequence[str], now: Mapping[str, Any]) -> list[Fault]:
    """Faults of the names in --override-resume."""
    names = [name for name in now if name not in (*FIXED, "train_iters")]
    faults = []
    for name in allowed:
        if name in FIXED:
            rule, remedy = "an entry that a trained model can change", "start a new folder"
        elif name not in names:
            rule, remedy = "one of " + ", ".join(names), "give one of these names"
        else:
            continue
        faults.append(Fault("--override-resume", name, rule, remedy))
    return faults


def _short(value: Any, other: Any) -> Any:
    """A number with 6 digits, if the other one differs in them."""
    if not isinstance(value, float) or not isinstance(other, float):
        return value
    return value if f"{value:.6g}" == f"{other:.6g}" else float(f"{value:.6g}")


def for_message(value: Any, other: Any) -> Any:
    """A value for a message: of two mappings only the entries that differ, with 6 digits; of a hash only its start."""
    if isinstance(value, Mapping) and isinstance(other, Mapping):
        return {key: _short(entry, other.get(key)) for key, entry in value.items() if other.get(key) != entry}
    return value[:12] if isinstance(value, str) and len(value) == 64 else value


def schedule_change(before: Mapping[str, Any], config: Config, iteration: int) -> str | None:
    """A line about the effect of a changed --train-iters on the learning rate after `iteration`; None if it is
    unchanged or was not recorded."""
    total, planned = config.data.train_iters, before.get("train_iters")
    if planned is None or planned == total:
        return None
    step = min(iteration + 1, total)
    now, then = make_learning_rate(config.optimizer, total), _recorded_rate(before, config)
    text = (
        f"--train-iters {planned:,} -> {total:,}: the learning rate of iteration {step:,} is {now.at(step):.3e}, where "
        f"the run was planned with {then.at(min(step, planned)):.3e}"
    )
    if config.optimizer.lr_decay_style != "WSD":
        return f"{text}; warmup and decay now span {total:,} iterations"
    return f"{text}; {_stable_phase(then, now, iteration)}"


def _recorded_rate(before: Mapping[str, Any], config: Config) -> LearningRate:
    """The schedule of a recorded identity; entries that it lacks are those of this start."""
    recorded = {name: before[name] for name in OPTIMIZER_NAMES if name in before}
    return make_learning_rate(replace(config.optimizer, **recorded), before["train_iters"])


def _stable_phase(then: LearningRate, now: LearningRate, iteration: int) -> str:
    """Whether a WSD run that continues after `iteration` is one that was planned like this from its start; else why."""
    if same_until(then, now, iteration):
        return f"it decays after {now.decay_start:,}, and all steps taken had the rate that this schedule gives them"
    reasons = []
    if now.warmup != then.warmup:
        reasons.append(f"its warmup took {then.warmup:,} steps (give --lr-warmup-iters {then.warmup})")
    if iteration > then.decay_start:
        reasons.append(f"it has decayed since step {then.decay_start:,} (branch from that step, or before)")
    if iteration > now.decay_start:
        reasons.append(f"its decay would have begun at step {now.decay_start:,} (give more --train-iters)")
    return "no run of this schedule takes the steps that were taken: " + "; ".join(reasons or ["its peak differs"])


def free_in_the_stable_phase(before: Mapping[str, Any], config: Config, iteration: int) -> frozenset[str]:
    """The entries of the identity that a WSD run has not used after `iteration`, so that a branch may choose them."""
    if before.get("lr_decay_style") != "WSD" or "train_iters" not in before:
        return frozenset()
    now = make_learning_rate(config.optimizer, config.data.train_iters)
    return frozenset(OF_THE_DECAY if same_until(_recorded_rate(before, config), now, iteration) else ())


def check_ranks_start_alike(config: Config, read: Mapping[str, Any]) -> None:
    """Checks that all ranks have the same settings, files and versions; a collective call.

    Args:
        read: hashes of the files that this rank sees; of `what_is_read` in inputs.py.

    Raises:
        ConfigError: on every rank, naming the ranks that differ from the majority, and the differences.
    """
    values = {
        **{flag_of(name): value for part in config.to_dict().values() for name, value in part.items()},
        **read,
        "version of megatron-doremi": __version__,
        "version of torch": torch.__version__,
    }
    hashes = {
        name: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest() for name, value in values.items()
    }
    everyone = gather_json(hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest())
    if len(set(everyone)) == 1:
        return
    # Only now do ranks exchange more than a hash each.
    faults = []
    shown = {name: str(for_message(value, None))[:60] for name, value in values.items()}
    details = gather_json([hashes, shown])
    for name in sorted({name for entry, _ in details for name in entry}):
        ranks: dict[str | None, list[int]] = defaultdict(list)
        for number, (entry, _) in enumerate(details):
            ranks[entry.get(name)].append(number)
        if len(ranks) == 1:
            continue
        majority = max(ranks.values(), key=lambda group: (len(group), -group[0]))
        rule = f"that of {_rank_list(majority, 4)}, {details[majority[0]][1].get(name)}"
        remedy = "start every rank with the same command, and copy the same files to every node"
        for group in ranks.values():
            if group is not majority:
                value = f"{name} {details[group[0]][1].get(name)}"
                faults.append(Fault(_rank_list(group, len(group)), value, rule, remedy))
    raise ConfigError(faults)


def _rank_list(ranks: Sequence[int], limit: int) -> str:
    """The ranks as text, at most `limit` of them."""
    listed = ", ".join(map(str, ranks[:limit])) + (", ..." if len(ranks) > limit else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {listed}"
