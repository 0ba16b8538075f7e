"""Checks without torch of a Hugging Face folder that Transformers runs, because our model cannot express it.

Transformers is optional. Code in a folder (auto_map) and pickled weights are never run.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from megatron_doremi.errors import ConfigError, Fault, raise_if_any
from megatron_doremi.hugging_face.config_file import NotExpressible, read_config
from megatron_doremi.storage.files import read_json_object

# The versions that pyproject.toml's extra `hf` allows: the first, and the first that is too new.
_OLDEST, _TOO_NEW = (5, 24), (6,)
_RULE = "a model that this program's GPT can express, or Transformers, which then runs it"
_INSTALL = "pip install 'transformers>=5.24,<6' (the extra `hf` of megatron-doremi)"


def why_not_ours(folder: Path, flag: str, seq_length: int = 0) -> str:
    """What of a Hugging Face folder's config.json our model cannot express; "" if it can express all of it.

    Args:
        flag: the flag or argument that names the folder, for messages.
        seq_length: see `read_config`.

    Raises:
        ConfigError: config.json is missing or malformed.
    """
    try:
        read_config(folder, flag, seq_length)
    except NotExpressible as error:
        return "; ".join(fault.value for fault in error.faults)
    return ""


def installed_version() -> str:
    """The version of Transformers; "" if it is not installed."""
    try:
        return version("transformers")
    except PackageNotFoundError:
        return ""


def check_transformers(folder: Path, flag: str, reason: str) -> None:
    """Checks that Transformers is there and may run a folder.

    Args:
        reason: see `why_not_ours`.

    Raises:
        ConfigError: with all faults.
    """
    subject, installed = f"{flag} {folder}: config.json", installed_version()
    entry = read_json_object(folder / "config.json", subject)
    faults = []
    if not installed:
        faults.append(Fault(subject, f"{reason}; Transformers is not installed", _RULE, _INSTALL))
    elif not _OLDEST <= tuple(map(int, installed.split(".")[:2])) < _TOO_NEW:
        faults.append(Fault(subject, f"{reason}; Transformers {installed} is installed", _RULE, _INSTALL))
    if entry.get("quantization_config") is not None:
        rule, remedy = "weights in float32, bfloat16 or float16", "give the model that was not quantized"
        faults.append(Fault(subject, "quantization_config", rule, remedy))
    if entry.get("is_encoder_decoder"):
        remedy = "give a model of a decoder alone"
        faults.append(Fault(subject, "is_encoder_decoder: True", "a causal language model", remedy))
    raise_if_any(faults)


def cannot_import(folder: Path, flag: str, reason: str, error: ImportError) -> ConfigError:
    """The error of a Transformers that is installed and cannot be imported; the arguments of `check_transformers`."""
    text = " ".join(str(error).split())
    value = f"{reason}; Transformers {installed_version()} cannot be imported: {text}"
    return ConfigError(Fault(f"{flag} {folder}: config.json", value, _RULE, _INSTALL))


def unknown_class(folder: Path, flag: str, model_type: object) -> ConfigError:
    """The error of a class that Transformers does not have as a causal language model."""
    subject = f"{flag} {folder}: config.json"
    own_code = bool(read_json_object(folder / "config.json", subject).get("auto_map"))
    value = f"model_type: {model_type!r}" + (", with code of its own (auto_map)" if own_code else "")
    rule = f"a causal language model of Transformers {installed_version()}; code in a folder is never run"
    return ConfigError(Fault(subject, value, rule, "give a model of such a class, or install a newer Transformers"))
