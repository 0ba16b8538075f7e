"""Says whether this Python has what a requirements file pins: exit code 0 if so, else 1 with what is missing.

    python tools/check_requirements.py requirements.txt

Needs nothing but Python; knows exact pins (name==version) and -r lines, which is all that our files use.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def pins(path: Path) -> Iterator[tuple[str, str]]:
    """The (name, version) pairs of a requirements file and of those it includes."""
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = line.split("#")[0].strip()
        if entry.startswith("-r "):
            yield from pins(path.parent / entry[3:].strip())
        elif entry:
            name, _, wanted = entry.partition("==")
            yield name, wanted


def missing(path: Path) -> list[str]:
    """What this Python lacks, as text."""
    result = []
    for name, wanted in pins(path):
        try:
            # A local part names the build (2.13.0+cpu) and does not count.
            found = version(name).split("+")[0]
        except PackageNotFoundError:
            found = "missing"
        if found != wanted:
            result.append(f"{name}=={wanted} (found: {found})")
    return result


if __name__ == "__main__":
    lacking = missing(Path(sys.argv[1]))
    print("\n".join(lacking))
    sys.exit(1 if lacking else 0)
