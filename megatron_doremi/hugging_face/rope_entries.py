"""What config.json of a Hugging Face folder says about rope, wherever versions of Transformers write it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_doremi.errors import Fault
from megatron_doremi.hugging_face.architectures import Architecture
from megatron_doremi.hugging_face.faults import not_ours

_DEFAULT_BASE = 10000.0
_TOO_LARGE = 10**300
# Top-level entries of the base and of the share of a head's channels that rotate; a class reads one of each.
_BASES, _SHARES = ("rope_theta", "rotary_emb_base"), ("partial_rotary_factor", "rotary_pct")


def rotary_base(architecture: Architecture, entry: Mapping[str, Any], subject: str) -> tuple[Any, list[Fault]]:
    """The base of the rotary frequencies, and faults of entries with which rope is another function than ours.

    Version 5 of Transformers reads `rope_scaling`, or else `rope_parameters`, and the class's own top-level entries
    for what is not in it; earlier versions read the top-level entries. Entries that contradict each other are a fault.

    Args:
        entry: the content of config.json.
        subject: the file, for messages.
    """
    faults, objects = [], dict[str, Mapping[str, Any]]()
    for name in ("rope_scaling", "rope_parameters"):
        nested = entry.get(name) or {}
        if not isinstance(nested, Mapping) or any(isinstance(value, Mapping) for value in nested.values()):
            return None, [not_ours(subject, name, nested, "an object with the same values for all layers")]
        objects[name] = nested
        kind = nested.get("rope_type", nested.get("type", "default"))
        if kind != "default":
            faults.append(not_ours(subject, name, dict(nested), "rope_type 'default'"))
    read = objects["rope_scaling"] or objects["rope_parameters"]
    own_base, own_share = architecture.rope_names
    theta = read.get("rope_theta", entry.get(own_base, _DEFAULT_BASE))
    share = read.get("partial_rotary_factor")
    share = entry.get(own_share, architecture.rope_share) if share is None else share
    stated = {f"{name}.rope_theta": nested.get("rope_theta") for name, nested in objects.items()}
    stated |= {name: entry.get(name) for name in _BASES}
    for name, value in stated.items():
        if value is not None and value != theta:
            rule = f"{theta!r}, which the class reads: one base of the rotary frequencies"
            faults.append(not_ours(subject, name, value, rule))
    shares = [share, *(nested.get("partial_rotary_factor") for nested in objects.values()), *map(entry.get, _SHARES)]
    others = [value for value in shares if value is not None and value != 1.0]
    if others:
        faults.append(not_ours(subject, "partial_rotary_factor", others[0], "1: all channels of a head rotate"))
    # An integer that no float holds stays one, for the schema to refuse.
    is_small = isinstance(theta, int) and not isinstance(theta, bool) and abs(theta) < _TOO_LARGE
    return float(theta) if is_small else theta, faults
