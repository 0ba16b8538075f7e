"""Atomic, durable file writes: a final name never holds a partial file."""

from __future__ import annotations

import contextlib
import difflib
import errno
import hashlib
import json
import os
import re
import secrets
import socket
import stat
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from megatron_doremi.errors import ConfigError, Fault

_HASH_BLOCK = 1 << 22
_LARGEST_TEXT = 1 << 30
_ONE_OBJECT = "a readable file that holds one JSON object"


def atomic_write_text(path: Path, text: str) -> None:
    """Writes a text file as UTF-8; see `atomic_write_bytes`."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_bytes(path: Path, data: bytes, may_replace: Callable[[], bool] = lambda: True) -> bool:
    """Writes a file under a temporary name, makes it durable and renames it.

    Args:
        may_replace: called before the rename; if it returns False, the new file is discarded.

    Returns:
        Whether the file was renamed.
    """
    temporary = temporary_beside(path)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if replaces := may_replace():
            temporary.replace(path)
        return replaces
    except OSError as error:
        # A failed write names no file, a failed open the temporary one.
        error.filename, error.filename2 = str(path), None
        raise
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


class AppendFile:
    """An append-only file. Each record is written in full or not at all."""

    def __init__(self, path: Path):
        """Opens the file, or creates it. Follows a symbolic link."""
        self.descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def size(self) -> int:
        """Size of the file in bytes."""
        return os.fstat(self.descriptor).st_size

    def read(self, start: int, end: int) -> bytes:
        """The bytes from `start` to `end`; fewer if the file is shorter."""
        return os.pread(self.descriptor, end - start, start) if end > start else b""

    def append(self, record: bytes) -> None:
        """Writes a record. On an OSError, removes the partial record and raises."""
        size, written = self.size(), 0
        try:
            while written < len(record):
                written += os.write(self.descriptor, record[written:])
        except OSError:
            if written:
                self.truncate(size)
            raise

    def truncate(self, size: int) -> None:
        """Truncates the file to `size` bytes."""
        os.ftruncate(self.descriptor, size)

    def make_durable(self) -> None:
        """Flushes the file to disk (fsync)."""
        os.fsync(self.descriptor)

    def close(self) -> None:
        """Closes the file."""
        os.close(self.descriptor)


def temporary_beside(path: Path) -> Path:
    """A hidden name in the same folder, unique across the threads, processes and hosts that share the folder."""
    host = re.sub(r"[^A-Za-z0-9-]+", "-", socket.gethostname())[:40]
    # File systems limit names to 255 bytes.
    name = path.name.encode("utf-8", "surrogateescape")[:120].decode("utf-8", "ignore")
    return path.with_name(f".{name}.{host}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


def make_durable(path: Path) -> None:
    """Flushes a file's data, or a folder's entries, to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_at(path: Path, size: int | None) -> BinaryIO:
    """A new file; or an earlier file, truncated to `size` bytes. Raises OSError if it is shorter."""
    if size is None:
        return path.open("wb")
    file = path.open("r+b")
    if file.seek(0, os.SEEK_END) < size:
        file.close()
        raise OSError(errno.EIO, f"shorter than the {size:,} bytes that were written", str(path))
    file.truncate(size)
    file.seek(size)
    return file


def sync_and_close(file: BinaryIO) -> None:
    """Makes a file durable (fsync), then closes it."""
    file.flush()
    os.fsync(file.fileno())
    file.close()


def make_folder(path: Path, flag: str) -> None:
    """Creates an output folder and its parents, and a file in it, so that an unwritable folder is found before work.

    Raises:
        ConfigError: the folder cannot be created or written; names `flag`.
        OSError: the disk is full or fails.
    """
    rule = "a folder that exists or can be created"
    try:
        path.mkdir(parents=True, exist_ok=True)
        rule = "a folder that this user can write to"
        probe = temporary_beside(path / "probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        value = f"{path}: {error.strerror}" if rule.endswith("to") else str(error)
        raise ConfigError(Fault(flag, value, rule, "give another path")) from error


def sha256_of(path: Path, progress: Callable[[], None] = lambda: None) -> str:
    """The SHA-256 of a file, in hex; `progress` is called after each block of 4 MiB."""
    digest, block = hashlib.sha256(), memoryview(bytearray(_HASH_BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
            progress()
    return digest.hexdigest()


def read_text_file(path: Path) -> str:
    """The text of a file that a person or another program wrote, in UTF-8, without a byte order mark.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no regular file (a pipe may never end, and each rank reads the file), larger than 1 GiB, or in
            another encoding.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise ValueError("a pipe or a device; every rank reads the file, so write it to disk")
    if status.st_size > _LARGEST_TEXT:
        raise ValueError(f"{status.st_size:,} bytes; such a file has at most {_LARGEST_TEXT:,}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error.reason} at offset {error.start:,}); save it as UTF-8") from error


def read_json_object(path: Path, subject: str, remedy: str = "give such a file") -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Args:
        subject: the file's name in messages, such as "--domains data/domains.json".
        remedy: what the user should do if the file cannot be read.

    Raises:
        ConfigError: the file holds another JSON value, or see `read_json`.
    """
    return json_object(read_json(path, subject, remedy), subject, remedy)


def json_object(content: Any, subject: str, remedy: str) -> dict[str, Any]:
    """A JSON value that must be an object. Raises ConfigError."""
    if not isinstance(content, dict):
        raise ConfigError(Fault(subject, f"a JSON {type(content).__name__}", _ONE_OBJECT, remedy))
    return content


def read_json(path: Path, subject: str, remedy: str = "give such a file") -> Any:
    """Reads a file that holds one JSON value.

    Raises:
        ConfigError: the file cannot be read, is not JSON, or has a duplicate key (the json module silently keeps the
            last value, and a domain's weight would be lost).
    """

    def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        json_object = dict(pairs)
        if len(json_object) != len(pairs):
            duplicate = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise ValueError(f"duplicate key {duplicate!r}")
        return json_object

    try:
        return json.loads(read_text_file(path), object_pairs_hook=unique_keys)
    except (OSError, ValueError, RecursionError) as error:
        value, remedy = unreadable(path, error, remedy)
        raise ConfigError(Fault(subject, value, _ONE_OBJECT, remedy)) from error


def unreadable(path: Path, error: Exception, remedy: str) -> tuple[str, str]:
    """Why a file cannot be read, in plain words, and the remedy: an existing path like it, or else `remedy`."""
    if isinstance(error, FileNotFoundError):
        near = similar_path(path)
        return "no such file", f"did you mean {near}?" if near else remedy
    return ("a folder" if isinstance(error, IsADirectoryError) else str(error)), remedy


def similar_path(path: Path) -> Path | None:
    """The existing path that differs from a missing one in the spelling of one part; None if there is none."""
    missing = next((each for each in [*reversed(path.parents), path] if not each.exists()), None)
    if missing is None or not missing.parent.is_dir():
        return None
    try:
        names = os.listdir(missing.parent)
    except OSError:
        return None
    rest = path.relative_to(missing)
    candidates = (missing.parent / name / rest for name in difflib.get_close_matches(missing.name, names, cutoff=0.7))
    return next((each for each in candidates if each.exists()), None)
