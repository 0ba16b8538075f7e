"""Time from startup to the first global batch, after the imports: 22 domains with 300 billion tokens in total.

    python benchmarks/startup.py

Sparse files of the right sizes replace the data, so every read has its real offset. Prints the seconds from the
manifest to the first batch and the growth of resident memory; the goals are 1 s and 200 MiB.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")

import numpy as np

from megatron_doremi.arguments import parse_config
from megatron_doremi.data.blend import BlendState
from megatron_doremi.data.loader import Step, StepReader, steps
from megatron_doremi.data.manifest import MANIFEST_FORMAT
from megatron_doremi.parallel.topology import Topology
from megatron_doremi.phases.inputs import plan_run
from megatron_doremi.phases.run_data import open_data

TOKENS_A_DOCUMENT = 1000
# Opening an index of at most this many documents reads all of it.
CHECKED_DOCUMENTS = 1 << 18


def write_sparse(folder: Path, domains: int, tokens: int) -> Path:
    """Writes sparse datasets of uint16 ids, all 0; returns the manifest's path."""
    # Real domains have unequal sizes too.
    sizes = {f"domain {n}": 2 * tokens * (n + 1) // (domains * (domains + 1)) for n in range(domains)}
    return write_sparse_domains(folder, {name: (size, size // TOKENS_A_DOCUMENT) for name, size in sizes.items()})


def write_sparse_domains(folder: Path, sizes: Mapping[str, tuple[int, int]]) -> Path:
    """Writes sparse datasets of {domain: (tokens, documents)}; returns the manifest's path."""
    entries = []
    for number, (name, (size, documents)) in enumerate(sizes.items()):
        prefix = folder / f"domain{number}_train"
        with Path(f"{prefix}.bin").open("wb") as file:
            file.truncate(2 * size)
        with Path(f"{prefix}.idx").open("wb") as file:
            file.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, documents, documents + 1))
            if documents > CHECKED_DOCUMENTS:
                _write_ends(file, size, documents)
            else:
                lengths = np.full(documents, size // documents)
                lengths[-1] += size % documents
                places = 2 * (np.cumsum(lengths) - lengths)
                file.write(lengths.astype("<i4").tobytes() + places.astype("<i8").tobytes())
                file.write(np.arange(documents + 1, dtype="<i8").tobytes())
        entry = {"name": name, "train": prefix.name, "valid": None, "tokens": size, "documents": documents}
        entries.append({**entry, "bytes": 4 * size})
    tokenizer = {"type": "SentencePieceTokenizer", "file": "none", "sha256": "0" * 64, "vocab_size": 50_000, "eod": 0}
    manifest = {"format": MANIFEST_FORMAT, "tokenizer": tokenizer, "domains": entries}
    path = folder / "domains.json"
    path.write_text(json.dumps(manifest))
    return path


def _write_ends(file: BinaryIO, size: int, documents: int) -> None:
    """Writes the ends of an index's three lists; the zeros between them are never read."""
    start, last = file.tell(), size // documents
    for place, data in (
        (4 * documents - 4, struct.pack("<i", last)),
        (12 * documents - 8, struct.pack("<q", 2 * (size - last))),
        (20 * documents, struct.pack("<q", documents)),
    ):
        file.seek(start + place)
        file.write(data)


@dataclass(frozen=True)
class Start:
    """Measurements of one startup.

    Attributes:
        seconds: from the manifest to the first batch.
        mebibytes: growth of the process's resident memory.
    """

    step: Step
    seconds: float
    mebibytes: float


def first_batch(manifest: Path, batch: int = 512, seq_length: int = 1024) -> Start:
    """Opens the data as a run does and reads the first global batch."""
    model = "--num-layers 1 --hidden-size 8 --num-attention-heads 1"
    argv = f"--phase main --save unused --train-iters 1000 --global-batch-size {batch} --micro-batch-size 8 {model}"
    before, began = resident_mebibytes(), time.perf_counter()
    config = parse_config([*argv.split(), "--domains", str(manifest), "--seq-length", str(seq_length)], world_size=1)
    data, weights = open_data(config, training=True)
    plan = plan_run(config, Topology(), data, weights)
    reader = StepReader(plan.blend, data.train, plan.batch_shape, plan.topology)
    step = next(steps(reader, BlendState.start(len(data.names)), lambda step: weights, ahead=False))
    return Start(step, time.perf_counter() - began, resident_mebibytes() - before)


def resident_mebibytes() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    """Writes the files, measures the startup and prints the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--domains", type=int, default=22, help="number of domains (default: 22)")
    parser.add_argument("--tokens", type=float, default=300e9, help="tokens of all domains (default: 300e9)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        manifest = write_sparse(Path(folder), args.domains, int(args.tokens))
        start = first_batch(manifest)
        print(
            f"{args.domains} domains, {args.tokens:,.0f} tokens: first batch after {start.seconds:.3f} s, "
            f"{start.mebibytes:.1f} MiB of resident memory more than after the imports"
        )


if __name__ == "__main__":
    main()
