"""Opens a model to read its weights: a run of this program, a model folder that was converted from Hugging Face, or a
Hugging Face folder.

A model folder holds weights without a run:

    OUT/config.json        `ModelEntry`: the shape, the end-of-document id, where the model is from
    OUT/weights/           files as in a checkpoint
    OUT/tokenizer.json ... the tokenizer's files, as in the Hugging Face folder
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_doremi.checkpoint.folder import checkpoint_at, newest_checkpoint, read_state
from megatron_doremi.checkpoint.run_config import RunConfigFile, read_run_config
from megatron_doremi.checkpoint.source import Weights
from megatron_doremi.checkpoint.weights import WeightsFolder
from megatron_doremi.config import GPTConfig
from megatron_doremi.errors import ConfigError, Fault, raise_if_any
from megatron_doremi.hugging_face.config_file import read_config, sliding_window
from megatron_doremi.hugging_face.model_config import (
    HUGGING_FACE,
    MODEL,
    MODEL_FORMAT,
    RUN,
    ModelEntry,
    kind_of_model,
    read_model_entry,
)
from megatron_doremi.hugging_face.weights import HuggingFaceWeights
from megatron_doremi.model.sizes import parameter_specs
from megatron_doremi.storage.files import read_json_object

WEIGHTS = "weights"
GENERATION = "generation_config.json"
# What belongs to a model beside its weights and config.json; copied as it is.
_COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    GENERATION,
)


@dataclass(frozen=True)
class OpenedModel:
    """A model whose weights can be read.

    Attributes:
        kind: RUN, MODEL or HUGGING_FACE.
        folder: as given, without @STEP.
        iteration: step of the checkpoint; 0 without a run.
        model_type: class of Transformers that the model comes from; "" for a run.
        eod: id of the end-of-document token, if config.json states it.
        sliding_window: see `ModelEntry`.
        run: config.json of the run.
        checksums: SHA-256 of each weights file, if the model's format records it: a run's does.
    """

    kind: str
    folder: Path
    gpt: GPTConfig
    weights: Weights
    iteration: int = 0
    model_type: str = ""
    eod: int | None = None
    sliding_window: int | None = None
    run: RunConfigFile | None = None
    checksums: Mapping[Path, str] = field(default_factory=dict)


def open_model(folder: Path, flag: str, step: int | None = None, seq_length: int = 0) -> OpenedModel:
    """Opens a model of any kind.

    Args:
        flag: the flag or argument that names the folder, for messages.
        step: of a run's checkpoint; None: the newest.
        seq_length: see `read_config`.

    Raises:
        ConfigError: the folder holds no model, or one that this program cannot express, or its config.json describes
            another model than its weights.
    """
    kind = kind_of_model(folder, flag)
    if step is not None and kind != RUN:
        rule, remedy = "a run of this program, which has checkpoints", "leave out @STEP"
        raise ConfigError(Fault(f"{flag} {folder}@{step}", "not a run", rule, remedy))
    if kind == HUGGING_FACE:
        architecture, gpt = read_config(folder, flag, seq_length)
        weights = HuggingFaceWeights(folder, architecture, gpt, flag)
        eod = end_of_text(folder, flag, gpt.vocab_size)
        window = sliding_window(folder, flag)
        return OpenedModel(
            kind, folder, gpt, weights, model_type=architecture.model_type, eod=eod, sliding_window=window
        )
    if kind == MODEL:
        entry = read_model_entry(folder, flag)
        raise_if_any(_window_faults(entry, seq_length, f"{flag} {folder}: config.json"))
        stored = WeightsFolder(folder / WEIGHTS)
        raise_if_any(_shape_faults(stored, entry.gpt.gpt(), f"{flag} {folder}: config.json"))
        window = entry.sliding_window
        return OpenedModel(
            kind, folder, entry.gpt.gpt(), stored, model_type=entry.model_type, eod=entry.eod, sliding_window=window
        )
    run = read_run_config(folder, flag)
    checkpoint = newest_checkpoint(folder) if step is None else checkpoint_at(folder, step, flag)
    if checkpoint is None:
        rule, remedy = "a run with a checkpoint", "train it first"
        raise ConfigError(Fault(f"{flag} {folder}", "no complete checkpoint", rule, remedy))
    state, gpt, stored = read_state(checkpoint), run.gpt.gpt(), WeightsFolder(checkpoint / WEIGHTS)
    subject = f"{flag} {folder}: config.json"
    trained = state.recorded_identity().get("gpt", {})
    stated = asdict(gpt)
    remedy = "restore config.json: the checkpoint records what was trained"
    faults = [
        Fault(subject, f"{name}: {stated[name]}", f"{value}, as in the checkpoint", remedy)
        for name, value in trained.items()
        if stated[name] != value
    ]
    raise_if_any(faults or _shape_faults(stored, gpt, subject))
    checksums = {checkpoint / name: value for name, value in state.checksums.items() if name.startswith(f"{WEIGHTS}/")}
    return OpenedModel(kind, folder, gpt, stored, state.iteration, run=run, checksums=checksums)


def _window_faults(entry: ModelEntry, seq_length: int, subject: str) -> list[Fault]:
    """A fault of a model that was converted from one with a sliding window, in windows that are longer."""
    if entry.sliding_window is None or entry.sliding_window >= seq_length:
        return []
    rule = f"a sliding window of at least --seq-length {seq_length}: this program's model attends to all tokens"
    remedy = f"give --seq-length {entry.sliding_window} or less"
    return [Fault(subject, f"sliding_window: {entry.sliding_window}", rule, remedy)]


def _shape_faults(weights: WeightsFolder, gpt: GPTConfig, subject: str) -> list[Fault]:
    """A fault of a config.json that describes other parameters than the weights files hold."""
    expected = {name: spec.shape for name, spec in parameter_specs(gpt).items()}
    stored = {name: weights.spec(name).shape for name in sorted(weights.names())}
    differing = [name for name in expected | stored if expected.get(name) != stored.get(name)]
    if not differing:
        return []
    name = differing[0]
    value = f"{name}: {list(expected[name]) if name in expected else 'missing'}"
    more = f", and {len(differing) - 1:,} more such parameters" if len(differing) > 1 else ""
    rule = f"{list(stored[name]) if name in stored else 'no such parameter'}, as in the weights{more}"
    return [Fault(subject, value, rule, "restore config.json, or convert or train the model again")]


def end_of_text(folder: Path, flag: str, vocab_size: int) -> int | None:
    """The end-of-text id in config.json of a Hugging Face folder, the first if it lists several; None if it has none.

    Args:
        flag: the flag or argument that names the folder, for messages.
    """
    given = read_json_object(folder / "config.json", f"{flag} {folder}: config.json").get("eos_token_id")
    eod = given[0] if isinstance(given, list) and given else given
    if isinstance(eod, int) and not isinstance(eod, bool) and 0 <= eod < vocab_size:
        return eod
    return None


def files_of(folder: Path) -> Path:
    """Where the weights files of a model folder or a Hugging Face folder are."""
    return folder / WEIGHTS if (folder / WEIGHTS).is_dir() else folder


def model_entry(opened: OpenedModel, source: dict[str, Any]) -> dict[str, Any]:
    """The content of config.json of a model folder."""
    return {
        "format": MODEL_FORMAT,
        "gpt": asdict(opened.gpt),
        "model_type": opened.model_type,
        "eod": opened.eod,
        "sliding_window": opened.sliding_window,
        "source": source,
    }


def copy_companions(source: Path, folder: Path) -> list[str]:
    """Copies the tokenizer's files and the like; returns their names."""
    names = [name for name in _COMPANIONS if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, folder / name)
    return names
