"""The version of this program and of what its results depend on."""

from __future__ import annotations

import contextlib
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from megatron_doremi import __version__


def version_text() -> str:
    """One line: this version, its commit if this is a checkout, and the versions of Python, PyTorch and DeepSpeed."""
    numbers = versions()
    parts = [f"Megatron-DoReMi {__version__}" + (f" (commit {numbers['commit'][:12]})" if "commit" in numbers else "")]
    parts.append(f"Python {numbers['python']}")
    parts += [f"{name} {numbers.get(name, 'is missing')}" for name in ("torch", "deepspeed")]
    return ", ".join(parts)


def versions() -> dict[str, str]:
    """The versions of Python, PyTorch, DeepSpeed and NumPy, and the commit of this program, where it is a checkout.

    Files of a checkout may have been edited since its commit.
    """
    numbers = {"python": platform.python_version()}
    for name in ("torch", "deepspeed", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            numbers[name] = version(name)
    commit = checked_out_commit(Path(__file__).resolve().parents[1])
    return numbers | ({"commit": commit} if commit else {})


def checked_out_commit(root: Path) -> str:
    """The commit of a Git checkout, in hex; "" if `root` is none. Reads Git's files: no program is started."""
    with contextlib.suppress(OSError, ValueError):
        git = root / ".git"
        if git.is_file():
            # A worktree.
            git = root / git.read_text().removeprefix("gitdir: ").strip()
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        name = head.removeprefix("ref: ")
        common = git / (git / "commondir").read_text().strip() if (git / "commondir").exists() else git
        if (common / name).exists():
            return (common / name).read_text().strip()
        for line in (common / "packed-refs").read_text().splitlines():
            if line.endswith(f" {name}"):
                return line.split()[0]
    return ""
