"""Which windows a recorded run read at a step, from its config.json, its checkpoints and its metrics.jsonl.

The blend is a function of a small state, so that it is replayed from the nearest checkpoint before the step. Where the
run learned its sampling weights, the windows of each domain are counted by metrics.jsonl, which then has every step.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_doremi.checkpoint.folder import checkpoints, incompleteness, read_state
from megatron_doremi.checkpoint.run_config import RunConfigFile
from megatron_doremi.data.blend import Blend, BlendState, GlobalBatch
from megatron_doremi.errors import ConfigError, Fault
from megatron_doremi.progress import Progress


@dataclass(frozen=True)
class RecordedStep:
    """The windows of a step.

    Attributes:
        batch: in the order of the run's loader.
        cursors: [k] windows of each domain that were read before the step.
        blend: of the run at this step.
        replayed_from: the iteration at which the replay began: a checkpoint's, or 0.
        line: the step's line of metrics.jsonl; None if it has none. Its counts by domain are those of `batch`.
        newest: the last step that metrics.jsonl or a checkpoint records: a later one may not have been taken yet.
    """

    batch: GlobalBatch
    cursors: NDArray[np.int64]
    blend: Blend
    replayed_from: int
    line: Mapping[str, Any] | None
    newest: int

    def epochs(self) -> NDArray[np.int64]:
        """[B] epoch, from 0, in which each row of the batch reads its window."""
        epochs = np.empty(len(self.batch.domains), dtype=np.int64)
        for domain in np.unique(self.batch.domains):
            mine = np.flatnonzero(self.batch.domains == domain)
            cursor, size = int(self.cursors[domain]), self.blend.window_counts[domain]
            order = self.blend.windows_at(int(domain), cursor, len(mine))
            # A window may be read twice in a step, in two epochs: pair equal windows in the order of reading.
            by_window = np.argsort(order, kind="stable")
            mine = mine[np.argsort(self.batch.windows[mine], kind="stable")]
            epochs[mine] = (cursor + by_window) // size
        return epochs


def setting_at(config: RunConfigFile, name: str, step: int, now: Any) -> Any:
    """An entry of the run's identity when it took a step; `now` is that of its last start.

    A change at iteration M concerns the steps after M (--override-resume, --change-domain-weights).
    """
    changes = [entry for entry in config.overrides if entry.get("name") == name and "before" in entry]
    later = [entry for entry in changes if entry.get("iteration", 0) >= step]
    return min(later, key=lambda entry: entry["iteration"])["before"] if later else now


def recorded_step(run: Path, config: RunConfigFile, window_counts: tuple[int, ...], step: int) -> RecordedStep:
    """Replays a run up to a step; shows its progress.

    Args:
        run: the run's folder.
        config: its config.json.
        window_counts: [k] windows of each domain's training stream.
        step: number of the step; the first is 1.

    Raises:
        ConfigError: the run has not recorded enough, or the replay contradicts metrics.jsonl.
    """
    identity = config.identity.entries() if config.identity is not None else {}
    start = _state_before(run, tuple(config.domains), step)
    learned = identity.get("doremi_weighting") == "resample"
    lines, newest = _lines(run / "metrics.jsonl", start.step if learned else step - 1, step)
    newest = max([newest, *(iteration for iteration, _ in checkpoints(run))])
    seq_length = _entry(config, identity, "seq_length")

    def blend_at(number: int) -> Blend:
        batch = setting_at(config, "global_batch_size", number, config.global_batch_size)
        seed = setting_at(config, "seed", number, _entry(config, identity, "seed"))
        return Blend(tuple(config.domains), window_counts, int(batch), int(seed))

    def counts_of(number: int) -> NDArray[np.int64]:
        tokens = lines.get(number, {}).get("domain_tokens")
        if not isinstance(tokens, dict) or not all(isinstance(count, int) for count in tokens.values()):
            rule = "domain_tokens by domain, as the program writes them"
            if learned:
                rule = f"lines of all steps from {start.step + 1:,} to {step:,}: the run learned its sampling weights"
            remedy = "restore metrics.jsonl, or give a step after a checkpoint that has its lines"
            value = f"no line of step {number:,} with its domain_tokens"
            raise ConfigError(Fault(f"{run / 'metrics.jsonl'}", value, rule, remedy))
        return np.array([int(tokens.get(name, 0)) // seq_length for name in config.domains], dtype=np.int64)

    state = start
    with Progress("replaying the blend", step - 1 - start.step, "step") as progress:
        for number in range(start.step + 1, step):
            if learned:
                state = BlendState(number, state.credits, state.cursors + counts_of(number))
            else:
                state = blend_at(number).advance(state, _weights_at(config, number))[1]
            progress.update(1)
    blend = blend_at(step)
    counts = counts_of(step) if learned else blend.advance(state, _weights_at(config, step))[0]
    line = lines.get(step)
    if line is not None and not np.array_equal(counts, counts_of(step)):
        value = f"{counts_of(step).tolist()} windows by domain at step {step:,}"
        rule = f"those of the replay, {counts.tolist()}"
        raise ConfigError(Fault(str(run / "metrics.jsonl"), value, rule, "is it the metrics.jsonl of this run?"))
    return RecordedStep(blend.batch_of(state, counts), state.cursors, blend, start.step, line, newest)


def _weights_at(config: RunConfigFile, step: int) -> NDArray[np.float64]:
    weights = setting_at(config, "sampling_weights", step, config.sampling_weights)
    if set(weights) != set(config.domains):
        rule, remedy = "a sampling weight for each domain", "give a run of version 0.2 or later"
        raise ConfigError(Fault("config.json", "no sampling_weights", rule, remedy))
    return np.array([weights[name] for name in config.domains], dtype=np.float64)


def _entry(config: RunConfigFile, identity: Mapping[str, Any], name: str) -> int:
    """A setting of the run; version 0.1 recorded it among its flags only."""
    return int(identity.get(name, config.settings.get("data", {}).get(name, 0)))


def _state_before(run: Path, names: tuple[str, ...], step: int) -> BlendState:
    """The blend's state in the newest complete checkpoint before a step; the start if there is none."""
    for iteration, path in reversed(checkpoints(run)):
        if iteration < step and incompleteness(path) is None:
            state = read_state(path)
            if set(state.blend.cursors) == set(names):
                return BlendState.from_dict(state.blend.model_dump(), names)
    return BlendState.start(len(names))


def _lines(path: Path, after: int, last: int) -> tuple[dict[int, dict[str, Any]], int]:
    """The training lines of metrics.jsonl after one step, up to another, and its last step; skips damaged lines."""
    lines, newest = {}, 0
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        for text in file:
            try:
                line = json.loads(text)
                iteration = line["iteration"]
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
            if isinstance(iteration, int) and "loss" in line:
                newest = max(newest, iteration)
                if after < iteration <= last:
                    lines[iteration] = line
    return lines, newest
