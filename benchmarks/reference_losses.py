"""Recorded losses at The Pile's size: a proxy's startup, its check of the losses, and its first windows.

    python benchmarks/reference_losses.py                          # about 20,000 files of losses
    python benchmarks/reference_losses.py --train-iters 1000       # 47,000 files, a minute
    python benchmarks/reference_losses.py --chunks 256             # windows of full files, and by version 0.1

Sparse files replace the data and most losses: 22 domains with 300 billion tokens in total, windows of 1024 tokens, 512
windows per step. The files hold exactly the losses that a proxy of --train-iters steps reads. Prints seconds, the
growth of resident memory after the imports, and the bytes read per window.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from safetensors import safe_open
from startup import resident_mebibytes, write_sparse_domains

from megatron_doremi.arguments import parse_config
from megatron_doremi.data.blend import BlendState
from megatron_doremi.data.loader import Step, StepReader, steps
from megatron_doremi.data.reference_loss_file import CHUNK_WINDOWS, chunk_path, row_checksum, unpack
from megatron_doremi.data.reference_losses import ReferenceLosses, ScoresFile
from megatron_doremi.parallel.topology import Topology
from megatron_doremi.phases.inputs import plan_run
from megatron_doremi.phases.metrics_file import MetricsFile
from megatron_doremi.phases.run_data import RunData, open_data
from megatron_doremi.phases.score import check_reference_losses, data_fingerprint, open_reference_losses, windows_needed
from megatron_doremi.plan import RunPlan

SEQ, BATCH = 1024, 512
TOKENS = 300e9
# Raw size in GiB and mean size of a document in KiB (Gao et al. 2020, "The Pile", Table 1).
PILE = {
    "Pile-CC": (227.12, 4.33),
    "PubMed Central": (90.27, 30.55),
    "Books3": (100.96, 538.36),
    "OpenWebText2": (62.77, 3.85),
    "ArXiv": (56.21, 46.61),
    "Github": (95.16, 5.25),
    "FreeLaw": (51.15, 15.06),
    "StackExchange": (32.20, 2.16),
    "USPTO Backgrounds": (22.90, 4.08),
    "PubMed Abstracts": (19.26, 1.30),
    "Gutenberg (PG-19)": (10.88, 398.73),
    "OpenSubtitles": (12.98, 30.48),
    "Wikipedia (en)": (6.38, 1.11),
    "DM Mathematics": (7.75, 8.00),
    "Ubuntu IRC": (5.52, 545.48),
    "BookCorpus2": (6.30, 369.87),
    "EuroParl": (4.59, 68.87),
    "HackerNews": (3.90, 4.92),
    "YoutubeSubtitles": (3.73, 22.55),
    "PhilPapers": (2.38, 73.37),
    "NIH ExPorter": (1.89, 2.11),
    "Enron Emails": (0.88, 1.78),
}


def pile_counts() -> dict[str, tuple[int, int]]:
    """(tokens, documents) of each domain: 300 billion tokens in total, proportional to the raw sizes."""
    total = sum(size for size, _ in PILE.values())
    return {name: (int(TOKENS * size / total), int(size * 2**20 / document)) for name, (size, document) in PILE.items()}


def proxy_of(folder: Path, train_iters: int, *flags: str) -> tuple[RunPlan, RunData]:
    """The plan and the open data of a one-rank proxy on FOLDER/domains.json and FOLDER/losses."""
    model = "--num-layers 1 --hidden-size 8 --num-attention-heads 1 --micro-batch-size 8"
    argv = f"--phase proxy --save unused --train-iters {train_iters} --global-batch-size {BATCH} {model}".split()
    argv += ["--domains", str(folder / "domains.json"), "--reference-losses", str(folder / "losses")]
    config = parse_config([*argv, "--seq-length", str(SEQ), *flags], world_size=1)
    data, weights = open_data(config, training=True)
    return plan_run(config, Topology(), data, weights), data


def row_of(domain: int, window: int) -> NDArray[np.uint16]:
    """Encoded losses of a window that the first steps read."""
    return ((np.arange(SEQ) + 1009 * domain + window) % 65536).astype("<u2")


def write_losses(folder: Path, plan: RunPlan, data: RunData, first_steps: int = 2) -> int:
    """Writes sparse files of the losses that a proxy reads: `row_of` for the windows of its first steps, 0 for others.

    Returns:
        the number of files.
    """
    shown: dict[tuple[int, int], set[int]] = {}
    blend, state = plan.blend, BlendState.start(len(data.names))
    for _ in range(first_steps):
        batch, state = blend.next_batch(state, plan.sampling_weights)
        for domain, window in zip(batch.domains.tolist(), batch.windows.tolist(), strict=True):
            shown.setdefault((domain, window // CHUNK_WINDOWS), set()).add(window)
    entry = {"format": ScoresFile.FORMAT, **data_fingerprint(plan.config, data)}
    (folder / "losses").mkdir(parents=True)
    (folder / "scores.json").write_text(json.dumps({**entry, "reference": "0" * 64, "reference_iteration": 1}))
    count, empty = 0, bytes(2 * SEQ)
    for domain, chunks in enumerate(windows_needed(plan)):
        chunk_path(folder, domain, 0).parent.mkdir()
        for chunk, bits in chunks:
            windows = (chunk * CHUNK_WINDOWS + np.flatnonzero(unpack(bits))).tolist()
            rows = {w: row_of(domain, w).tobytes() for w in shown.get((domain, chunk), ())}
            sums = [row_checksum(domain, window, rows.get(window, empty)) for window in windows]
            with chunk_path(folder, domain, chunk).open("wb") as file:
                file.write(_head(bits, sums))
                start = file.tell()
                for window, row in rows.items():
                    file.seek(start + 2 * SEQ * windows.index(window))
                    file.write(row)
                file.truncate(start + 2 * SEQ * len(windows))
            count += 1
    return count


def _head(bits: int, sums: list[int]) -> bytes:
    """The head of a file of losses, before its rows; see reference_loss_file.py."""
    count = len(sums)
    bounds = (0, 512, 512 + 4 * count, 512 + 4 * count + 2 * SEQ * count)
    tensors = {"recorded": ("U64", [64]), "checksums": ("U32", [count]), "losses": ("U16", [count, SEQ])}
    header = json.dumps(
        {
            name: {"dtype": dtype, "shape": shape, "data_offsets": list(bounds[n : n + 2])}
            for n, (name, (dtype, shape)) in enumerate(tensors.items())
        }
    ).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + bits.to_bytes(512, "little") + np.array(sums, "<u4").tobytes()


class Marks:
    """Counts the marks that a watchdog receives."""

    def __init__(self) -> None:
        self.count = 0

    def mark(self, doing: str) -> None:
        self.count += 1


def check(reference_losses: ReferenceLosses, plan: RunPlan, data: RunData) -> int:
    """Checks the losses as a proxy does before it builds its model; returns the number of watchdog marks."""
    marks: Any = Marks()
    check_reference_losses(reference_losses, plan, dist.HashStore(), marks)
    return int(marks.count)


def first_steps(reference_losses: ReferenceLosses, plan: RunPlan, data: RunData) -> Iterator[Step]:
    """Steps as the training loop of a single rank reads them."""
    reader = StepReader(plan.blend, data.train, plan.batch_shape, plan.topology, reference_losses)
    return steps(reader, BlendState.start(len(data.names)), lambda step: plan.sampling_weights, ahead=False)


def resume_metrics(path: Path, steps_taken: int = 200_000, bytes_a_line: int = 3140) -> float:
    """Seconds to open a run's metrics at its checkpoint, two lines before the file's end.

    The file is sparse except for its last lines.
    """
    with path.open("wb") as file:
        file.truncate(steps_taken * bytes_a_line)
        file.seek(0, os.SEEK_END)
        file.write(b"\n")
        for iteration in range(steps_taken - 5, steps_taken + 3):
            if iteration == steps_taken + 1:
                checkpoint_size = file.tell()
            file.write(json.dumps({"iteration": iteration, "loss": [0.0] * 500}).encode() + b"\n")
    began = time.perf_counter()
    log = MetricsFile(path, steps_taken, checkpoint_size)
    seconds = time.perf_counter() - began
    assert log.size() == checkpoint_size, "truncated at the checkpoint"
    log.close()
    return seconds


def bytes_read() -> int:
    """Bytes that this process has read by system calls."""
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])


def timed(description: str, work: Callable[[], Any]) -> Any:
    """Runs `work`; prints its seconds and the growth of resident memory."""
    before, began = resident_mebibytes(), time.perf_counter()
    result = work()
    seconds, grown = time.perf_counter() - began, resident_mebibytes() - before
    print(f"{description:<58} {seconds:>8.3f} s {grown:>8.1f} MiB")
    return result


def at_size(train_iters: int) -> None:
    """Measures startup, check and a thousand windows."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_sparse_domains(folder, pile_counts())
        plan, data = timed("open 22 domains", lambda: proxy_of(folder, train_iters))
        files = timed("(write the files of losses)", lambda: write_losses(folder / "losses", plan, data))
        reference_losses = timed("open the reference losses", lambda: open_reference_losses(plan.config, data))
        marks = timed(
            f"check {files:,} files, {train_iters * BATCH:,} windows", lambda: check(reference_losses, plan, data)
        )
        coming = first_steps(reference_losses, plan, data)
        before = bytes_read()
        timed(f"{2 * BATCH:,} windows with their losses", lambda: [next(coming), next(coming)])
        read = (bytes_read() - before) / (2 * BATCH)
        print(f"{marks} signs of progress; {read:,.0f} bytes read a window, 2,050 of them text")
        timed("open metrics.jsonl of 200,000 steps, 628 MB", lambda: resume_metrics(folder / "metrics.jsonl"))
        disk = sum(path.stat().st_blocks for path in folder.rglob("*")) * 512 / 2**20
        print(f"{disk:,.0f} MiB on the disk")


