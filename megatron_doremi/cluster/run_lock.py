"""A lock that admits one run per folder, works on shared file systems and is taken over from dead processes.

    SAVE/.lock/NAME-0000007.json     the current or last holder of the lock: host, process, SLURM job

The file is created by a hard link, which is atomic on every shared file system, and each holder uses the next number:
a process that takes over from holder 7 creates number 8, and if several try, exactly one succeeds. As a heartbeat, a
thread of the holder updates the file's modification time every 10 s, which takes no disk space; time 0 means that the
holder has released the lock.

A holder is known to be dead if its process on this host has ended, or if it belongs to an earlier start of the same
SLURM job. Otherwise its file is watched: the holder counts as dead if the modification time does not change for 60 s by
the watcher's clock; clocks of two hosts are never compared. A holder that was only suspended finds a file with a higher
number before it writes again, and exits.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_doremi.cluster.lock_holder import Holder, is_dead, this_process
from megatron_doremi.console import print_stderr
from megatron_doremi.errors import ConfigError, Fault, RunError
from megatron_doremi.parallel.exchange import from_rank_0
from megatron_doremi.storage.files import make_folder

HEARTBEAT_SECONDS = 10.0
HEARTBEAT_TIMEOUT_SECONDS = 60.0
_POLL_SECONDS = 2.0
# Errors of os.link on a file system without hard links.
_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})


@dataclass(frozen=True)
class _LockFile:
    number: int
    path: Path


class RunLock:
    """This process's lock on a folder; a context manager that releases it at the end."""

    def __init__(
        self,
        folder: Path,
        environ: Mapping[str, str],
        name: str = "run",
        progress: Callable[[], None] = lambda: None,
        interval: float = HEARTBEAT_SECONDS,
        timeout: float = HEARTBEAT_TIMEOUT_SECONDS,
        poll: float = _POLL_SECONDS,
    ):
        """Takes the lock; waits up to `timeout` seconds if it is not known whether the holder is alive.

        Args:
            folder: --save.
            name: of the lock; holders of locks of different names may share a folder.
            progress: called while waiting.
            interval: seconds between two heartbeats.
            timeout: seconds without a heartbeat after which a holder counts as dead.
            poll: seconds between two reads of a watched file.

        Raises:
            ConfigError: another process holds the lock; names the process, its host and its job.
            OSError: the folder cannot be written.
        """
        self.folder, self.name, self._progress = folder / ".lock", name, progress
        self._save, self._interval, self._timeout, self._poll = folder, interval, timeout, poll
        self._pattern = re.compile(re.escape(name) + r"-(\d{7,})\.json")
        self.holder = this_process(environ)
        self._lost_to: str | None = None
        make_folder(self.folder, "--save")
        self._file = self._take()
        self._descriptor = os.open(self._file.path, os.O_RDWR | os.O_CLOEXEC)
        # Where flock works, others see immediately, even from other containers and hosts, that the holder is alive.
        with contextlib.suppress(OSError):
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for file in self._lock_files():
            if file.number < self._file.number:
                with contextlib.suppress(OSError):
                    file.path.unlink()
        self._checked_at = time.monotonic()
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._send_heartbeats, name="run lock", daemon=True)
        self._thread.start()

    @property
    def token(self) -> str:
        """The token of this start; see `Holder`."""
        return self.holder.token

    def lost_to(self) -> str | None:
        """The process that has taken over the lock, after which this one must not write; None while this one holds it.

        Cheap: the heartbeat thread reads the files. Reads them itself only if that thread is late, because the process
        was suspended.

        Raises:
            RunError: this process has released the lock.
        """
        self._raise_if_released()
        if self._lost_to is None and time.monotonic() - self._checked_at > 2 * self._interval:
            self._send_heartbeat()
        return self._lost_to

    def check(self) -> None:
        """Raises RunError if another process has taken over the lock, or if this one has released it."""
        self._raise_if_released()
        self._send_heartbeat()
        if self._lost_to is not None:
            raise RunError(lost_message(self._save, self._lost_to))

    def _raise_if_released(self) -> None:
        if self._released.is_set():
            raise RunError(f"this run has released its lock on {self._save}; it writes nothing more")

    def release(self) -> None:
        """Releases the lock. A second call does nothing."""
        if self._released.is_set():
            return
        self._released.set()
        self._thread.join(self._poll)
        if self._lost_to is None:
            with contextlib.suppress(OSError):
                os.utime(self._descriptor, (0, 0))
        os.close(self._descriptor)

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def _take(self) -> _LockFile:
        while True:
            last = max(self._lock_files(), key=lambda file: file.number, default=None)
            if last is not None and not self._is_free(last.path):
                continue
            number = 1 if last is None else last.number + 1
            file = _LockFile(number, self.folder / f"{self.name}-{number:07d}.json")
            if self._create(file.path):
                # Meanwhile faster processes may have taken and released this number and created higher ones.
                if all(other.number <= number for other in self._lock_files()):
                    return file
                file.path.unlink(missing_ok=True)

    def _is_free(self, path: Path) -> bool:
        """Whether the holder of a lock file has released the lock or died; False also if the file is gone by now.

        Raises:
            ConfigError: the holder is alive.
        """
        holder, modified = _read(path)
        if modified is None:
            return False
        if modified == 0:
            return True
        dead = is_dead(holder, self.holder) if holder is not None else None
        if dead is None and _is_flocked(path):
            dead = False
        description = str(holder) if holder is not None else f"another process (see {path})"
        if dead is None:
            dead = self._has_no_heartbeat(path, modified, description)
        if not dead:
            raise ConfigError(
                Fault(
                    f"--save {self._save}",
                    f"in use by {description}",
                    "one run per folder",
                    "wait for that run or stop it, or give another folder",
                )
            )
        return True

    def _has_no_heartbeat(self, path: Path, modified: int, description: str) -> bool:
        """Watches a holder's file. Counts reads, not seconds: if the file system hangs, so do the heartbeats."""
        print_stderr(
            f"{self._save} was in use by {description}; waiting up to {self._timeout:g} s for a heartbeat of that run"
        )
        for _ in range(max(1, round(self._timeout / self._poll))):
            time.sleep(self._poll)
            self._progress()
            modified_now = _read(path)[1]
            if modified_now != modified:
                return modified_now == 0 or modified_now is None
        return True

    def _create(self, path: Path) -> bool:
        """Creates a lock file with its complete content; False if another process was first."""
        text = json.dumps({"format": Holder.FORMAT, **self.holder.model_dump()}, indent=1) + "\n"
        temporary = self.folder / f".{self.holder.token}.tmp"
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(temporary, path)
            except FileExistsError:
                # If the server's reply is lost, an NFS client repeats the request and finds its own link.
                return temporary.stat().st_nlink == 2
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                return self._create_in_place(path, text)
            return True
        finally:
            temporary.unlink(missing_ok=True)

    def _create_in_place(self, path: Path, text: str) -> bool:
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            return False
        return True

    def _lock_files(self) -> list[_LockFile]:
        matches = [(self._pattern.fullmatch(path.name), path) for path in self.folder.iterdir()]
        return [_LockFile(int(match.group(1)), path) for match, path in matches if match]

    def _send_heartbeats(self) -> None:
        while not self._released.wait(self._interval) and self._lost_to is None:
            self._send_heartbeat()

    def _send_heartbeat(self) -> None:
        """Updates the file's modification time, and checks whether another process has taken over the lock."""
        # A successor deletes this file. On NFS the descriptor is stale from then on, but newer files stay visible.
        with contextlib.suppress(OSError):
            os.utime(self._descriptor)
        try:
            files = self._lock_files()
        except OSError:
            # The folder was renamed, or its file system hangs: no other process has taken over.
            files = []
        self._checked_at = time.monotonic()
        # Numbers only rise, except in a folder that the user emptied or replaced: there they start again at 1.
        file_exists = self._file_exists()
        newer = [file for file in files if file.number > self._file.number or not file_exists]
        if newer:
            holder, _ = _read(max(newer, key=lambda file: file.number).path)
            # The descriptor can be stale although the file is still this process's.
            if holder is None or holder.token != self.token:
                self._lost_to = str(holder) if holder is not None else "another process"

    def _file_exists(self) -> bool:
        """Whether the path still leads to the file that this process created."""
        try:
            return os.path.samestat(self._file.path.stat(), os.fstat(self._descriptor))
        except OSError:
            return False


