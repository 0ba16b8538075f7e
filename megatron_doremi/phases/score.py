"""The phase score: records a reference's token losses on the windows that proxies will read.

Chunks of windows are distributed over the replicas of a run and the tasks of an array job. Each replica works
independently and writes its losses chunk by chunk: a stopped run resumes with the next chunk, and replicas may finish
hours apart.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from megatron_doremi.checkpoint.folder import changed_file
from megatron_doremi.cluster.control import RunControl
from megatron_doremi.cluster.preemption import KEEP_RUNNING, StopRequest
from megatron_doremi.cluster.store_collectives import barrier_via_store, run_on_rank_0_via_store
from megatron_doremi.cluster.watchdog import Watchdog
from megatron_doremi.config import Config
from megatron_doremi.console import say
from megatron_doremi.data.blend import GlobalBatch
from megatron_doremi.data.loader import read_windows
from megatron_doremi.data.reference_loss_file import (
    CHUNK_WINDOWS,
    LARGEST_LOSS,
    SMALLEST_LOSS,
    Chunks,
    all_chunks,
    chunks_of,
    clipped,
    unpack,
)
from megatron_doremi.data.reference_losses import ReferenceLosses, ReferenceLossFolder
from megatron_doremi.errors import ConfigError, Fault, RunError, error_from_json, error_to_json, raise_if_any
from megatron_doremi.mixture.reference import TrainedModel, load_trained
from megatron_doremi.model.forward import Stage, forward_only, reads_windows
from megatron_doremi.parallel import exchange
from megatron_doremi.parallel.context import ParallelContext
from megatron_doremi.parallel.exchange import broadcast_json, gather_json
from megatron_doremi.parallel.topology import Topology
from megatron_doremi.phases.run_data import RunData
from megatron_doremi.plan import RunPlan
from megatron_doremi.progress import Progress, stage
from megatron_doremi.shapes import RESETS, GPTConfig
from megatron_doremi.storage.files import sha256_of

# Windows whose indices are computed at a time, and chunks whose files a replica checks at a time.
_PART = 1 << 18
_CHUNKS_PER_GROUP = 256
_STOP, _FAILED = 1, 2
T = TypeVar("T")


def data_fingerprint(config: Config, data: RunData) -> dict[str, Any]:
    """What recorded losses depend on, except the reference. Keys may be missing from folders of an older version."""
    return {
        "tokenizer_sha256": data.tokenizer_sha256,
        "data_fingerprint": data.manifest.fingerprint(),
        "data_content": data.content,
        "domains": list(data.names),
        "seq_length": config.data.seq_length,
        "precision": "bfloat16" if config.optimizer.bf16 else "float32",
    }


def weights_hash(model: TrainedModel, watchdog: Watchdog) -> str:
    """A hash of the files that a model is made of. Raises ConfigError if one was changed after it was written."""
    lines, faults = [], []
    for path in model.hashed_files():

        def progress(doing: str = f"reading {path}") -> None:
            watchdog.mark(doing)

        progress()
        checksum = sha256_of(path, progress)
        lines.append(f"{path.name} {checksum}\n")
        if model.checksums.get(path.name, checksum) != checksum:
            faults.append(changed_file(path, "copy the checkpoint again, or take another"))
    raise_if_any(faults)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def reference_hash(
    model: TrainedModel | None, reference_losses: ReferenceLosses | None, topology: Topology, watchdog: Watchdog
) -> str | None:
    """A hash of the weights of a proxy's reference; None without a reference. A collective call."""
    if reference_losses is not None:
        return reference_losses.scores_file.reference
    if model is None:
        return None
    return model_hash(model, topology, watchdog)


def model_hash(model: TrainedModel, topology: Topology, watchdog: Watchdog) -> str:
    """A hash of a model's weights. A collective call."""
    # Read on one rank only: a model may be gigabytes.
    with stage(f"checking the weights in {model.files}", topology.rank == 0):
        return str(exchange.from_rank_0(lambda: weights_hash(model, watchdog)))


