"""A start on The Pile's size: little memory, nothing written beside the data, many processes at once.

Seconds are benchmarks/startup.py's. Run alone: python -m pytest tests/data/test_startup.py
"""

from __future__ import annotations

import pytest
from ranks import on_ranks

from benchmarks.startup import first_batch, write_sparse

TOKENS = 300_000_000_000


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sparse")
    try:
        return write_sparse(folder, 22, TOKENS)
    except OSError as error:
        pytest.skip(f"this file system holds no sparse files of 50 GB: {error}")


def start(launch, manifest):
    """What one process sees, and by how much it grew."""
    seen = first_batch(manifest)
    domains = [batch.domains.tolist() for batch in seen.step.micro_batches]
    windows = [batch.windows.tolist() for batch in seen.step.micro_batches]
    ids = max(int(batch.tokens.max()) for batch in seen.step.micro_batches)
    return seen.mebibytes, domains, windows, ids


def test_four_processes_at_once(manifest):
    before = {path.name: path.stat().st_mtime_ns for path in manifest.parent.iterdir()}
    found = on_ranks(4, start, manifest)
    assert {path.name: path.stat().st_mtime_ns for path in manifest.parent.iterdir()} == before
    for grown, domains, windows, ids in found:
        assert grown < 200
        assert (domains, windows, ids) == (*found[0][1:3], 0)
    # Windows from all over 27 billion tokens of the largest domain.
    flat = [w for row, d in zip(found[0][2], found[0][1], strict=True) for w, n in zip(row, d, strict=True) if n == 21]
    assert len(set(flat)) == len(flat) > 40
    assert max(flat) > 20e6
