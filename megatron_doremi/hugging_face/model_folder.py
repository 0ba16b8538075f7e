"""Opens a model to read its weights: a run of this program, a model folder that was converted from Hugging Face, or a
Hugging Face folder.

A model folder holds weights without a run:

    OUT/config.json        `ModelEntry`: the shape, the end-of-document id, where the model is from
    OUT/weights/           files as in a checkpoint
    OUT/tokenizer.json ... the tokenizer's files, as in the Hugging Face folder
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_doremi.checkpoint.folder import checkpoint_at, newest_checkpoint, read_state
from megatron_doremi.checkpoint.run_config import RunConfigFile, read_run_config
from megatron_doremi.checkpoint.source import Weights
from megatron_doremi.checkpoint.weights import WeightsFolder
from megatron_doremi.config import GPTConfig
from megatron_doremi.errors import ConfigError, Fault
from megatron_doremi.hugging_face.config_file import read_config
from megatron_doremi.hugging_face.model_config import (
    HUGGING_FACE,
    MODEL,
    MODEL_FORMAT,
    RUN,
    kind_of_model,
    read_model_entry,
)
from megatron_doremi.hugging_face.weights import HuggingFaceWeights
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
        run: config.json of the run.
    """

    kind: str
    folder: Path
    gpt: GPTConfig
    weights: Weights
    iteration: int = 0
    model_type: str = ""
    eod: int | None = None
    run: RunConfigFile | None = None


def open_model(folder: Path, flag: str, step: int | None = None) -> OpenedModel:
    """Opens a model of any kind.

    Args:
        flag: the flag or argument that names the folder, for messages.
        step: of a run's checkpoint; None: the newest.

    Raises:
        ConfigError: the folder holds no model, or one that this program cannot express.
    """
    kind = kind_of_model(folder, flag)
    if step is not None and kind != RUN:
        rule, remedy = "a run of this program, which has checkpoints", "leave out @STEP"
        raise ConfigError(Fault(f"{flag} {folder}@{step}", "not a run", rule, remedy))
    if kind == HUGGING_FACE:
        architecture, gpt = read_config(folder, flag)
        weights = HuggingFaceWeights(folder, architecture, gpt, flag)
        eod = _eod(read_json_object(folder / "config.json", f"{flag} {folder}: config.json"), gpt.vocab_size)
        return OpenedModel(kind, folder, gpt, weights, model_type=architecture.model_type, eod=eod)
    if kind == MODEL:
        entry = read_model_entry(folder, flag)
        stored = WeightsFolder(folder / WEIGHTS)
        return OpenedModel(kind, folder, entry.gpt.gpt(), stored, model_type=entry.model_type, eod=entry.eod)
    run = read_run_config(folder, flag)
    checkpoint = newest_checkpoint(folder) if step is None else checkpoint_at(folder, step, flag)
    if checkpoint is None:
        rule, remedy = "a run with a checkpoint", "train it first"
        raise ConfigError(Fault(f"{flag} {folder}", "no complete checkpoint", rule, remedy))
    iteration = read_state(checkpoint).iteration
    return OpenedModel(kind, folder, run.gpt.gpt(), WeightsFolder(checkpoint / WEIGHTS), iteration, run=run)


def _eod(entry: dict[str, Any], vocab_size: int) -> int | None:
    """The end-of-text id in config.json of a Hugging Face folder, the first if it lists several."""
    given = entry.get("eos_token_id")
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
        "source": source,
    }


def copy_companions(source: Path, folder: Path) -> list[str]:
    """Copies the tokenizer's files and the like; returns their names."""
    names = [name for name in _COMPANIONS if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, folder / name)
    return names
