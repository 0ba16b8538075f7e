"""A lock for one writer at a time in an output folder, across the hosts that share it.

For preprocessing tools, which are single processes: flock is enough, and the operating system releases it. A training
run needs cluster/run_lock.py instead: ranks on several hosts share one lock, a requeued job takes it over from its
dead predecessor, and it must also work on shared file systems where flock is local to a host.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

from megatron_doremi.errors import ConfigError, Fault
from megatron_doremi.storage.files import read_json_object
from megatron_doremi.storage.formats import Positive, Schema, check_entry

LOCK = ".writing.lock"


class Owner(Schema):
    """The process that holds a lock."""

    host: str
    process: Positive
    job: str = ""


class FolderLock:
    """A locked file in a folder; it records the owner's host, process and job.

    The operating system releases the lock when its process dies, also over NFS. On a file system without locks the
    file itself is the lock: it is taken over from a dead process of this host; otherwise the user has to remove it.
    """

    def __init__(self, folder: Path, flag: str):
        """Takes the lock. Raises ConfigError, naming `flag`, if another run holds it."""
        self._path = folder / LOCK
        self._file = os.fdopen(open_locked(self._path, lambda descriptor: self._take(descriptor, flag)), "r+b")
        owner = Owner(host=socket.gethostname(), process=os.getpid(), job=os.environ.get("SLURM_JOB_ID", ""))
        self._file.truncate(0)
        self._file.write(json.dumps(owner.model_dump()).encode("ascii"))
        self._file.flush()

    def _take(self, descriptor: int, flag: str) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise self._fault(flag) from error
        except OSError as error:
            owner = self._owner()
            if owner is not None and not (owner.host == socket.gethostname() and not _is_alive(owner.process)):
                raise self._fault(flag) from error

    def _owner(self) -> Owner | None:
        try:
            return check_entry(read_json_object(self._path, str(self._path)), str(self._path), Owner, "")
        except ConfigError:
            return None

    def _fault(self, flag: str) -> ConfigError:
        owner = self._owner()
        owner_text = ""
        if owner is not None:
            job = f", SLURM job {owner.job}" if owner.job else ""
            owner_text = f": process {owner.process} on {owner.host}{job}"
        value = f"another run is writing to {self._path.parent}{owner_text}"
        remedy = f"wait for it, or give another folder; if that run no longer exists, remove {self._path}"
        return ConfigError(Fault(flag, value, "one run at a time per folder", remedy))

    def release(self) -> None:
        """Releases the lock. A second call does nothing."""
        if not self._file.closed:
            with contextlib.suppress(OSError):
                self._path.unlink()
            self._file.close()


def open_locked(path: Path, take: Callable[[int], object]) -> int:
    """Opens a lock file, creating it, and returns its descriptor with the lock taken.

    Args:
        take: takes the lock of a descriptor, or raises. Called again if the previous owner has removed the file on
            release: a lock on a removed file protects nothing.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            take(descriptor)
            if _is_file_at(path, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_file_at(path: Path, descriptor: int) -> bool:
    """Whether an open file is still the one at `path`. A network file system asks its server when a file is opened."""
    try:
        with path.open("rb") as file:
            return os.path.samestat(os.fstat(file.fileno()), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
