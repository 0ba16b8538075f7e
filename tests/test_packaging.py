"""pyproject.toml: its ranges hold the pinned versions, and the commands that it installs exist.

Run alone: python -m pytest tests/test_packaging.py
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

from tools.check_requirements import mismatches, pinned, satisfies, supported  # noqa: E402


def test_the_pins_lie_in_the_supported_ranges():
    pins = dict(line.split("==") for line in pinned(ROOT / "requirements.txt"))
    ranges = {
        name: line[len(name) :] for line in supported() for name in pins if line.startswith((name + ">", name + "="))
    }
    assert ranges.keys() == pins.keys()
    assert [name for name, version in pins.items() if not satisfies(version, ranges[name])] == []
    assert mismatches(supported()) == []


@pytest.mark.parametrize(
    ("installed", "ranges", "expected"),
    [
        ("2.11.0+cu128", ">=2.11,<2.14", True),
        ("2.13.1", ">=2.11,<2.14", True),
        ("2.14.0", ">=2.11,<2.14", False),
        ("2.9.1", ">=2.11,<2.14", False),
        ("3", "<3.0", False),
        ("0.19.8", "==0.19.8", True),
        ("0.19.10", ">=0.19.4", True),
    ],
)
def test_versions_compare_as_numbers(installed, ranges, expected):
    assert satisfies(installed, ranges) is expected


def test_each_tool_is_a_command_and_each_room_is_packaged():
    tools = {path.stem for path in (ROOT / "tools").glob("*.py")} - {"__init__", "check_requirements"}
    commands = {
        f"doremi-{name.removeprefix('doremi_').replace('_', '-')}": f"megatron_doremi.tools.{name}:command"
        for name in tools
    }
    assert PROJECT["project"]["scripts"] == {"pretrain-doremi": "pretrain_doremi:command", **commands}
    for path in [ROOT / "pretrain_doremi.py", *(ROOT / "tools" / f"{name}.py" for name in tools)]:
        assert "\ndef command() -> None:" in path.read_text(), path
    files = (ROOT / "megatron_doremi").glob("*/**/__init__.py")
    rooms = {".".join(path.parent.relative_to(ROOT).parts) for path in files}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == {"megatron_doremi", "megatron_doremi.tools", *rooms}
