"""Faults of config.json of a Hugging Face folder: values with which its class computes another function than ours."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_doremi.errors import Fault
from megatron_doremi.settings import MAX_LAYERS

CONVERT_ANOTHER = (
    "convert another model, or use this one as it is where Transformers may run it: --phase score, --phase evaluate, "
    "--reference-load, tools/generate.py"
)

# Entries of a config.json, wherever it has them, for which Transformers builds as many modules, and rotary bases.
_COUNTS = {"num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_experts", "num_local_experts"}
_COUNTS |= {"n_routed_experts", "moe_num_experts"}
_BASES = {"rope_theta", "rotary_emb_base", "rope_local_base_freq", "global_rope_theta", "local_rope_theta"}


def number_faults(entry: Mapping[str, Any], subject: str) -> list[Fault]:
    """Faults of numbers in a config.json with which no class computes anything: NaN, Inf, a rotary base of 0 or less,
    and numbers of layers or experts that nobody could build.

    Args:
        entry: the content of config.json.
        subject: the file, for messages.
    """
    remedy = "download the folder again, or correct the entry"
    faults = []
    for name, value, in_list in _numbers(entry):
        key = name.rpartition(".")[2]
        # Lists may hold ranges without an end, such as Mamba2's time_step_limit.
        if isinstance(value, float) and (math.isnan(value) or (math.isinf(value) and not in_list)):
            faults.append(Fault(subject, f"{name}: {value}", "a finite number", remedy))
        elif key in _BASES and value <= 0:
            faults.append(Fault(subject, f"{name}: {value}", "a base above 0", remedy))
        elif key in _COUNTS and value > MAX_LAYERS:
            faults.append(Fault(subject, f"{name}: {value:,}", f"at most {MAX_LAYERS:,}", remedy))
    return faults


def _numbers(value: Any, name: str = "", in_list: bool = False) -> Iterator[tuple[str, int | float, bool]]:
    """(name, number, whether it is in a list) of all numbers in a JSON value."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _numbers(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for part in value:
            yield from _numbers(part, name, in_list=True)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value, in_list


def own_class(entry: Mapping[str, Any], class_name: str) -> str:
    """The class whose code is in a folder (auto_map), if it is another than `class_name`, which would run in its place;
    else "".

    Args:
        entry: the content of config.json.
    """
    code = entry.get("auto_map")
    given = code.get("AutoModelForCausalLM") if isinstance(code, Mapping) else None
    # modeling_name.ClassName, also behind the name of a repository: owner/name--modeling_name.ClassName.
    name = given.rpartition(".")[2] if isinstance(given, str) else ""
    # Case aside: MPTForCausalLM became MptForCausalLM.
    return "" if name.casefold() == class_name.casefold() else name


def not_ours(subject: str, name: str, value: Any, rule: str) -> Fault:
    """The fault of an entry that our model cannot express.

    Args:
        subject: the file, for messages.
        rule: the values that it can.
    """
    return Fault(subject, f"{name}: {value!r}", f"{rule}: this program's model has nothing else", CONVERT_ANOTHER)
