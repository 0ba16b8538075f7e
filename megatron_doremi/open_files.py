"""The limit on the number of files that this process may have open."""

from __future__ import annotations

import contextlib
import resource

# More than any program here needs. Some systems allow a billion, for which they would allocate large tables.
_MAX_OPEN_FILES = 1 << 20


def raise_open_files_limit() -> None:
    """Raises the soft limit to the hard limit: data of hundreds of domains consist of thousands of files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < limit:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def open_files_limit() -> int:
    """The number of files that this process may have open."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
