"""The phase score: a reference's token losses on the windows that proxies will read, written once.

Chunks of windows are dealt out over the replicas of a run and the tasks of an array job. A replica works on its
own and writes what it has, chunk by chunk: a run that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from tqdm import tqdm

from megatron_doremi.config import Config, global_batch_size
from megatron_doremi.data.blend import Blend, GlobalBatch, window_count
from megatron_doremi.data.files import read_json_object, sha256_of
from megatron_doremi.data.loader import read_windows
from megatron_doremi.data.scores import (
    RecordedLosses,
    add_to_chunk,
    check_fingerprint,
    missing_windows,
    split_by_chunk,
    write_fingerprint,
)
from megatron_doremi.doremi.reference import ReferenceRun
from megatron_doremi.errors import Fault, raise_if_any
from megatron_doremi.model.forward import forward_only
from megatron_doremi.model.pipeline import GPTPipeline
from megatron_doremi.model.weights import load_frozen
from megatron_doremi.parallel.groups import ProcessGroups
from megatron_doremi.parallel.layers import TensorParallel
from megatron_doremi.parallel.topology import Topology
from megatron_doremi.training.setup import RunData
from megatron_doremi.training.stopping import GO_ON, StopRequest
from megatron_doremi.training.watchdog import Watchdog


def data_fingerprint(data: RunData, seq_length: int) -> dict[str, Any]:
    """What scores are bound to, besides the reference."""
    return {
        "tokenizer_sha256": data.tokenizer_sha256,
        "data_fingerprint": data.manifest.fingerprint(),
        "domains": list(data.names),
        "seq_length": seq_length,
    }


def weights_hash(folder: Path, watchdog: Watchdog) -> str:
    """A hash of a checkpoint's weights files."""
    lines = []
    for path in sorted(folder.glob("*.safetensors")):
        watchdog.mark(f"reading {path}")
        lines.append(f"{path.name} {sha256_of(path)}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def reference_hash(
    run: ReferenceRun | None, recorded: RecordedLosses | None, topology: Topology, watchdog: Watchdog
) -> str | None:
    """Tells a proxy's reference from another, by its weights; None without one. A collective call."""
    if run is None and recorded is None:
        return None
    found: list[str] = [""]
    if topology.rank == 0:
        # Read by one rank: a reference may be gigabytes.
        scores = read_json_object(recorded.folder / "scores.json", "scores.json") if recorded is not None else {}
        found = [str(scores.get("reference")) if run is None else weights_hash(run.weights, watchdog)]
    dist.broadcast_object_list(found)
    return found[0]


def windows_read(config: Config, data: RunData, world_size: int) -> list[NDArray[np.int64]]:
    """The windows of each domain, rising, that a proxy with these settings reads; all, without --train-iters.

    Quotas stay less than a window from a domain's share, so its count is known without playing the blend.
    """
    batch, iters = global_batch_size(config, world_size), config.data.train_iters
    counts = tuple(window_count(dataset.num_tokens, config.data.seq_length) for dataset in data.train)
    blend = Blend(data.names, counts, batch, config.data.seed)
    result = []
    for number, (size, weight) in enumerate(zip(counts, data.weights, strict=True)):
        most = int(np.ceil(iters * batch * weight)) + 1 if iters else size
        windows = np.arange(size) if most >= size else np.sort(blend.windows_at(number, 0, most))
        result.append(windows.astype(np.int64))
    return result


def check_recorded(config: Config, data: RunData, world_size: int) -> RecordedLosses:
    """Opens the scores of a proxy's run. Raises ConfigError where they are of something else or lack a window."""
    folder = Path(config.doremi.reference_losses)
    check_fingerprint(folder, data_fingerprint(data, config.data.seq_length), "--reference-losses")
    recorded = RecordedLosses(folder, data.names)
    faults: list[Fault] = []
    # With resampling nobody knows yet what will be read; a window that lacks is found when it comes.
    if config.doremi.doremi_weighting == "reweight":
        for number, windows in enumerate(windows_read(config, data, world_size)):
            # The count above may be one more than is read.
            missing = missing_windows(folder, number, windows)
            if len(missing):
                faults.append(recorded.missing(number, int(missing[0]), len(missing)))
    raise_if_any(faults)
    return recorded


