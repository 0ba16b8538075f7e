"""The model that a run loads (a reference, a model to evaluate or to start from): found, and checked."""

from __future__ import annotations

import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megatron_doremi.checkpoint.folder import checkpoint_at, newest_checkpoint, read_state
from megatron_doremi.checkpoint.run_config import RunConfigFile, read_run_config
from megatron_doremi.checkpoint.weights import WeightsFolder
from megatron_doremi.config import Config
from megatron_doremi.data.manifest import Manifest
from megatron_doremi.errors import ConfigError, Fault, raise_if_any
from megatron_doremi.hugging_face.model_config import HUGGING_FACE, RUN, kind_of_model
from megatron_doremi.hugging_face.model_folder import WEIGHTS, files_of, open_model
from megatron_doremi.hugging_face.tokenizer_files import (
    load_folder_tokenizer,
    run_tokenizer,
    sample_texts,
    tokenizer_difference,
)
from megatron_doremi.hugging_face.transformers_config import why_not_ours
from megatron_doremi.hugging_face.transformers_model import read_transformers_shape
from megatron_doremi.layout_rules import misfits
from megatron_doremi.mixture.reference import TrainedModel
from megatron_doremi.phases.run_data import RunData
from megatron_doremi.settings import PROXY, without_unread
from megatron_doremi.shapes import Shape, TransformersShape
from megatron_doremi.tokenization.tokenizer import Tokenizer, dataset_tokenizer


def read_model(
    folder: Path,
    flag: str,
    data: RunData,
    config: Config,
    step: int | None,
    needs_all_steps: bool = False,
    same_domains: bool = True,
    forward_only: bool = False,
) -> TrainedModel:
    """Finds the model in `folder`, which `flag` names, and checks that it fits data and layout.

    Args:
        folder: of a run of this program, or a model folder, or a Hugging Face folder.
        step: of a run's checkpoint; None: the newest.
        needs_all_steps: a run must be finished, unless --allow-unfinished or the step is given.
        same_domains: a run must have trained on the data's domains.
        forward_only: the model is not trained, so that Transformers may run what our model cannot express.

    Raises:
        ConfigError: with all faults, including another tokenizer than the data's.
    """
    kind = kind_of_model(folder, flag)
    if kind == RUN:
        return _read_run(folder, flag, data, config, step, needs_all_steps, same_domains)
    length = config.data.seq_length
    reason = why_not_ours(folder, flag, length) if kind == HUGGING_FACE and forward_only and step is None else ""
    shape: Shape
    if reason:
        shape, weights = read_transformers_shape(folder, flag, reason), None
    else:
        opened = open_model(folder, flag, step, length)
        shape, weights = opened.gpt, opened.weights
    faults = _shape_faults(shape, f"{flag} {folder}", data, config)
    try:
        faults += _folder_tokenizer_faults(folder, flag, data.manifest)
    except ConfigError as error:
        faults += error.faults
    raise_if_any(faults)
    files = files_of(folder)
    return TrainedModel(shape, weights, folder, files, {}, folder / "config.json")


def _read_run(
    folder: Path,
    flag: str,
    data: RunData,
    config: Config,
    step: int | None,
    needs_all_steps: bool,
    same_domains: bool,
) -> TrainedModel:
    run_config = read_run_config(folder, flag)
    gpt = run_config.gpt.gpt()
    subject = f"{flag} {folder}"
    faults = _run_tokenizer_faults(run_config, subject, data.manifest)
    faults += _domain_faults(run_config, subject, data.manifest) if same_domains else []
    faults += _shape_faults(gpt, subject, data, config)
    checkpoint = newest_checkpoint(folder) if step is None else checkpoint_at(folder, step, flag)
    if checkpoint is None:
        rule = "a run that was trained to its end"
        raise ConfigError([*faults, Fault(subject, "no complete checkpoint", rule, "train it first")])
    state = read_state(checkpoint)
    # config.json can be edited; the checkpoint records what was trained.
    recorded = state.recorded_identity()
    stated = {"domains": run_config.domains, "tokenizer_sha256": run_config.tokenizer_sha256, **asdict(gpt)}
    trained: dict[str, Any] = {name: recorded[name] for name in ("domains", "tokenizer_sha256") if name in recorded}
    trained |= without_unread(recorded.get("gpt", {}))
    names = [name for name, value in trained.items() if stated[name] != value]
    if names:
        value = ", ".join(f"{name} {stated.get(name)!r}" for name in names)
        rule = "as in its checkpoint: " + ", ".join(f"{name} {trained[name]!r}" for name in names)
        faults.append(Fault(f"{subject}: config.json", value, rule, "restore config.json, or train it again"))
    planned = recorded.get("train_iters", run_config.train_iters())
    if needs_all_steps and step is None and state.iteration < planned and not config.run.allow_unfinished:
        value = f"{state.iteration:,} of its {planned:,} steps taken"
        remedy = f"finish it, or give --allow-unfinished, or {folder}@STEP, to use it as it is"
        faults.append(Fault(subject, value, "a finished run", remedy))
    raise_if_any(faults)
    files = checkpoint / WEIGHTS
    checksums = {name.split("/")[1]: value for name, value in state.checksums.items() if name.startswith(f"{WEIGHTS}/")}
    model = TrainedModel(gpt, WeightsFolder(files), checkpoint, files, checksums, checkpoint / "state.json")
    batch = recorded.get("global_batch_size", run_config.global_batch_size)
    return replace(model, iteration=state.iteration, global_batch_size=batch, phase=run_config.phase)


