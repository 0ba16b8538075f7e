"""One run a folder: a lock that works on a shared file system, and that is taken over from the dead.

    SAVE/.lock/NAME-0000007.json     who holds the lock, or held it last: host, process, job

The file is created by a hard link, which is atomic on every shared file system; each holder's file has the next number.
So whoever takes over from holder 7 creates number 8, and of several that try exactly one succeeds. The holder's thread
sets the file's time every 10 s, which needs no room on the disk; time 0 says that the holder has left.

A holder is dead at once where that can be seen: its process on this host is gone, or it was an earlier start of this
very SLURM job. Elsewhere its file is watched: where its time stays the same for 60 s by the watcher's clock (clocks of
two hosts are never compared) it is dead. A holder that was only suspended finds a higher number before it writes again,
and ends.
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
from megatron_doremi.console import note
from megatron_doremi.errors import ConfigError, Fault, RunError
from megatron_doremi.parallel.exchange import from_rank_0
from megatron_doremi.storage.files import make_folder

BEAT_SECONDS = 10.0
DEAD_AFTER_SECONDS = 60.0
_POLL_SECONDS = 2.0
# What a file system without hard links answers.
_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})


@dataclass(frozen=True)
class _Entry:
    number: int
    path: Path


class RunLock:
    """A lock of this process on a folder; a context manager that leaves it at the end."""

    def __init__(
        self,
        folder: Path,
        environ: Mapping[str, str],
        name: str = "run",
        progress: Callable[[], None] = lambda: None,
        beat: float = BEAT_SECONDS,
        dead_after: float = DEAD_AFTER_SECONDS,
        poll: float = _POLL_SECONDS,
    ):
        """Takes the lock; waits up to `dead_after` seconds where only time can tell whether its holder lives.

        Args:
            folder: --save.
            name: of the lock; what has different names may work in one folder.
            progress: called while it waits.

        Raises:
            ConfigError: another process holds it; names the process, its host and its job.
            OSError: the folder cannot be written.
        """
        self.folder, self.name, self._progress = folder / ".lock", name, progress
        self._save, self._beat, self._dead_after, self._poll = folder, beat, dead_after, poll
        self._pattern = re.compile(re.escape(name) + r"-(\d{7,})\.json")
        self.own = this_process(environ)
        self._lost_to: str | None = None
        make_folder(self.folder, "--save")
        self._entry = self._take()
        self._descriptor = os.open(self._entry.path, os.O_RDWR | os.O_CLOEXEC)
        # Where it works it tells others at once, in other containers and on other hosts too, that we live.
        with contextlib.suppress(OSError):
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for entry in self._entries():
            if entry.number < self._entry.number:
                with contextlib.suppress(OSError):
                    entry.path.unlink()
        self._seen_at = time.monotonic()
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="run lock", daemon=True)
        self._thread.start()

    @property
    def token(self) -> str:
        """Of this start."""
        return self.own.token

    def lost_to(self) -> str | None:
        """Who has taken the lock over from this process, which must not write any more; None while it holds it.

        Cheap: the thread looks with each beat; after a time in which the process was suspended, it looks itself.

        Raises:
            RunError: this process has released the lock.
        """
        self._must_hold()
        if self._lost_to is None and time.monotonic() - self._seen_at > 2 * self._beat:
            self._look()
        return self._lost_to

    def check(self) -> None:
        """Raises RunError where another process has taken the lock over, or this one has released it."""
        self._must_hold()
        self._look()
        if self._lost_to is not None:
            raise RunError(lost_message(self._save, self._lost_to))

    def _must_hold(self) -> None:
        if self._left.is_set():
            raise RunError(f"this run has released its lock on {self._save}; it writes nothing more")

    def release(self) -> None:
        """Leaves the lock to the next."""
        if self._left.is_set():
            return
        self._left.set()
        self._thread.join(self._poll)
        if self._lost_to is None:
            with contextlib.suppress(OSError):
                os.utime(self._descriptor, (0, 0))
        os.close(self._descriptor)

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def _take(self) -> _Entry:
        while True:
            last = max(self._entries(), key=lambda entry: entry.number, default=None)
            if last is not None and not self._is_free(last.path):
                continue
            number = 1 if last is None else last.number + 1
            entry = _Entry(number, self.folder / f"{self.name}-{number:07d}.json")
            if self._create(entry.path):
                # One that was slower than others may have created a number that they have left behind.
                if all(other.number <= number for other in self._entries()):
                    return entry
                entry.path.unlink(missing_ok=True)

    def _is_free(self, path: Path) -> bool:
        """Whether the holder of the last number has left or died; False also where that number is gone by now.

        Raises:
            ConfigError: it lives.
        """
        holder, time_of_file = _read(path)
        if time_of_file is None:
            return False
        if time_of_file == 0:
            return True
        dead = is_dead(holder, self.own) if holder is not None else None
        if dead is None and _is_flocked(path):
            dead = False
        whom = str(holder) if holder is not None else f"another process (see {path})"
        if dead is None:
            dead = self._stays_silent(path, time_of_file, whom)
        if not dead:
            raise ConfigError(
                Fault(
                    f"--save {self._save}",
                    f"in use by {whom}",
                    "one run a folder",
                    "wait for that run or stop it, or give another folder",
                )
            )
        return True

    def _stays_silent(self, path: Path, time_of_file: int, whom: str) -> bool:
        """Watches a holder's file. A look that hangs, as everything on its file system does, counts once."""
        note(f"{self._save} was in use by {whom}; watching for up to {self._dead_after:g} s whether it is alive")
        for _ in range(max(1, round(self._dead_after / self._poll))):
            time.sleep(self._poll)
            self._progress()
            now = _read(path)[1]
            if now != time_of_file:
                return now == 0 or now is None
        return True

    def _create(self, path: Path) -> bool:
        """Creates a number's file with its whole content; False where another process was first."""
        text = json.dumps({"format": Holder.FORMAT, **self.own.model_dump()}, indent=1) + "\n"
        temporary = self.folder / f".{self.own.token}.tmp"
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(temporary, path)
            except FileExistsError:
                # A server's answer that was lost makes a client ask again, and be told of its own success.
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

    def _entries(self) -> list[_Entry]:
        found = [(self._pattern.fullmatch(path.name), path) for path in self.folder.iterdir()]
        return [_Entry(int(match.group(1)), path) for match, path in found if match]

    def _keep(self) -> None:
        while not self._left.wait(self._beat) and self._lost_to is None:
            self._look()

    def _look(self) -> None:
        """Gives a sign of life, and finds out whether another process has taken over."""
        # A successor deletes this file; on NFS its descriptor is stale from then on, which hides no newer number.
        with contextlib.suppress(OSError):
            os.utime(self._descriptor)
        try:
            entries = self._entries()
        except OSError:
            # The folder was renamed, or its file system hangs: nobody has taken anything over.
            entries = []
        self._seen_at = time.monotonic()
        # Numbers rise; in a folder that was emptied or renamed by hand they start again.
        ours_is_there = self._is_ours()
        newer = [entry for entry in entries if entry.number > self._entry.number or not ours_is_there]
        if newer:
            holder, _ = _read(max(newer, key=lambda entry: entry.number).path)
            # The descriptor may be stale where the file is still this process's own.
            if holder is None or holder.token != self.token:
                self._lost_to = str(holder) if holder is not None else "another process"

    def _is_ours(self) -> bool:
        try:
            return os.path.samestat(self._entry.path.stat(), os.fstat(self._descriptor))
        except OSError:
            return False