def lost_message(save: Path, lost_to: str) -> str:
    """The error of a run that has lost its lock."""
    return (
        f"{lost_to} has taken over {save} because this process sent no heartbeat for {HEARTBEAT_TIMEOUT_SECONDS:g} s; "
        "this run exits and writes nothing more"
    )


def _read(path: Path) -> tuple[Holder | None, int | None]:
    """(holder, modification time in ns) of a lock file.

    Returns:
        no time if the file does not exist; no holder if the file is damaged or still being written.
    """
    try:
        # Opened each time: a network file system revalidates a file's attributes on open.
        with path.open("rb") as file:
            data, status = file.read(65536), os.fstat(file.fileno())
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):
            return None, None
        raise
    try:
        return Holder.model_validate_json(data), status.st_mtime_ns
    except ValueError:
        return None, status.st_mtime_ns


def _is_flocked(path: Path) -> bool:
    """Whether a process holds an flock on the file; False if that cannot be determined."""
    try:
        with path.open("rb") as file:
            # Shared, so that processes that test the lock at the same time do not see each other.
            fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


@dataclass(frozen=True)
class HeldLock:
    """A run's lock as seen by each of its ranks.

    Attributes:
        token: of this start, the same on every rank; "" without a lock.
        lock: on rank 0; None on other ranks.
    """

    token: str = ""
    lock: RunLock | None = None

    def lost_to(self) -> str | None:
        """The process that has taken over the lock; None while the run holds it, and always on ranks other than 0."""
        return None if self.lock is None else self.lock.lost_to()

    def check(self) -> None:
        """Raises RunError on rank 0 if another process has taken over the lock."""
        if self.lock is not None:
            self.lock.check()


@contextlib.contextmanager
def run_lock(folder: Path, name: str, environ: Mapping[str, str], progress: Callable[[], None]) -> Iterator[HeldLock]:
    """Takes a lock on rank 0 for the duration of the block; a collective call.

    Args:
        folder, environ, name, progress: see `RunLock`.

    Raises:
        ConfigError: on every rank, if another run holds the lock.
        RunError: on every rank, if the folder cannot be written.
    """
    locks: list[RunLock] = []

    def take() -> str:
        locks.append(RunLock(folder, environ, name, progress))
        return locks[0].token

    try:
        token = from_rank_0(take)
        yield HeldLock(token, locks[0] if locks else None)
    finally:
        for lock in locks:
            lock.release()
