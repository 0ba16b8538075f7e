"""One writer at a time in a folder, on all hosts that share it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from pathlib import Path

from megatron_doremi.errors import ConfigError, Fault
from megatron_doremi.storage.files import read_json_object
from megatron_doremi.storage.formats import Positive, Schema, check_entry

LOCK = ".writing.lock"


class Owner(Schema):
    """Who holds a lock."""

    host: str
    process: Positive
    job: str = ""


class FolderLock:
    """A locked file in a folder, with its owner's host, process and job.

    The operating system releases the lock of a process that died, over NFS too. Where the file system has no locks, the
    file itself is the lock: that of a dead process of this host is taken over, any other one has to be removed by hand.
    """

    def __init__(self, folder: Path, flag: str):
        """Takes the lock. Raises ConfigError, naming `flag`, where another run has it."""
        self._path = folder / LOCK
        while True:
            self._file = self._path.open("a+b")
            try:
                self._take(flag)
                # The owner before removes the file when it is done; then this one is nobody's.
                if os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._path)):
                    break
            except FileNotFoundError:
                pass
            except BaseException:
                self._file.close()
                raise
            self._file.close()
        owner = Owner(host=socket.gethostname(), process=os.getpid(), job=os.environ.get("SLURM_JOB_ID", ""))
        self._file.truncate(0)
        self._file.write(json.dumps(owner.model_dump()).encode("ascii"))
        self._file.flush()

    def _take(self, flag: str) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
        who = ""
        if owner is not None:
            who = f": process {owner.process} on {owner.host}" + (f", SLURM job {owner.job}" if owner.job else "")
        value = f"another run writes in {self._path.parent}{who}"
        remedy = f"wait for it, or give another folder; if no run is left, remove {self._path}"
        return ConfigError(Fault(flag, value, "one run at a time in a folder", remedy))

    def release(self) -> None:
        """Gives the lock back; a second time does nothing."""
        if not self._file.closed:
            with contextlib.suppress(OSError):
                self._path.unlink()
            self._file.close()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
