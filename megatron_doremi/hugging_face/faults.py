"""The fault of a value in config.json of a Hugging Face folder with which its class computes another function."""

from __future__ import annotations

from typing import Any

from megatron_doremi.errors import Fault

CONVERT_ANOTHER = (
    "convert another model, or use this one as it is where Transformers may run it: --phase score, --phase evaluate, "
    "--reference-load, tools/generate.py"
)


def not_ours(subject: str, name: str, value: Any, rule: str) -> Fault:
    """The fault of an entry that our model cannot express.

    Args:
        subject: the file, for messages.
        rule: the values that it can.
    """
    return Fault(subject, f"{name}: {value!r}", f"{rule}: this program's model has nothing else", CONVERT_ANOTHER)
