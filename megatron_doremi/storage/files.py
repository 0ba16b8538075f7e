"""Writing files so that nothing half-written ever stands under a final name."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_doremi.errors import ConfigError, Fault

_HASH_BLOCK = 1 << 22


def atomic_write_text(path: Path, text: str) -> None:
    """Writes a text file as UTF-8; see `atomic_write_bytes`."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_bytes(path: Path, data: bytes, still: Callable[[], bool] = lambda: True) -> bool:
    """Writes a file under a temporary name, makes it durable and renames it.

    Args:
        still: asked before the rename; False: the file is given up.

    Returns:
        whether the file was renamed.
    """
    temporary = temporary_beside(path)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if permitted := still():
            temporary.replace(path)
        return permitted
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


class AppendFile:
    """A file that only grows, record by record, each written in full or not at all."""

    def __init__(self, path: Path):
        """Opens the file, or makes it; a link is followed."""
        self.descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def size(self) -> int:
        """Bytes in the file."""
        return os.fstat(self.descriptor).st_size

    def read(self, start: int, end: int) -> bytes:
        """The bytes from `start` to `end`, fewer where the file is shorter."""
        return os.pread(self.descriptor, end - start, start) if end > start else b""

    def append(self, record: bytes) -> None:
        """Writes a record. Raises OSError where that fails, after the part that was written is taken back."""
        size, written = self.size(), 0
        try:
            while written < len(record):
                written += os.write(self.descriptor, record[written:])
        except OSError:
            if written:
                self.truncate(size)
            raise

    def truncate(self, size: int) -> None:
        """Drops what lies past `size` bytes."""
        os.ftruncate(self.descriptor, size)

    def make_durable(self) -> None:
        """Waits until what was written is on the disk."""
        os.fsync(self.descriptor)

    def close(self) -> None:
        """Closes the file."""
        os.close(self.descriptor)


def temporary_beside(path: Path) -> Path:
    """A hidden name in the same folder that no other process or thread uses, on no host that shares the folder."""
    host = re.sub(r"[^A-Za-z0-9-]+", "-", socket.gethostname())[:40]
    # A file system takes names of up to 255 bytes.
    name = path.name.encode("utf-8", "surrogateescape")[:120].decode("utf-8", "ignore")
    return path.with_name(f".{name}.{host}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


def make_durable(path: Path) -> None:
    """Waits until a file's data, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path, flag: str) -> None:
    """Makes a folder for output, and those above it.

    Raises:
        ConfigError: that cannot be, naming `flag`.
        OSError: the disk is full.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        raise ConfigError(
            Fault(flag, str(error), "a folder that is there or can be made", "give another path")
        ) from error


def sha256_of(path: Path, progress: Callable[[], None] = lambda: None) -> str:
    """The SHA-256 of a file, in hex; `progress` is called with each block of 4 MiB."""
    digest, block = hashlib.sha256(), memoryview(bytearray(_HASH_BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
            progress()
    return digest.hexdigest()


def read_json_object(path: Path, what: str) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Args:
        what: how messages call the file, such as "--domains data/domains.json".

    Raises:
        ConfigError: the file cannot be read, is not JSON, not an object, or names a key twice (json silently
            keeps the last: a domain's weight would be lost).
    """

    def no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entry = dict(pairs)
        if len(entry) != len(pairs):
            twin = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise ValueError(f"duplicate key {twin!r}")
        return entry

    try:
        text = path.read_text(encoding="utf-8")
        entry = json.loads(text, object_pairs_hook=no_twins)
        if not isinstance(entry, dict):
            raise ValueError(f"a JSON {type(entry).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            Fault(what, str(error), "a readable file that holds one JSON object", "give such a file")
        ) from error
    return entry