def lost_message(save: Path, lost_to: str) -> str:
    """What a run says that has lost its lock."""
    return (
        f"{lost_to} has taken {save} over, because this process gave no sign of life for {DEAD_AFTER_SECONDS:g} s; "
        "this run ends and writes nothing more"
    )


def _read(path: Path) -> tuple[Holder | None, int | None]:
    """(who holds a number, its file's time in ns); time None where there is no such file, holder None where it is
    damaged or still being written."""
    try:
        # Opened each time: that is when a network file system asks its server.
        with path.open("rb") as file:
            data, found = file.read(65536), os.fstat(file.fileno())
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):
            return None, None
        raise
    try:
        return Holder.model_validate_json(data), found.st_mtime_ns
    except ValueError:
        return None, found.st_mtime_ns


def _is_flocked(path: Path) -> bool:
    """Whether a process holds the file by flock; False where that cannot be known."""
    try:
        with path.open("rb") as file:
            # Shared: several that ask do not meet each other's lock.
            fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


@dataclass(frozen=True)
class HeldLock:
    """The lock of a run as each of its ranks knows it.

    Attributes:
        token: of this start, the same on every rank; "" where there is no lock.
        lock: on rank 0.
    """

    token: str = ""
    lock: RunLock | None = None

    def lost_to(self) -> str | None:
        """Who has taken the lock over; None while the run holds it, and on other ranks than 0."""
        return None if self.lock is None else self.lock.lost_to()

    def check(self) -> None:
        """Raises RunError on rank 0 where another process has taken the lock over."""
        if self.lock is not None:
            self.lock.check()


@contextlib.contextmanager
def run_lock(folder: Path, name: str, environ: Mapping[str, str], progress: Callable[[], None]) -> Iterator[HeldLock]:
    """Rank 0 takes a lock for the run, and leaves it at the end of the block; a collective call.

    Raises:
        ConfigError: on every rank, where another run holds it.
        RunError: on every rank, where the folder cannot be written.
    """
    taken: list[RunLock] = []

    def take() -> str:
        taken.append(RunLock(folder, environ, name, progress))
        return taken[0].token

    try:
        token = from_rank_0(take)
        yield HeldLock(token, taken[0] if taken else None)
    finally:
        for lock in taken:
            lock.release()
