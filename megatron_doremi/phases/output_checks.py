"""Tries at the start everything that a run will write: what cannot be written is said before any model is built."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_doremi.config import Config
from megatron_doremi.errors import Fault, raise_if_any
from megatron_doremi.settings import EVALUATE, PROXY, SCORE, TRAINING
from megatron_doremi.storage.files import temporary_beside

# What another path or other permissions mend; the rest (full disk, lost server) is a failure of the machine.
USER_ERRORS = frozenset(
    {
        errno.EACCES,
        errno.EEXIST,
        errno.EINVAL,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.ENXIO,
        errno.EPERM,
        errno.EROFS,
    }
)
# More than any file that is written as one record, so that a disk that is all but full is found.
_PROBE_BYTES = 1 << 16


def check_outputs(config: Config) -> None:
    """Tries the folders and files that the run's phase writes. Makes the folders, and leaves files as they are.

    Raises:
        ConfigError: with every file or folder that cannot be written for a reason that the user can mend.
        OSError: the machine fails: the disk is full, or its server does not answer.
    """
    faults: list[Fault] = []
    failed: list[Path] = []
    for attempt, path, flag, rule in _attempts(config) if config.run.save else ():
        if any(folder in path.parents for folder in failed):
            continue
        try:
            attempt(path)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno not in USER_ERRORS:
                raise
            value = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            remedy = "move it away, mend its permissions, or give another path"
            faults.append(Fault(f"{flag}: {path}", value, rule, remedy))
            failed.append(path)
    raise_if_any(faults)


def _attempts(config: Config) -> Iterator[tuple[Callable[[Path], None], Path, str, str]]:
    """(how to try it, what, whose flag, the rule) for all that the phase writes."""
    phase, save = config.data.phase, Path(config.run.save)
    folder, file = "a folder that can be written", "a file that can be written, or nothing"
    yield _try_folder, save, "--save", folder
    if phase == EVALUATE:
        yield _try_appending, save / "evaluations.jsonl", "--save", file
    elif phase == SCORE:
        yield _try_folder, save / "losses", "--save", folder
        yield _try_replacing, save / "scores.json", "--save", file
    elif phase in TRAINING:
        yield _try_replacing, save / "config.json", "--save", file
        yield _try_appending, save / "metrics.jsonl", "--save", file
        yield _try_folder, save / "checkpoints", "--save", folder
        yield _try_replacing, save / "checkpoints" / "latest", "--save", file
        if phase == PROXY:
            yield _try_replacing, save / "domain_weights.json", "--save", file
        if config.run.tensorboard_dir:
            yield _try_folder, Path(config.run.tensorboard_dir), "--tensorboard-dir", folder
        else:
            yield _try_folder, save / "tensorboard", "--save", folder


def _try_folder(path: Path) -> None:
    """Makes a folder and writes a file in it, which it removes."""
    path.mkdir(parents=True, exist_ok=True)
    probe = temporary_beside(path / "probe")
    try:
        with probe.open("wb") as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    finally:
        probe.unlink(missing_ok=True)


def _try_replacing(path: Path) -> None:
    """For a file that is written under a temporary name and renamed, in a folder that was tried."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))


def _try_appending(path: Path) -> None:
    """For a file that is opened and written in place. The target of a link is made, where it is missing."""
    if not path.is_symlink() and not path.exists():
        return
    # A pipe that nobody reads must not hold up the start.
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISCHR(mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
    finally:
        os.close(descriptor)
