"""Checks whether this Python environment can run the program: exits with 0 if so, else prints each package that is
missing or of an unsupported version, and exits with 1.

    python tools/check_requirements.py                         # the supported ranges, from pyproject.toml
    python tools/check_requirements.py requirements-dev.txt    # and the exact versions of a file, without its -r lines

Uses only the standard library, since it runs before anything is installed.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)\s*(.*)")
_COMPARISON = re.compile(r"(>=|==|<)\s*([0-9.]+)")


def supported() -> list[str]:
    """Returns the dependencies of pyproject.toml, such as 'numpy>=2.1,<3'."""
    return list(tomllib.loads(_PROJECT.read_text(encoding="utf-8"))["project"]["dependencies"])


def pinned(path: Path) -> Iterator[str]:
    """Yields the requirements of a file, such as 'lm_eval==0.4.13', and of the files that it includes, but for those of
    requirements.txt, which pyproject.toml gives as ranges."""
    for line in path.read_text(encoding="utf-8").splitlines():
        requirement = line.split("#")[0].strip()
        included = requirement.removeprefix("-r ").strip()
        if requirement.startswith("-r ") and included != "requirements.txt":
            yield from pinned(path.with_name(included))
        if requirement and not requirement.startswith("-"):
            yield requirement


def numbers(version_text: str) -> tuple[int, ...]:
    """Returns the release of a version as numbers: 2.13.0+cpu is (2, 13), as is 2.13.0rc1. Trailing zeros are equal."""
    release = re.match(r"[0-9.]*", version_text)
    parts = [int(part) for part in (release.group() if release else "").split(".") if part]
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts)


def satisfies(installed: str, ranges: str) -> bool:
    """Returns whether a version lies in ranges such as '>=2.11,<2.14' or '==2.13.0'."""
    compare = {
        ">=": lambda a, b: a >= b,
        "==": lambda a, b: a == b,
        "<": lambda a, b: a < b,
    }
    comparisons = _COMPARISON.findall(ranges)
    return all(compare[sign](numbers(installed), numbers(bound)) for sign, bound in comparisons)


def mismatches(requirements: Iterator[str] | list[str]) -> list[str]:
    """Describes each requirement that this environment does not satisfy."""
    messages = []
    for requirement in requirements:
        match = _REQUIREMENT.fullmatch(requirement)
        assert match is not None, requirement
        name, ranges = match.groups()
        try:
            installed = version(name)
        except PackageNotFoundError:
            messages.append(f"{requirement} (missing)")
            continue
        if not satisfies(installed, ranges):
            messages.append(f"{requirement} (installed: {installed})")
    return messages


if __name__ == "__main__":
    if len(sys.argv) > 2 or any(not Path(name).is_file() for name in sys.argv[1:]):
        print("usage: python tools/check_requirements.py [REQUIREMENTS_FILE]", file=sys.stderr)
        sys.exit(0 if "--help" in sys.argv else 2)
    messages = mismatches([*supported(), *(line for name in sys.argv[1:] for line in pinned(Path(name)))])
    print("\n".join(messages))
    sys.exit(1 if messages else 0)
