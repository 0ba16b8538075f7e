"""Checks at startup that every output of a run can be written, before any model is built."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_doremi.config import Config
from megatron_doremi.errors import ConfigError, Fault, raise_if_any
from megatron_doremi.settings import EVALUATE, SCORE, TRAINING
from megatron_doremi.storage.files import temporary_beside

# Errors that the user can fix with another path or other permissions. All others, such as a full disk or a lost file
# server, are failures of the machine.
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
# Larger than any file written as one record, to detect a nearly full disk.
_PROBE_BYTES = 1 << 16


def check_outputs(config: Config, learns: bool = False) -> list[str]:
    """Checks the folders and files that the run's phase writes. Creates the folders; files are not modified.

    Args:
        learns: the run learns domain weights, and writes them.

    Returns:
        the folders that it created, outer ones first.

    Raises:
        ConfigError: with every file or folder that cannot be written for a reason that the user can fix.
        OSError: a failure of the machine: the disk is full, or the file server does not respond.
    """
    faults: list[Fault] = []
    failed: list[Path] = []
    created: list[str] = []
    for check, path, flag, rule in _checks(config, learns) if config.run.save else ():
        if any(folder in path.parents for folder in failed):
            continue
        missing = [str(each) for each in (path, *path.parents) if not os.path.lexists(each)]
        try:
            check(path)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno not in USER_ERRORS:
                raise
            value = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            remedy = "move it away, fix its permissions, or give another path"
            faults.append(Fault(f"{flag}: {path}", value, rule, remedy))
            failed.append(path)
        created += [each for each in reversed(missing) if os.path.isdir(each)]
    raise_if_any(faults)
    return created


@contextmanager
def removed_if_unused(folders: Sequence[str]) -> Iterator[None]:
    """Removes those of `folders`, outer ones first, that are empty, if the input turns out to be wrong only now."""
    try:
        yield
    except ConfigError:
        for each in reversed(folders):
            with suppress(OSError):
                os.rmdir(each)
        raise


def planned_output_faults(config: Config) -> list[Fault]:
    """Faults of output folders that can be found without writing, for a dry run."""
    faults = []
    for flag, text in (("--save", config.run.save), ("--tensorboard-dir", config.run.tensorboard_dir)):
        path = Path(text).absolute()
        # The first folder that exists: the others would be created in it.
        existing = next((each for each in (path, *path.parents) if os.path.lexists(each)), Path("/"))
        if text and not existing.is_dir():
            faults.append(Fault(f"{flag}: {path}", f"{existing} is not a folder", "a folder", "give another path"))
        elif text and not os.access(existing, os.W_OK | os.X_OK):
            rule, remedy = "a writable folder", "fix its permissions, or give another path"
            faults.append(Fault(f"{flag}: {path}", f"{existing} is not writable", rule, remedy))
    return faults


def _checks(config: Config, learns: bool) -> Iterator[tuple[Callable[[Path], None], Path, str, str]]:
    """Yields (check, path, flag, rule) for each output of the phase."""
    phase, save = config.data.phase, Path(config.run.save)
    folder, file = "a writable folder", "a writable file, or nothing"
    yield _check_folder, save, "--save", folder
    if phase == EVALUATE:
        yield _check_appended, save / "evaluations.jsonl", "--save", file
    elif phase == SCORE:
        yield _check_folder, save / "losses", "--save", folder
        yield _check_replaced, save / "scores.json", "--save", file
    elif phase in TRAINING:
        yield _check_replaced, save / "config.json", "--save", file
        yield _check_appended, save / "metrics.jsonl", "--save", file
        yield _check_folder, save / "checkpoints", "--save", folder
        yield _check_replaced, save / "checkpoints" / "latest", "--save", file
        if learns:
            yield _check_replaced, save / "domain_weights.json", "--save", file
        if config.run.tensorboard_dir:
            yield _check_folder, Path(config.run.tensorboard_dir), "--tensorboard-dir", folder
        else:
            yield _check_folder, save / "tensorboard", "--save", folder


def _check_folder(path: Path) -> None:
    """Creates the folder, and writes and removes a file in it."""
    path.mkdir(parents=True, exist_ok=True)
    probe = temporary_beside(path / "probe")
    try:
        with probe.open("wb") as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    finally:
        probe.unlink(missing_ok=True)


def _check_replaced(path: Path) -> None:
    """Checks a file that is written under a temporary name and renamed, in a folder already checked."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))


def _check_appended(path: Path) -> None:
    """Checks a file that is opened and written in place. Creates the missing target of a symbolic link."""
    if not path.is_symlink() and not path.exists():
        return
    # Without O_NONBLOCK a pipe without a reader would block here.
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISCHR(mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
    finally:
        os.close(descriptor)
