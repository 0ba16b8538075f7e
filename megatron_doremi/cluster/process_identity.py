"""What tells a process from all others, and whether it still runs, as far as another process can see."""

from __future__ import annotations

import os
from pathlib import Path


def process_start(pid: int) -> int | None:
    """When a process of this host started, in clock ticks since boot; None where it has ended, or cannot be seen."""
    # pid (name) state ppid ...; the name may hold anything.
    fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return int(fields[19]) if len(fields) > 19 and fields[0] not in ("Z", "X") else None


def boot_id() -> str:
    """Names this boot of this machine's kernel; "" where unknown."""
    return _text("/proc/sys/kernel/random/boot_id")


def pid_namespace() -> str:
    """Names the namespace in which this process's ids are counted; "" where unknown."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def has_ended(pid: int, started: int) -> bool:
    """Whether a process has ended. Asked only where boot and namespace are the process's own.

    Args:
        started: as `process_start` gave it; 0 where unknown, and then any process of this id counts.
    """
    start = process_start(pid)
    return start is None or (started != 0 and start != started)


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
