"""What a run writes down of itself: metrics.jsonl, TensorBoard events, a progress bar. Rank 0 only."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_doremi.config import GPTConfig
from megatron_doremi.console import CONSOLE_ERRORS, Guard
from megatron_doremi.mixture.statistics import LOSS, TARGETS
from megatron_doremi.phases.metrics_file import EventsFile, MetricsFile

# Dense bfloat16 peak of a GPU in TFLOP/s, from the vendors' data sheets, by a part of its name; the longest part that
# a name holds counts ("NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3" is the SXM one).
_PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "GH200": 989.0,
    "B200": 2250.0,
    "GB200": 2500.0,
    "A100": 312.0,
    "L40S": 362.0,
}


def flops_per_token(gpt: GPTConfig, seq_length: int) -> float:
    """Floating point operations of a training step for each token: forward and twice that backward.

    Matrix products only, causal attention counted at its half (Chowdhery et al. 2022, appendix B).
    """
    heads = gpt.num_attention_heads * gpt.kv_channels
    qkv = gpt.hidden_size * (gpt.num_attention_heads + 2 * gpt.num_query_groups) * gpt.kv_channels
    mlp = (3 if gpt.swiglu else 2) * gpt.hidden_size * gpt.ffn_hidden_size
    weights = gpt.num_layers * (qkv + heads * gpt.hidden_size + mlp) + gpt.vocab_size * gpt.hidden_size
    attention = gpt.num_layers * 2 * heads * seq_length / 2
    return 6.0 * (weights + attention)


def gpu_metrics(flops: float, seconds: float, world_size: int) -> dict[str, float]:
    """Use of the GPUs in a step of `flops` operations; nothing where there is none.

    `mfu` only for GPUs whose peak is known.
    """
    if not torch.cuda.is_available():
        return {}
    tflops = flops / seconds / world_size / 1e12
    peak = peak_tflops(torch.cuda.get_device_name())
    result = {"tflops_per_gpu": tflops, "memory_gib": torch.cuda.max_memory_allocated() / 2**30}
    return result if peak is None else {**result, "mfu": tflops / peak}


def peak_tflops(gpu_name: str) -> float | None:
    """Dense bfloat16 peak of a GPU in TFLOP/s by the name that CUDA gives it; None where it is not known."""
    parts = [part for part in _PEAK_TFLOPS if part in gpu_name]
    return _PEAK_TFLOPS[max(parts, key=len)] if parts else None


def domain_entries(sums: Sequence[Sequence[float]], names: Sequence[str]) -> dict[str, Any]:
    """loss, domain_loss and domain_tokens of a global batch from its [3, k] sums; absent domains have no loss."""
    loss, targets = sums[LOSS], sums[TARGETS]
    return {
        "loss": sum(loss) / sum(targets),
        "domain_loss": {n: s / t for n, s, t in zip(names, loss, targets, strict=True) if t},
        "domain_tokens": {n: int(t) for n, t in zip(names, targets, strict=True)},
    }


def proxy_entries(
    sums: Sequence[Sequence[float]],
    excess: Sequence[float],
    weights: Sequence[float],
    gradient_weights: Sequence[float],
    names: Sequence[str],
) -> dict[str, Any]:
    """What a proxy adds to a line: lambda_t, alpha_t, and the sum of each domain's mean loss times the weight under
    which its gradient was taken."""
    means = [s / t if t else 0.0 for s, t in zip(sums[LOSS], sums[TARGETS], strict=True)]
    return {
        "domain_excess": dict(zip(names, excess, strict=True)),
        "domain_weights": dict(zip(names, weights, strict=True)),
        "dro_loss": sum(w * m for w, m in zip(gradient_weights, means, strict=True)),
    }


class RunLog:
    """Metrics, events and progress of a training run on rank 0; does nothing on other ranks.

    None of its outputs ends training: where one cannot be written, this is said once, and what is not written is
    lost. Each is tried again with its next entry.
    """

    def __init__(
        self,
        is_rank_0: bool,
        save: Path,
        tensorboard: Path,
        iteration: int,
        train_iters: int,
        title: str,
        metrics_bytes: int | None = None,
        lost_to: Callable[[], str | None] = lambda: None,
    ):
        """Opens the files; raises OSError where one cannot be opened.

        Args:
            title: of the progress bar.
            metrics_bytes: size of metrics.jsonl in the checkpoint from which the run resumes; see `MetricsFile`.
            lost_to: who has taken the run's lock over, in which case nothing more is written.
        """
        self.active, self._lost_to = is_rank_0, lost_to
        if not self.active:
            return
        self._metrics = MetricsFile(save / "metrics.jsonl", iteration, metrics_bytes)
        self._events = EventsFile(tensorboard, iteration)
        self._on_metrics, self._on_events = Guard(str(save / "metrics.jsonl")), Guard(f"TensorBoard in {tensorboard}")
        self._on_console = Guard("the console", CONSOLE_ERRORS)
        # On a terminal the bar moves; in a log file it is a line every few seconds.
        interval = 0.2 if sys.stderr is not None and sys.stderr.isatty() else 10.0
        self._bar = tqdm(
            total=train_iters,
            initial=iteration,
            desc=title,
            unit="step",
            mininterval=interval,
            dynamic_ncols=True,
            disable=sys.stderr is None,
        )

    def step(self, entry: dict[str, Any] | None) -> None:
        """One step is done; `entry` is its line, where it has one."""
        if not self.active:
            return
        if entry is not None:
            self._write(entry)
            rate = entry["tokens_per_second"]
            self._bar.set_postfix_str(f"loss {entry['loss']:.4f}, {rate:,.0f} tokens/s", refresh=False)
        self._on_console(lambda: self._bar.update(1))

    def line(self, entry: dict[str, Any]) -> None:
        """A line on the console above the bar, for a step at the log interval."""
        if not self.active:
            return
        rate, left = entry["tokens_per_second"], self._time_left()
        text = (
            f"iteration {entry['iteration']:>7,}/{self._bar.total:,} | loss {entry['loss']:.4f} | lr {entry['lr']:.3e}"
        )
        text += f" | grad norm {entry['grad_norm']:.3f} | {rate:,.0f} tokens/s | {left} left"
        if "domain_weights" in entry:
            name, weight = max(entry["domain_weights"].items(), key=lambda item: item[1])
            text += f" | largest weight {name} {weight:.3f}"
        self.say(text)

    def evaluation(self, entry: dict[str, Any]) -> None:
        """Writes an evaluation line and says its summary."""
        if not self.active:
            return
        self._write(entry)
        self.say(
            f"iteration {entry['iteration']:>7,} | held-out: uniform mean {entry['eval_uniform_mean']:.4f}, "
            f"worst {entry['eval_worst']:.4f}, token mean {entry['eval_token_mean']:.4f} nats a token"
        )

    def say(self, text: str) -> None:
        """A line on the console above the bar."""
        if self.active and sys.stdout is not None:
            self._on_console(lambda: self._say(text))

    def _say(self, text: str) -> None:
        self._bar.write(text)
        sys.stdout.flush()

    def metrics_bytes(self) -> int | None:
        """Size of metrics.jsonl, for the checkpoint of the same iteration; None where it is unknown."""
        if not self.active:
            return None
        try:
            return self._metrics.size()
        except OSError:
            return None

    def make_durable(self) -> None:
        """Waits until the metrics are on the disk: before a checkpoint of the same iteration is published."""
        if self.active:
            self._on_metrics(self._metrics.make_durable)

    def close(self) -> None:
        """Closes the files."""
        if self.active:
            self._on_console(self._bar.close)
            self._on_events(self._events.close)
            self._on_metrics(self._metrics.close)

    def _time_left(self) -> str:
        rate = self._bar.format_dict["rate"]
        done, total = self._bar.n, self._bar.total
        elapsed = self._bar.format_dict["elapsed"]
        rate = rate or (done - self._bar.initial) / max(elapsed, 1e-9)
        return tqdm.format_interval((total - done) / rate) if rate else "unknown time"

    def _write(self, entry: dict[str, Any]) -> None:
        if self._lost_to() is not None:
            return
        self._on_metrics(lambda: self._metrics.write(entry))
        self._on_events(lambda: self._events.write(entry))
