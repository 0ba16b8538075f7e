"""Text in JSON lines, plain or compressed: the lines of many files, and what is wrong with one of them."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from megatron_doremi.errors import ConfigError, Fault

SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz")


class BadLine(ValueError):
    """A line that holds no document; says why."""


@dataclass(frozen=True)
class Line:
    """A line of an input file.

    Attributes:
        data: its bytes; None where the file broke off and the line could not be read.
        file: path as given.
        number: from 1 on.
        position: bytes of the file (as it lies on disk) read so far, for progress.
    """

    data: bytes | None
    file: str
    number: int
    position: int


def check_inputs(paths: list[Path]) -> list[Fault]:
    """Faults of input files: missing ones, and kinds that are not read."""
    faults = []
    for path in paths:
        if not path.is_file():
            faults.append(Fault("--input", str(path), "an existing file", "check the path"))
        elif not path.name.endswith(SUFFIXES):
            rule = "one of " + ", ".join("*" + suffix for suffix in SUFFIXES)
            if path.suffix == ".parquet":
                rule += "; this version does not read Parquet"
            faults.append(Fault("--input", str(path), rule, "convert the file to JSON lines"))
    return faults


def read_lines(path: Path) -> Iterator[Line]:
    """The lines of a file that are not blank; a compressed file that breaks off ends with a line without data."""
    number = 0
    with path.open("rb") as raw:
        stream = _decompressed(raw, path)
        while True:
            number += 1
            try:
                data = stream.readline()
            except (EOFError, OSError, zlib.error, zstandard.ZstdError):
                yield Line(None, str(path), number, raw.tell())
                return
            if not data:
                return
            if data.strip():
                yield Line(data, str(path), number, raw.tell())


class _WholeFrames(io.RawIOBase):
    """A .zst stream that complains where it breaks off inside a frame, which zstandard's reader does not."""

    def __init__(self, raw: BinaryIO):
        self._raw = raw
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._fresh = True
        self._left = b""
        self._out = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._out:
            data = self._left or self._raw.read(1 << 18)
            if not data:
                if not self._fresh:
                    raise EOFError("the file breaks off")
                return 0
            self._out = memoryview(self._frame.decompress(data))
            self._fresh, self._left = False, b""
            if self._frame.eof:
                self._left = self._frame.unused_data
                self._frame = zstandard.ZstdDecompressor().decompressobj()
                self._fresh = True
        count = min(len(buffer), len(self._out))
        buffer[:count] = self._out[:count]
        self._out = self._out[count:]
        return count


def _decompressed(raw: BinaryIO, path: Path) -> Any:
    if path.name.endswith(".zst"):
        return io.BufferedReader(_WholeFrames(raw), 1 << 20)
    if path.name.endswith(".gz"):
        # Has a buffer of its own; a second one around it would lose the lines before the place where a file breaks off.
        return gzip.GzipFile(fileobj=raw)
    return raw


def parse_document(data: bytes, text_key: str, domain_key: str) -> tuple[str, str]:
    """The text and the domain of a line.

    Args:
        text_key, domain_key: names in the line's object; dots lead into nested objects ("meta.pile_set_name").

    Raises:
        BadLine: the line is not UTF-8, no JSON object, or lacks one of the two as text.
    """
    try:
        entry = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadLine("not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise BadLine("not JSON") from error
    return _text_at(entry, text_key), _text_at(entry, domain_key)


def _text_at(entry: Any, key: str) -> str:
    for part in key.split("."):
        if not isinstance(entry, dict) or part not in entry:
            raise BadLine(f"no key {key!r}")
        entry = entry[part]
    if not isinstance(entry, str):
        raise BadLine(f"{key!r} is no text")
    try:
        entry.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadLine(f"{key!r} holds half a surrogate pair") from error
    return entry


def bad_lines_error(bad: list[str], total: int) -> ConfigError:
    """The error of inputs with bad lines.

    Args:
        bad: descriptions of the first of them.
        total: how many there were.
    """
    more = "" if total == len(bad) else f", and {total - len(bad):,} more"
    return ConfigError(
        Fault(
            "--input",
            f"{total:,} bad lines: " + "; ".join(bad) + more,
            "lines that each hold a document",
            "mend the input, or give --on-error skip to leave them out",
        )
    )
