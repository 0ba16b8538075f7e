"""The architecture: imports point one way, pure files stay pure, files and functions stay readable.

Run alone: python -m pytest tests/test_structure.py
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "megatron_doremi"
# The rooms, bottom up: each may use those before it and itself. `base` is the package's top level but for plan.py.
ROOMS = [
    "base",
    "storage",
    "parallel",
    "data",
    "tokenization",
    "plan",
    "model",
    "cluster",
    "checkpoint",
    "hugging_face",
    "mixture",
    "engine",
    "planning",
    "phases",
]
# Beside the run: what no room above uses, and what they and the programs may use.
BESIDE = {
    "preprocessing": ["base", "storage", "data", "tokenization"],
    "reporting": ["base", "storage", "data"],
    "rounds": ["base", "storage", "data", "reporting"],
}
TOOLS = ["base", "storage", "data", "tokenization", "cluster", "checkpoint", "hugging_face", "mixture", *BESIDE]
PURE = [
    "settings.py",
    "student_t.py",
    "shapes.py",
    "config.py",
    "run_settings.py",
    "optimizer_settings.py",
    "planning_settings.py",
    "devices.py",
    "layout_rules.py",
    "validation.py",
    "arguments.py",
    "plan.py",
    "parallel/topology.py",
    "data/blend.py",
    "data/document_spans.py",
    "data/permutation.py",
    "model/positions.py",
    "mixture/controller.py",
    "mixture/early_stop.py",
    "mixture/group_dro.py",
    "mixture/static.py",
    "mixture/statistics.py",
    "cluster/launch.py",
    "engine/optimizer.py",
    "phases/bootstrap.py",
    "rounds/stages.py",
    "rounds/stop_rule.py",
    "phases/held_out.py",
]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room_of(module: str) -> str:
    """The room of a module of the package, by its dotted name."""
    parts = module.split(".")
    if len(parts) > 1 and (PACKAGE / parts[1]).is_dir():
        return parts[1]
    return "plan" if parts[1:2] == ["plan"] else "base"


def used_rooms(path: Path) -> set[str]:
    return {room_of(name) for name in imports(path) if name.split(".")[0] == "megatron_doremi"}


def test_every_package_is_a_room():
    packages = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert packages == {*ROOMS, *BESIDE} - {"base", "plan"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    if path == PACKAGE / "__init__.py":
        return  # exports names of the rooms, imported when they are first used
    room = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    allowed = BESIDE[room] if room in BESIDE else ROOMS[: ROOMS.index(room)]
    assert used_rooms(path) <= {room, *allowed}


@pytest.mark.parametrize("path", sorted((ROOT / "tools").glob("*.py")), ids=lambda path: path.name)
def test_tools_use_their_rooms(path):
    assert used_rooms(path) <= set(TOOLS)


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
    sources += [*PACKAGE.rglob("*.css"), *PACKAGE.rglob("*.js")]
    for path in [*sources, ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]:
        path.read_text(encoding="ascii")


def test_the_exported_names_exist_and_importing_the_package_loads_no_torch():
    code = (
        "import sys, megatron_doremi; assert 'torch' not in sys.modules; "
        "assert all(hasattr(megatron_doremi, name) for name in megatron_doremi.__all__); "
        "assert set(megatron_doremi.__all__) <= set(dir(megatron_doremi))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_test_files_have_different_names():
    """pytest imports them by name alone, and the whole suite would not start."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))
