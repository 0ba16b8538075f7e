"""What a training run records of its steps: entries of metrics.jsonl, made from numbers, and texts made from entries.

Where they go is in sinks.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from megatron_doremi.console import COLUMNS, shortened
from megatron_doremi.data.weights_file import SMALLEST_SHARE
from megatron_doremi.devices import peak_tflops as peak_tflops
from megatron_doremi.mixture.statistics import DomainStats
from megatron_doremi.planning.compute import flops_per_token as flops_per_token


@dataclass(frozen=True)
class Meters:
    """What the rates of a step are computed from.

    Attributes:
        tokens: of a step, over all ranks.
        flops: floating point operations of a step over all ranks that its model, and an online reference, need
            (`run_flops_per_token`).
        world_size: number of ranks.
        gpu: CUDA's name of this rank's GPU; None without one.
    """

    tokens: int
    flops: float
    world_size: int
    gpu: str | None

    def entries(self, seconds: float, parts: Mapping[str, float], peak_bytes: int) -> dict[str, Any]:
        """Time and throughput of a step; utilization and memory with a GPU, `mfu` with one whose peak is known.

        Args:
            seconds: that it took.
            parts: seconds of it by what they were spent on (engine/step_clock.py), on this rank.
            peak_bytes: most memory allocated on the GPU so far.
        """
        result: dict[str, Any] = {
            "elapsed_ms": seconds * 1e3,
            "tokens_per_second": self.tokens / seconds,
            "time_ms": {part: round(each * 1e3, 3) for part, each in parts.items()},
        }
        if self.gpu is None:
            return result
        tflops, peak = self.flops / seconds / self.world_size / 1e12, peak_tflops(self.gpu)
        result |= {"tflops_per_gpu": tflops, "memory_gib": peak_bytes / 2**30}
        return result if peak is None else {**result, "mfu": tflops / peak}


def domain_entries(stats: DomainStats, names: Sequence[str]) -> dict[str, Any]:
    """loss, domain_loss and domain_tokens of a global batch; absent domains have no loss."""
    loss, targets = torch.stack((stats.loss, stats.targets)).tolist()
    return {
        "loss": sum(loss) / sum(targets),
        "domain_loss": {n: s / t for n, s, t in zip(names, loss, targets, strict=True) if t},
        "domain_tokens": {n: int(t) for n, t in zip(names, targets, strict=True)},
    }


def step_summary(entry: Mapping[str, Any], train_iters: int, time_left: str) -> str:
    """A training line as text for people; `time_left` is "" at the last step."""
    text = f"step {entry['iteration']:>{len(f'{train_iters:,}')},}/{train_iters:,} | loss {entry['loss']:.4f} | lr "
    text += f"{entry['lr']:.1e} | grad {entry['grad_norm']:.3f} | {entry['tokens_per_second']:,.0f} tokens/s"
    left = f" | {time_left} left" if time_left else ""
    room = COLUMNS - len("HH:MM:SS ") - len(text + left)
    # A proxy's line needs the room for its largest weight.
    mfu = f" | MFU {entry['mfu']:.1%}" if "mfu" in entry and "domain_weights" not in entry else ""
    text += (mfu if len(mfu) <= room else "") + left
    if "domain_weights" in entry:
        name, weight = max(entry["domain_weights"].items(), key=lambda item: item[1])
        # With the time of day before it, the line is at most COLUMNS long.
        room -= len(" | top  0.123")
        text += f" | top {shortened(name, room)} {weight:.3f}" if room >= min(6, len(name)) else ""
    return text


def evaluation_summary(entry: Mapping[str, Any]) -> str:
    """An evaluation line as text for people: means, each with half its 95 % interval; in bits per byte if known.

    A mean over a domain with one held-out document has no interval.
    """
    key, unit = ("eval_bpb", "bits/byte") if "eval_bpb_worst" in entry else ("eval", "nats/token")
    figures, missing = [], False
    for label in ("uniform mean", "worst", "token mean"):
        figure = f"{key}_{label.replace(' ', '_')}"
        bounds = entry.get(f"{figure}_interval")
        margin = "" if bounds is None else f" +- {(bounds[1] - bounds[0]) / 2:.3f}"
        figures.append(f"{label} {entry[figure]:.3f}{margin}")
        missing |= bounds is None
    why = " (one document)" if missing else ""
    return f"step {entry['iteration']:,} | held-out {unit}: {', '.join(figures)}{why}"


class VanishedWeights:
    """Warns once of each domain whose weight is below the smallest share that a mixture may have."""

    def __init__(self, remedy: str) -> None:
        """
        Args:
            remedy: what keeps a weight from vanishing.
        """
        self._names: set[str] = set()
        self._remedy = remedy

    def warnings(self, iteration: int, weights: Mapping[str, float]) -> list[str]:
        """A message for each domain whose weight has vanished since the last call."""
        vanished = {n: w for n, w in weights.items() if w < SMALLEST_SHARE and n not in self._names}
        self._names |= vanished.keys()
        return [
            f"warning: iteration {iteration:,}: the weight of {name!r} is {weight:.1e}; shares below "
            f"{SMALLEST_SHARE} are refused in a mixture: {self._remedy}"
            for name, weight in vanished.items()
        ]


class StepTimer:
    """Measures the seconds a step takes, without what is done between steps, such as evaluating and saving."""

    def __init__(self, iteration: int):
        """Starts after `iteration` steps."""
        self._iteration, self._began = iteration, time.perf_counter()

    def lap(self, iteration: int) -> tuple[int, float]:
        """Steps since the last lap, and the seconds that one took in the mean; the next lap begins."""
        now = time.perf_counter()
        steps, seconds = iteration - self._iteration, now - self._began
        self._iteration, self._began = iteration, now
        return steps, seconds / steps

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time of a `with` block out of the lap."""
        began = time.perf_counter()
        yield
        self._began += time.perf_counter() - began
