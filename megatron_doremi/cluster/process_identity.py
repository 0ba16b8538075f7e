"""Identifies a process uniquely, and tells whether it still runs, as far as another process can see it."""

from __future__ import annotations

import os
from pathlib import Path


def process_start(pid: int) -> int | None:
    """Start time of a process on this host, in clock ticks since boot; None if it has ended or is not visible."""
    fields = _stat(pid)
    return int(fields[19]) if len(fields) > 19 and fields[0] not in ("Z", "X") else None


def is_stopped(pid: int) -> bool:
    """Whether a process on this host is stopped, by a signal or a debugger: none of its threads runs."""
    return _stat(pid)[:1] in (["T"], ["t"])


def boot_id() -> str:
    """Identifies the current boot of this machine's kernel; "" if unknown."""
    return _text("/proc/sys/kernel/random/boot_id")


def pid_namespace() -> str:
    """Identifies the pid namespace of this process; "" if unknown."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def has_ended(pid: int, started: int) -> bool:
    """Whether a process has ended. Valid only if the process runs, or ran, in the caller's boot and pid namespace.

    Args:
        started: its `process_start`, because the kernel reuses process ids; 0 if unknown.
    """
    start = process_start(pid)
    return start is None or (started != 0 and start != started)


def _stat(pid: int) -> list[str]:
    """The fields of a process from its state on (proc(5)); empty if it has ended or is not visible."""
    # pid (name) state ppid ...; the name may contain any character.
    return _text(f"/proc/{pid}/stat").rpartition(")")[2].split()


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
