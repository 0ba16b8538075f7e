"""Checks whether this Python environment satisfies a requirements file: exits with 0 if so, else prints each package
that differs and exits with 1.

    python tools/check_requirements.py requirements.txt

Uses only the standard library. Supports exact pins (name==version) and -r lines, which is all that our files contain.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def pins(path: Path) -> Iterator[tuple[str, str]]:
    """Yields the (name, version) pairs of a requirements file and of the files that it includes."""
    for line in path.read_text(encoding="utf-8").splitlines():
        requirement = line.split("#")[0].strip()
        if requirement.startswith("-r "):
            yield from pins(path.parent / requirement[3:].strip())
        elif requirement:
            name, _, pinned = requirement.partition("==")
            yield name, pinned


def mismatches(path: Path) -> list[str]:
    """Describes each pin of a requirements file that this environment does not satisfy."""
    messages = []
    for name, pinned in pins(path):
        try:
            # Ignore the local version, which identifies the build (2.13.0+cpu).
            installed = version(name).split("+")[0]
        except PackageNotFoundError:
            installed = "missing"
        if installed != pinned:
            messages.append(f"{name}=={pinned} (installed: {installed})")
    return messages


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        print("usage: python tools/check_requirements.py REQUIREMENTS_FILE", file=sys.stderr)
        sys.exit(0 if "--help" in sys.argv else 2)
    messages = mismatches(Path(sys.argv[1]))
    print("\n".join(messages))
    sys.exit(1 if messages else 0)
