"""The number of files that this process may have open at a time."""

from __future__ import annotations

import contextlib
import resource

# No program needs more; some systems allow a billion, and make tables for them.
_ENOUGH = 1 << 20


def raise_open_files_limit() -> None:
    """Raises the soft limit to the hard one: data of hundreds of domains are thousands of files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _ENOUGH if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH)
    if soft != resource.RLIM_INFINITY and soft < limit:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def open_files_limit() -> int:
    """Files that this process may have open at a time."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
