"""What kind of model a folder holds, and checks of its config.json, without torch: mistakes show at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, model_validator

from megatron_doremi.checkpoint.run_config import GPTEntry, read_run_config
from megatron_doremi.errors import ConfigError, Fault
from megatron_doremi.hugging_face.architectures import ARCHITECTURES
from megatron_doremi.hugging_face.config_file import is_hugging_face, read_config
from megatron_doremi.hugging_face.transformers_config import check_transformers, why_not_ours
from megatron_doremi.storage.files import read_json_object
from megatron_doremi.storage.formats import Count, Name, Schema, check_entry

MODEL_FORMAT = "megatron-doremi-model/1"
# What a folder holds: a run of this program, weights in its format, or a Hugging Face model.
RUN, MODEL, HUGGING_FACE = "run", "model", "hf"


class ModelEntry(Schema):
    """config.json of a model folder."""

    FORMAT: ClassVar[str] = MODEL_FORMAT
    gpt: GPTEntry
    # Class of Transformers from which the model was converted, and to which it is converted back.
    model_type: Name
    eod: Count | None = None
    # Tokens that attention covers in that class; our model covers all, so that it is the same in windows of at most so
    # many tokens. None: all.
    sliding_window: Count | None = None
    source: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _eod_in_vocabulary(self) -> ModelEntry:
        if self.eod is not None and self.eod >= self.gpt.vocab_size:
            raise ValueError(f"eod {self.eod} must be less than vocab_size {self.gpt.vocab_size}")
        return self


def kind_of_model(folder: Path, flag: str) -> str:
    """What a folder holds: RUN, MODEL or HUGGING_FACE. Raises ConfigError, naming `flag`, if it has no config.json."""
    if not folder.is_dir():
        rule, remedy = "the folder of a run or of a Hugging Face model", "correct the path, or train the run first"
        raise ConfigError(Fault(f"{flag} {folder}", "no such folder", rule, remedy))
    remedy = "give the --save folder of a run, or a Hugging Face folder"
    entry = read_json_object(folder / "config.json", f"{flag} {folder}: config.json", remedy)
    if str(entry.get("format", "")).startswith(MODEL_FORMAT.split("/")[0] + "/"):
        return MODEL
    return HUGGING_FACE if is_hugging_face(entry) else RUN


def read_model_entry(folder: Path, flag: str) -> ModelEntry:
    """Reads config.json of a model folder. Raises ConfigError with every fault."""
    subject, remedy = f"{flag} {folder}: config.json", "convert the model again"
    entry = check_entry(read_json_object(folder / "config.json", subject, remedy), subject, ModelEntry, remedy)
    if entry.model_type not in ARCHITECTURES:
        rule = f"one of {', '.join(ARCHITECTURES)}"
        raise ConfigError(Fault(subject, f"model_type: {entry.model_type!r}", rule, remedy))
    return entry


def check_model_config(folder: Path, flag: str, forward_only: bool = False) -> None:
    """Raises ConfigError, with the faults of its config.json, if a folder holds no model that this program can load.

    Args:
        forward_only: the model is not trained, so that Transformers may run what our model cannot express.
    """
    kind = kind_of_model(folder, flag)
    if kind == HUGGING_FACE and forward_only:
        reason = why_not_ours(folder, flag)
        if reason:
            check_transformers(folder, flag, reason)
        return
    if kind == HUGGING_FACE:
        read_config(folder, flag)
    elif kind == MODEL:
        read_model_entry(folder, flag)
    else:
        read_run_config(folder, flag)
