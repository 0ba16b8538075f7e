"""Files from elsewhere that hold one YAML mapping, read without building any Python object from their tags.

Only the tree of nodes is taken from PyYAML's safe loader. Keys are text as it is written, and plain scalars are numbers
where Python reads them as numbers. The resolution of YAML 1.1 would make `no: 0.1` (Norwegian) the key False, and
`1e-06` a text; and PyYAML keeps the last of two equal keys silently.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from megatron_doremi.errors import ConfigError, Fault
from megatron_doremi.storage.files import read_text_file, unreadable

_PLAIN_TAG = "tag:yaml.org,2002:"


def read_yaml_mapping(path: Path, subject: str, remedy: str = "give such a file") -> dict[str, Any]:
    """Reads a file that holds one YAML mapping, as dictionaries, lists, numbers and text.

    Args:
        subject: the file's name in messages, such as "--domain-weights mix.yaml".
        remedy: what the user should do if the file cannot be read.

    Raises:
        ConfigError: the file cannot be read, is not YAML, is not a mapping, has a duplicate key, a tag of its own, an
            anchor that is used again (whose expansion may be huge), or more than one document.
    """
    try:
        node = yaml.compose(read_text_file(path), Loader=yaml.SafeLoader)
        if not isinstance(node, yaml.MappingNode):
            raise ValueError("no YAML mapping")
        content = _value(node, set())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        value, remedy = unreadable(path, error, remedy)
        rule = "a readable file that holds one YAML mapping"
        raise ConfigError(Fault(subject, " ".join(value.split()), rule, remedy)) from error
    assert isinstance(content, dict)
    return content


def number_or_text(text: str) -> float | str:
    """A number as Python's float reads it, without underscores; else the text."""
    try:
        return text if "_" in text else float(text)
    except ValueError:
        return text


def _value(node: yaml.Node, seen: set[int]) -> Any:
    line = f"line {node.start_mark.line + 1}"
    if id(node) in seen:
        raise ValueError(f"an anchor that is used again, defined in {line}")
    seen.add(id(node))
    if not node.tag.startswith(_PLAIN_TAG) or node.tag.startswith(_PLAIN_TAG + "python"):
        raise ValueError(f"{line}: the tag {node.tag}")
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for key, value in node.value:
            line = f"line {key.start_mark.line + 1}"
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"{line}: a key that is no text")
            if key.value in mapping:
                raise ValueError(f"{line}: duplicate key {key.value!r}")
            mapping[key.value] = _value(value, seen)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, seen) for item in node.value]
    return number_or_text(node.value) if node.style is None else node.value