def rows_of_full_files(chunks: int, rows: int = 2000) -> None:
    """Measures random windows from full files by the current reader and by version 0.1's."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, names = Path(temporary), ["only"]
        new, old = folder / "new", folder / "old"
        entry = {"tokenizer_sha256": None, "data_fingerprint": "0" * 64, "domains": names, "seq_length": SEQ}
        entry |= {"reference": "0" * 64, "reference_iteration": 1, "format": ScoresFile.FORMAT, "precision": "float32"}
        new.mkdir()
        (new / "scores.json").write_text(json.dumps(entry))
        for chunk in range(chunks):
            for target in (new, old):
                chunk_path(target, 0, chunk).parent.mkdir(parents=True, exist_ok=True)
            windows = np.arange(chunk * CHUNK_WINDOWS, (chunk + 1) * CHUNK_WINDOWS)
            sums = [row_checksum(0, window, bytes(2 * SEQ)) for window in windows.tolist()]
            with chunk_path(new, 0, chunk).open("wb") as file:
                file.write(_head((1 << CHUNK_WINDOWS) - 1, sums))
                file.truncate(file.tell() + 2 * SEQ * CHUNK_WINDOWS)
            with chunk_path(old, 0, chunk).open("wb") as file:
                file.write(_old_head())
                file.write(windows.tobytes())
                file.truncate(file.tell() + 2 * SEQ * CHUNK_WINDOWS)
        windows_read = np.random.default_rng(0).integers(0, chunks * CHUNK_WINDOWS, rows)
        reference_losses = ReferenceLosses(new, names, {})
        before = bytes_read()
        timed(
            f"{rows:,} rows of {chunks} full files",
            lambda: reference_losses.losses(np.zeros(rows, np.int64), windows_read),
        )
        print(f"{(bytes_read() - before) / rows:,.0f} bytes a row")
        few = windows_read[: rows // 10]
        timed(f"{len(few):,} rows as version 0.1 read them", lambda: _as_version_0_1(old, few))
        print(f"{8 + 2 * SEQ + 8 * CHUNK_WINDOWS + 2 * SEQ * CHUNK_WINDOWS:,} bytes a chunk, 256 chunks kept in memory")


def _old_head() -> bytes:
    bounds = (0, 8 * CHUNK_WINDOWS, 8 * CHUNK_WINDOWS + 2 * SEQ * CHUNK_WINDOWS)
    tensors = {"windows": ("I64", [CHUNK_WINDOWS]), "losses": ("F16", [CHUNK_WINDOWS, SEQ])}
    header = json.dumps(
        {
            name: {"dtype": dtype, "shape": shape, "data_offsets": list(bounds[n : n + 2])}
            for n, (name, (dtype, shape)) in enumerate(tensors.items())
        }
    ).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def _as_version_0_1(folder: Path, windows_read: NDArray[np.int64]) -> None:
    """`RecordedLosses.losses` of commit 95921cd, condensed."""

    def read(chunk: int) -> tuple[NDArray, NDArray]:
        with safe_open(chunk_path(folder, 0, chunk), framework="numpy") as file:
            windows = file.get_tensor("windows")
        with safe_open(chunk_path(folder, 0, chunk), framework="numpy") as file:
            return windows, file.get_tensor("losses")

    chunk_of = functools.lru_cache(256)(read)
    for window in windows_read.tolist():
        windows, losses = chunk_of(window // CHUNK_WINDOWS)
        losses[int(np.searchsorted(windows, window))].copy()


def main() -> None:
    """Runs the measurement that the command line selects."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--train-iters", type=int, default=100, help="steps of the proxy whose losses are recorded (default: 100)"
    )
    parser.add_argument(
        "--chunks", type=int, default=0, help="measure random windows from this many full files instead"
    )
    args = parser.parse_args()
    if args.chunks:
        rows_of_full_files(args.chunks)
    else:
        at_size(args.train_iters)


if __name__ == "__main__":
    main()