def windows_needed(plan: RunPlan, progress: Callable[[str], None] = lambda doing: None) -> Iterator[Chunks]:
    """Yields, for each domain, the windows that a proxy reads (`RunPlan.windows_needed`), by chunk.

    Exhaust the chunks of a domain before you request those of the next domain.
    """
    blend = plan.blend

    def parts(domain: int, count: int) -> Iterator[NDArray[np.int64]]:
        for first in range(0, count, _PART):
            progress(f"listing the windows of domain {plan.names[domain]!r}")
            yield blend.windows_at(domain, first, min(_PART, count - first))

    for domain, (size, count) in enumerate(zip(plan.window_counts, plan.windows_needed, strict=True)):
        yield all_chunks(size) if count == size else chunks_of(parts(domain, count), size)


def open_reference_losses(config: Config, data: RunData) -> ReferenceLosses:
    """Opens the folder --reference-losses. Raises ConfigError if its losses belong to another reference or data set."""
    return ReferenceLosses(Path(config.doremi.reference_losses), data.names, data_fingerprint(config, data))


def missing_losses(
    reference_losses: ReferenceLosses, plan: RunPlan, mark: Callable[[str], None] = lambda doing: None
) -> list[Fault]:
    """A fault for each domain of whose windows, as a proxy reads them, some are not recorded.

    Args:
        mark: called now and then with what is being done.
    """
    counts = zip(plan.window_counts, plan.windows_needed, strict=True)
    total = sum(min(-(-size // CHUNK_WINDOWS), count) for size, count in counts)
    with Progress("checking the reference losses", total, "file", plan.topology.rank == 0) as bar:

        def progress(domain: int, files: int) -> None:
            mark(f"checking the reference losses of domain {plan.names[domain]!r}")
            bar.update(files)

        return reference_losses.check(windows_needed(plan, mark), progress)


def check_reference_losses(
    reference_losses: ReferenceLosses, plan: RunPlan, store: dist.Store, watchdog: Watchdog
) -> None:
    """Checks on rank 0 that every window that a proxy reads is recorded; a collective call.

    Raises:
        ConfigError: on every rank, with the faults of `missing_losses`.
    """

    def check() -> None:
        raise_if_any(missing_losses(reference_losses, plan, watchdog.mark))

    run_on_rank_0_via_store(store, "reference losses", plan.topology.rank, check)


def score(plan: RunPlan, data: RunData, model: TrainedModel, context: ParallelContext, control: RunControl) -> bool:
    """Scores this task's share of the windows that are not recorded yet; a collective call.

    Returns:
        whether a signal or a time limit stopped the run before all were scored.

    Raises:
        RunError: a loss is NaN, Inf or negative (its chunk is not recorded), or a file cannot be written.
    """
    config, topology, watchdog = plan.config, context.topology, control.watchdog
    store = dist.PrefixStore("score", control.store)

    def start() -> dict[str, Any]:
        fingerprint = {**data_fingerprint(config, data), "reference": weights_hash(model, watchdog)}
        fingerprint["reference_iteration"] = model.iteration
        if isinstance(model.shape, GPTConfig):
            fingerprint |= {name: getattr(model.shape, name) for name in RESETS}
        ReferenceLossFolder(Path(config.run.save), fingerprint)
        return fingerprint

    # Before the folder is written: some faults of a model's files show only now.
    with stage(f"loading {model.files}", topology.rank == 0):
        module = load_trained(model, context, plan.dtype, plan.frozen_execution)
    with stage(f"checking the weights in {model.files}", topology.rank == 0):
        fingerprint = run_on_rank_0_via_store(store, "folder", topology.rank, start)
    # Only one rank of each replica reads and writes files of losses.
    folder = ReferenceLossFolder(Path(config.run.save), fingerprint) if topology.rank == topology.loss_rank() else None
    replica = _Replica(plan, data, module, context, watchdog, store, folder)
    replica.score(control.stop)
    barrier_via_store(store, "done", topology.rank, topology.world_size, lambda: replica.poll(control.stop))
    outcomes = gather_json([int(replica.stopped), replica.windows, replica.clipped])
    stopped, windows, clipped_losses = (sum(values) for values in zip(*outcomes, strict=True))
    if clipped_losses and topology.rank == 0:
        say(
            f"score: {clipped_losses:,} of {windows * config.data.seq_length:,} token losses were above "
            f"{LARGEST_LOSS:.4f} nats and were recorded as this value"
        )
    if topology.rank == 0:
        end = "stopped before all were scored; run the same command again for the rest" if stopped else "done"
        say(f"score: {windows:,} windows recorded in {config.run.save} by this run: {end}")
    return bool(stopped)


class _Replica:
    """Scores the chunks of one replica; learns of failures and stop requests of other ranks through the store.

    Attributes:
        stopped: whether it left chunks unscored because a rank of the run was asked to stop.
        windows: number of windows that this rank has recorded.
        clipped: number of their losses that were above the largest value that a file can hold.
    """

    def __init__(
        self,
        plan: RunPlan,
        data: RunData,
        module: Stage,
        context: ParallelContext,
        watchdog: Watchdog,
        store: dist.Store,
        folder: ReferenceLossFolder | None,
    ):
        self.plan, self.data = plan, data
        self.module, self.folder = module, folder
        self.context, self.topology, self.watchdog, self.store = context, context.topology, watchdog, store
        self.stopped, self.windows, self.clipped = False, 0, 0

    def score(self, stop: StopRequest) -> None:
        """Scores and records this replica's chunks until all are done or a rank of the run has to stop."""
        # Shares are equal in chunks, and only nearly equal in windows.
        total = sum(self.plan.windows_needed) // self._num_shares()
        shares = f" (rank 0's share, one of {self._num_shares():,})" if self._num_shares() > 1 else ""
        with Progress(f"scoring{shares}", total, "window", self.topology.rank == 0, delay=0.0) as bar:
            for chunks, recorded in self._chunk_groups():
                bar.skip(recorded)
                for domain, chunk, bits in chunks:
                    if self._must_stop(stop):
                        self.stopped = True
                        return
                    windows = chunk * CHUNK_WINDOWS + np.flatnonzero(unpack(int(bits, 16)))
                    self._record(domain, chunk, windows, self._losses(domain, windows))
                    bar.update(len(windows))
        # Raises if the last chunk failed.
        self._must_stop(stop)

    def _num_shares(self) -> int:
        return self.plan.config.doremi.num_shards * self.topology.data_size

    def _chunk_groups(self) -> Iterator[tuple[list[tuple[int, int, str]], int]]:
        """Yields groups of chunks, (domain, chunk, bits of the windows to score), with the number of their windows that
        are recorded already.

        One rank of the replica checks the files, which other tasks may change at any time.
        """
        share = self.plan.config.doremi.shard * self.topology.data_size + self.topology.data_rank
        needed = windows_needed(self.plan, self.watchdog.mark)
        chunks = ((domain, chunk, bits) for domain, part in enumerate(needed) for chunk, bits in part)
        mine = itertools.islice(chunks, share, None, self._num_shares())
        while True:
            group: list[Any] | None = None
            if self.folder is not None:
                self.watchdog.mark("checking which windows are recorded")
                group = self._report_failure(lambda: self._next_group(mine))
            if self.topology.replica_size > 1:
                group = broadcast_json(group, self.topology.loss_rank(), self.context.groups.model)
            if group is None:
                return
            yield group[0], group[1]

    def _next_group(self, mine: Iterator[tuple[int, int, int]]) -> list[Any] | None:
        """The next value of `_chunk_groups`; None at the end."""
        group = list(itertools.islice(mine, _CHUNKS_PER_GROUP))
        if self.folder is None or not group:
            return None
        checked = [(domain, chunk, bits, self.folder.missing(domain, chunk, bits)) for domain, chunk, bits in group]
        recorded = sum((bits & ~missing).bit_count() for _, _, bits, missing in checked)
        return [[(domain, chunk, f"{missing:x}") for domain, chunk, _, missing in checked if missing], recorded]

    def _report_failure(self, work: Callable[[], T]) -> T | None:
        """Returns the result of `work`; if it fails, reports the error to all ranks and returns None."""
        try:
            return work()
        except (ConfigError, RunError, OSError) as error:
            self.store.set("error", error_to_json(error))
        return None

    def _losses(self, domain: int, windows: NDArray[np.int64]) -> NDArray[np.float32]:
        """[n, seq] losses of windows of one domain in nats, on the last stage; [0, seq] on all others."""
        size, seq_length = self.plan.batch_shape
        padded = np.concatenate([windows, np.full(-len(windows) % size, windows[-1])])
        parts = [GlobalBatch(np.full(size, domain), part) for part in padded.reshape(-1, size)]
        rows: list[NDArray[np.float32]] = []
        stride, reads = 4 * self.topology.pipe_size, reads_windows(self.module, self.topology)
        for first in range(0, len(parts), stride):
            self.watchdog.mark(f"scoring domain {self.data.names[domain]!r}, window {int(padded[first * size]):,}")
            some = parts[first : first + stride]
            eod = self.module.document_eod
            batches = [read_windows(self.data.train, part, seq_length, None, eod) for part in some] if reads else []
            losses = forward_only(self.module, batches, len(some), (size, seq_length), self.context)
            rows += [loss.to("cpu", torch.float32).numpy() for loss in losses]
        return np.concatenate(rows)[: len(windows)] if rows else np.empty((0, seq_length), np.float32)

    def _record(self, domain: int, chunk: int, windows: NDArray[np.int64], losses: NDArray[np.float32]) -> None:
        """Records windows of a chunk on the rank that owns the folder; a failure is reported to all ranks."""
        if self.folder is not None and self._report_failure(lambda: self._add(domain, chunk, windows, losses)):
            self.windows += len(windows)
            self.clipped += clipped(losses)

    def _add(self, domain: int, chunk: int, windows: NDArray[np.int64], losses: NDArray[np.float32]) -> bool:
        assert self.folder is not None
        self._check(domain, windows, losses)
        self.folder.add(domain, chunk, windows, losses)
        return True

    def _check(self, domain: int, windows: NDArray[np.int64], losses: NDArray[np.float32]) -> None:
        good = np.isfinite(losses) & (losses > SMALLEST_LOSS)
        rows = np.flatnonzero(~good.all(axis=1))
        if len(rows):
            row = int(rows[0])
            value = losses[row][~good[row]][0]
            raise RunError(
                f"the reference's loss is {value} in window {int(windows[row]):,} of domain "
                f"{self.data.names[domain]!r}, and negative, NaN or Inf in {len(rows):,} of {len(windows):,} windows: "
                "none of them was recorded; look at the reference's own losses with --phase evaluate, or train it again"
            )

    def _must_stop(self, stop: StopRequest) -> bool:
        """Whether the run stops here; a collective call of the replica.

        Raises:
            ConfigError, RunError: the error of the rank that failed.
        """
        status = 0
        if self.store.check(["error"]):
            status = _FAILED
        elif self._asked_to_stop(stop):
            status = _STOP
        flag = torch.tensor([status], device=next(self.module.parameters()).device)
        if self.topology.replica_size > 1:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.context.groups.model)
        if flag.item() == _FAILED:
            raise error_from_json(self.store.get("error").decode())
        return bool(flag.item())

    def _asked_to_stop(self, stop: StopRequest) -> bool:
        """Whether any rank was asked to stop; tells the others if this rank was."""
        if self.store.check(["stop"]):
            return True
        asked = stop.reason() != KEEP_RUNNING
        if asked:
            self.store.set("stop", "asked")
        return asked

    def poll(self, stop: StopRequest) -> None:
        """Called while this rank waits for the others: passes on a stop request, raises the error of a failed rank."""
        if self.store.check(["error"]):
            raise error_from_json(self.store.get("error").decode())
        self._asked_to_stop(stop)
