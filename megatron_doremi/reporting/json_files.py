"""JSON that a run left on disk, read for a report: bytes that are not UTF-8 are replaced, and nesting has a limit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_doremi.errors import ConfigError, Fault

MAX_DEPTH = 50


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Raises:
        ConfigError: it cannot be read, is not JSON, not an object, or nested deeper than MAX_DEPTH.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        raise _unreadable(path, error, remedy) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(Fault(str(path), str(error), "must be JSON", remedy)) from error
    if _depth(document) > MAX_DEPTH:
        raise ConfigError(Fault(str(path), "", f"must not be nested deeper than {MAX_DEPTH} levels", remedy))
    if not isinstance(document, dict):
        raise ConfigError(Fault(str(path), type(document).__name__, "must be a JSON object", remedy))
    return document


def read_lines(path: Path, remedy: str, missing_ok: bool = False) -> Iterator[tuple[int, Any, str | None]]:
    """Yields (line number, value, None) for each line that is JSON, (line number, None, error) for each other line.

    Blank lines are skipped.

    Args:
        missing_ok: a missing file has no lines.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield (number, *_parse(line))
    except OSError as error:
        if not (missing_ok and isinstance(error, FileNotFoundError)):
            raise _unreadable(path, error, remedy) from error


def _parse(line: str) -> tuple[Any, str | None]:
    try:
        return json.loads(line), None
    except (ValueError, RecursionError) as error:
        return None, str(error)


def _unreadable(path: Path, error: OSError, remedy: str) -> ConfigError:
    return ConfigError(Fault(str(path), error.strerror or "", "must be a readable file", remedy))


def _depth(document: Any) -> int:
    """Levels of nesting, without recursion."""
    level, depth = [document], 0
    while level:
        level = [
            child
            for value in level
            if isinstance(value, dict | list)
            for child in (value.values() if isinstance(value, dict) else value)
        ]
        depth += 1
    return depth