def score(
    config: Config,
    data: RunData,
    run: ReferenceRun,
    topology: Topology,
    groups: ProcessGroups,
    stop: StopRequest,
    watchdog: Watchdog,
) -> bool:
    """Scores this task's share of the windows that are not there yet.

    Returns:
        whether some are left, because a signal or a time limit stopped the run.
    """
    folder, seq_length = Path(config.run.save), config.data.seq_length
    if topology.rank == 0:
        fingerprint = {**data_fingerprint(data, seq_length), "reference": weights_hash(run.weights, watchdog)}
        write_fingerprint(folder, {**fingerprint, "reference_iteration": run.iteration})
    dist.barrier()
    todo = _todo(config, data, topology, groups)
    tp = TensorParallel(groups.tensor, config.parallel.sequence_parallel)
    dtype = torch.bfloat16 if config.optimizer.bf16 else torch.float32
    module = load_frozen(run.gpt, run.weights, topology, tp, dtype, config.parallel.loss_chunk_tokens)
    stopped = False
    total = sum(len(windows) for _, _, windows in todo)
    with tqdm(total=total * seq_length, unit="token", unit_scale=True, desc="score", disable=topology.rank != 0) as bar:
        for domain, chunk, windows in todo:
            if _any_rank(stop.reason() != GO_ON, groups.model):
                stopped = True
                break
            watchdog.mark(f"scoring domain {domain}, chunk {chunk}")
            losses = _score_windows(config, data, module, domain, windows, topology)
            if topology.is_last_stage and topology.tensor_rank == 0:
                add_to_chunk(folder, domain, chunk, windows, losses)
            bar.update(len(windows) * seq_length)
    return _any_rank(stopped, None)


def _any_rank(said: bool, group: dist.ProcessGroup | None) -> bool:
    """Whether a rank of the group (None: any rank) said yes; a collective call."""
    flag = torch.tensor([int(said)], device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
    return bool(flag.item())


def _todo(
    config: Config, data: RunData, topology: Topology, groups: ProcessGroups
) -> list[tuple[int, int, NDArray[np.int64]]]:
    """(domain, chunk, windows) that this replica scores; decided by one rank of it, for files come and go."""
    found: list[Any] = [None]
    if topology.rank == topology.loss_rank():
        mine, place = [], config.doremi.shard * topology.data_size + topology.data_rank
        shares = config.doremi.num_shards * topology.data_size
        chunks = [
            (domain, chunk, windows)
            for domain, all_windows in enumerate(windows_read(config, data, topology.world_size))
            for chunk, windows in split_by_chunk(all_windows).items()
        ]
        for domain, chunk, windows in chunks[place::shares]:
            windows = missing_windows(Path(config.run.save), domain, windows)
            if len(windows):
                mine.append((domain, chunk, windows))
        found = [mine]
    dist.broadcast_object_list(found, src=topology.loss_rank(), group=groups.model)
    return found[0]


def _score_windows(
    config: Config,
    data: RunData,
    module: GPTPipeline,
    domain: int,
    windows: NDArray[np.int64],
    topology: Topology,
) -> NDArray[np.float16]:
    """[n, seq] losses of windows of one domain, on the last stage; elsewhere nothing."""
    size, seq_length = config.data.micro_batch_size, config.data.seq_length
    padded = np.concatenate([windows, np.full(-len(windows) % size, windows[-1])])
    parts = [GlobalBatch(np.full(size, domain), part) for part in padded.reshape(-1, size)]
    rows: list[NDArray[np.float16]] = []
    stride = 4 * topology.pipe_size
    for first in range(0, len(parts), stride):
        chunk = parts[first : first + stride]
        micro_batches = []
        if topology.is_first_stage or topology.is_last_stage:
            micro_batches = [read_windows(data.train, part, seq_length) for part in chunk]
        losses = forward_only(module, micro_batches, len(chunk), (size, seq_length), topology)
        rows += [loss.to("cpu", torch.float16).numpy() for loss in losses]
    return np.concatenate(rows)[: len(windows)] if rows else np.empty((0, seq_length), np.float16)
