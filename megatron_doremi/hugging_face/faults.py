"""Faults of config.json of a Hugging Face folder: values with which its class computes another function than ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_doremi.errors import Fault

CONVERT_ANOTHER = (
    "convert another model, or use this one as it is where Transformers may run it: --phase score, --phase evaluate, "
    "--reference-load, tools/generate.py"
)


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
