"""The Pile's token and document counts in sparse files: a run starts at once, a proxy checks and reads its losses.

Measured by benchmarks/startup.py and benchmarks/reference_losses.py.
Run alone: python -m pytest tests/data/test_at_size.py
"""

from __future__ import annotations

import itertools
import os
import resource

import numpy as np
import pytest
from ranks import on_ranks

from benchmarks.startup import first_batch, write_sparse_domains

TRAIN_ITERS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """22 domains of 300 billion tokens, and what a proxy of four steps reads: files of losses all over them."""
    from benchmarks.reference_losses import pile_counts, proxy_of, write_losses

    folder = tmp_path_factory.mktemp("pile")
    try:
        write_sparse_domains(folder, pile_counts())
    except OSError as error:
        pytest.skip(f"this file system holds no sparse files of 170 GB: {error}")
    plan, data = proxy_of(folder, TRAIN_ITERS)
    assert write_losses(folder / "losses", plan, data) > 1800
    assert sum(path.stat().st_blocks for path in folder.rglob("*")) * 512 < 100 * 2**20
    return folder


def proxy(launch, folder):
    """What the only rank of a proxy does before its first step, and what it reads for two; in a process of its own."""
    from benchmarks.reference_losses import (
        bytes_read,
        check,
        first_steps,
        open_reference_losses,
        proxy_of,
        resume_metrics,
        row_of,
        windows_needed,
    )

    plan, data = proxy_of(folder, TRAIN_ITERS)
    reference_losses = open_reference_losses(plan.config, data)
    marks = check(reference_losses, plan, data)
    before, rows = bytes_read(), 0
    for step in itertools.islice(first_steps(reference_losses, plan, data), 2):
        for batch in step.micro_batches:
            for domain, window, losses in zip(batch.domains, batch.windows, batch.reference, strict=True):
                assert np.array_equal(losses.numpy() * 2048, row_of(int(domain), int(window)))
                rows += 1
    read = (bytes_read() - before) / rows
    files = len(os.listdir("/proc/self/fd"))
    # The largest domain's windows in the paper's 200,000 steps; version 0.1 compared all of them with each chunk.
    plan, data = proxy_of(folder, 200_000)
    chunks = list(next(windows_needed(plan)))
    before = bytes_read()
    resume_metrics(folder / "metrics.jsonl")
    return {
        "windows": plan.window_counts,
        "marks": marks,
        "rows": rows,
        "bytes a row": read,
        "files": files,
        "chunks": (len(chunks), sum(bits.bit_count() for _, bits in chunks)),
        "metrics": bytes_read() - before,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def test_a_proxy_starts_and_reads(folder):
    [report] = on_ranks(1, proxy, folder)
    print(report)
    assert sum(report["windows"]) > 290e6
    assert report["rows"] == 1024
    # One sign of progress a domain at least.
    assert report["marks"] >= 22
    # Text, header, checksum and row of losses; version 0.1 read whole files of up to 8.4 MB.
    assert report["bytes a row"] < 10_000
    assert report["files"] < 300
    assert report["chunks"] == (-(-80_635_815 // 4096), 200_000 * 512 // 22 + 2)
    # Of 628 MB.
    assert report["metrics"] < 2e6
    assert report["peak"] < 1024


def test_one_file_of_thousands_is_missing(folder):
    from benchmarks.reference_losses import check, chunk_path, open_reference_losses, proxy_of

    plan, data = proxy_of(folder, TRAIN_ITERS)
    reference_losses = open_reference_losses(plan.config, data)
    paths = [next(chunk_path(folder / "losses", domain, 0).parent.iterdir()) for domain in (0, 21)]
    hidden = [path.rename(path.with_suffix(".hidden")) for path in paths]
    with pytest.raises(Exception, match=r"of domain 'Pile-CC' (is|are) missing") as caught:
        check(reference_losses, plan, data)
    assert "of domain 'Enron Emails'" in str(caught.value)
    for path, name in zip(hidden, paths, strict=True):
        path.rename(name)


def start(launch, folder):
    """What one process reads, and by how many MiB its resident memory grows."""
    seen = first_batch(folder / "domains.json")
    domains = [batch.domains.tolist() for batch in seen.step.micro_batches]
    windows = [batch.windows.tolist() for batch in seen.step.micro_batches]
    ids = max(int(batch.tokens.max()) for batch in seen.step.micro_batches)
    return seen.mebibytes, domains, windows, ids


def test_four_processes_start_at_once(folder):
    """They use little memory and write nothing beside the data."""
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    by_rank = on_ranks(4, start, folder)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    for grown, domains, windows, ids in by_rank:
        assert grown < 200
        assert (domains, windows, ids) == (*by_rank[0][1:3], 0)
    # Windows from all over the 80 million of the largest domain.
    flat = [
        w for row, d in zip(by_rank[0][2], by_rank[0][1], strict=True) for w, n in zip(row, d, strict=True) if n == 0
    ]
    assert len(set(flat)) == len(flat) > 100
    assert max(flat) > 70e6