def _shape_faults(shape: Shape, subject: str, data: RunData, config: Config) -> list[Fault]:
    """Faults of a shape that does not fit the data or the layout."""
    faults, seq_length = [], config.data.seq_length
    layout = "choose another layout, or train another model"
    if isinstance(shape, TransformersShape):
        limit = shape.max_positions
        layout = "give sizes of 1"
        if config.data.phase == PROXY:
            layout += ", or score with sizes of 1 first (--phase score) and give the losses: --reference-losses DIR"
    else:
        limit = shape.max_positions if shape.position_embedding_type == "learned_absolute" else None
    if shape.vocab_size < data.vocab_size:
        rule, remedy = f"at least the data's {data.vocab_size:,} ids", "train the model on this data set"
        faults.append(Fault(subject, f"a vocabulary of {shape.vocab_size:,}", rule, remedy))
    if limit is not None and limit < seq_length:
        kind = "positions" if isinstance(shape, TransformersShape) else "learned positions"
        value, rule = f"{kind} up to {limit}", f"--seq-length {seq_length}"
        faults.append(Fault(subject, value, rule, "train the model with this --seq-length, or give a shorter one"))
    return faults + [
        Fault(subject, f"{name} {value}", rule, layout) for name, value, rule in misfits(shape, config.parallel)
    ]


def _domain_faults(run_config: RunConfigFile, subject: str, manifest: Manifest) -> list[Fault]:
    """A fault of a run that trained on other domains."""
    if run_config.domains == list(manifest.names):
        return []
    extra = [name for name in manifest.names if name not in run_config.domains]
    remedy = "train the model on this manifest"
    if extra and [name for name in manifest.names if name not in extra] == run_config.domains:
        remedy = f"give --exclude-domains {shlex.quote(','.join(extra))}, or {remedy}"
    rule = f"the manifest's, in its order: {', '.join(manifest.names)}"
    return [Fault(subject, f"domains {', '.join(run_config.domains)}", rule, remedy)]


def _run_tokenizer_faults(run_config: RunConfigFile, subject: str, manifest: Manifest) -> list[Fault]:
    """A fault of a run whose tokenizer gives other ids than the data's."""
    ours = manifest.tokenizer.sha256 if manifest.tokenizer else None
    if run_config.tokenizer_sha256 == ours:
        return []
    difference = _run_tokenizer_difference(run_config, manifest)
    if difference is None:
        return []
    rule = f"the manifest's tokenizer, {str(ours)[:12]}"
    remedy = "train the model on this data set: losses of other tokens cannot be compared"
    return [Fault(subject, f"tokenizer {str(run_config.tokenizer_sha256)[:12]}{difference}", rule, remedy)]


def _run_tokenizer_difference(run_config: RunConfigFile, manifest: Manifest) -> str | None:
    """How the tokenizer of a run differs from that of a manifest, for a message; None if only their files differ."""
    try:
        ours, (theirs, _) = dataset_tokenizer(manifest), run_tokenizer(run_config, None, remedy="")
    except ConfigError:
        return ""
    if ours is None:
        return ""
    difference = tokenizer_difference(ours, theirs, sample_texts(manifest, ours))
    return f": {difference}" if difference else None


def _folder_tokenizer_faults(folder: Path, flag: str, manifest: Manifest) -> list[Fault]:
    """Faults of a folder whose tokenizer gives other ids than the data's, whatever files both are in."""
    ours = dataset_tokenizer(manifest)
    rule = "the tokenizer of the data"
    if ours is None:
        remedy = "give a manifest (domains.json) that names the tokenizer"
        value = f"{manifest.path} names no tokenizer to compare with"
        return [Fault(f"{flag} {folder}", value, rule, remedy)]
    theirs: Tokenizer = load_folder_tokenizer(folder, flag, ours.eod)
    difference = tokenizer_difference(ours, theirs, sample_texts(manifest, ours))
    if not difference:
        return []
    remedy = "preprocess the data with this model's tokenizer: losses of other tokens cannot be compared"
    return [Fault(f"{flag} {folder}", f"another tokenizer: {difference}", rule, remedy)]
