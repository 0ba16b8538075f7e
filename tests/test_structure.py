"""The architecture: imports point one way, pure files stay pure, files and functions stay readable.

Run alone: python -m pytest tests/test_structure.py
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "megatron_doremi"
# A package may use those before it and itself.
LAYERS = ["storage", "parallel", "data", "preprocessing", "model", "checkpoint", "mixture", "engine", "phases"]
PURE = [
    "config.py",
    "validation.py",
    "arguments.py",
    "parallel/topology.py",
    "data/blend.py",
    "data/permutation.py",
    "mixture/controller.py",
    "mixture/group_dro.py",
    "mixture/static.py",
    "mixture/statistics.py",
    "cluster/launch.py",
    "engine/optimizer.py",
]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_point_down(layer):
    above = LAYERS[LAYERS.index(layer) + 1 :]
    for path in (PACKAGE / layer).glob("*.py"):
        wrong = [name for name in imports(path) for a in above if name.startswith(f"megatron_doremi.{a}")]
        assert not wrong, f"{path} imports {wrong}"


@pytest.mark.parametrize("name", PURE)
def test_pure_files_know_no_process_group(name):
    wrong = [i for i in imports(PACKAGE / name) if i.startswith(("torch.distributed", "deepspeed"))]
    assert not wrong


def test_the_model_calls_no_process_group():
    for name in ("gpt.py", "pipeline.py"):
        assert not [i for i in imports(PACKAGE / "model" / name) if i.startswith("torch.distributed")]


def test_nothing_unpickles_or_evaluates():
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "tools").glob("*.py"), ROOT / "pretrain_doremi.py"]:
        assert not imports(path) & {"pickle", "subprocess", "dill"}, path
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        # By name only: module.eval() is torch's.
        assert not {call.id for call in calls if isinstance(call, ast.Name)} & {"eval", "exec", "__import__"}, path
        assert "system" not in {call.attr for call in calls if isinstance(call, ast.Attribute)}, path


def test_files_and_functions_stay_readable():
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "tools").glob("*.py"), ROOT / "pretrain_doremi.py"]:
        text = path.read_text()
        assert text.count("\n") <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno <= 80, f"{path}: {node.name}"


def test_text_is_ascii():
    sources = [*PACKAGE.rglob("*.py"), *(ROOT / "tools").glob("*.py"), *(ROOT / "examples").glob("*.sh")]
    for path in [*sources, ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]:
        path.read_text(encoding="ascii")
