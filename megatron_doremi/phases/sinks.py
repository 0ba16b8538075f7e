"""The log of a training run, and the sinks that it writes to. A new logger is one more `Sink` in `open_log`.

Only rank 0 has sinks. When one fails, it warns once; training and the other sinks continue.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_doremi.config import Config
from megatron_doremi.console import CONSOLE_ERRORS, BestEffortWriter, is_terminal, say
from megatron_doremi.parallel.exchange import from_rank_0
from megatron_doremi.phases.metrics import evaluation_summary, step_summary
from megatron_doremi.phases.metrics_file import EventsFile, MetricsFile
from megatron_doremi.progress import LinePacer, duration


class Sink:
    """One output of a run's log. A subclass overrides the methods that it needs; the others do nothing.

    Attributes:
        subject: the output's name in the warning that it cannot be written.
        errors: exceptions that the methods raise when the output fails; any other exception is a bug and ends the run.
    """

    subject: str
    errors: tuple[type[Exception], ...] = (OSError,)

    def write(self, entry: Mapping[str, Any]) -> None:
        """Records a line of metrics of a training step or an evaluation: {name: number, or {domain: number}}."""

    def step(self, entry: Mapping[str, Any] | None) -> None:
        """Records the progress of one step; `entry` is its line, already passed to `write`, or None if it has none."""

    def show(self, entry: Mapping[str, Any]) -> None:
        """Shows the user the line of a step at the log interval."""

    def say(self, text: str) -> None:
        """Shows the user a message."""

    def checkpoint_state(self) -> dict[str, Any]:
        """Returns the output's entries in a checkpoint of this iteration, which a resumed run needs."""
        return {}

    def make_durable(self) -> None:
        """Waits until everything written is on disk. Called before a checkpoint is published, in the thread that
        writes it."""

    def close(self) -> None:
        """Closes the output at the end of the run."""


class RunLog:
    """Passes metrics, messages and progress of a training run to any number of sinks.

    An entry that a sink cannot write is lost for that sink; the next entry is tried again.

    Attributes:
        last_loss: of the last step that had a line; None before the first.
    """

    def __init__(self, sinks: Sequence[Sink], lost_to: Callable[[], str | None] = lambda: None):
        """
        Args:
            sinks: in the order in which they are called; empty on all ranks but rank 0.
            lost_to: who has taken over the run's lock, if anyone; no metrics are written from then on.
        """
        self._sinks = [(BestEffortWriter(sink.subject, sink.errors), sink) for sink in sinks]
        self._lost_to = lost_to
        self.last_loss: float | None = None

    def step(self, entry: Mapping[str, Any] | None) -> None:
        """Records a step; `entry` is its line of metrics, if it has one."""
        if entry is not None:
            self.last_loss = entry["loss"]
            self._write(entry)
        self._each(lambda sink: sink.step(entry))

    def show(self, entry: Mapping[str, Any]) -> None:
        """Shows the line of a step at the log interval."""
        self._each(lambda sink: sink.show(entry))

    def evaluation(self, entry: Mapping[str, Any]) -> None:
        """Records the line of an evaluation and shows its summary."""
        self._write(entry)
        self.say(evaluation_summary(entry))

    def say(self, text: str) -> None:
        """Shows a message."""
        self._each(lambda sink: sink.say(text))

    def checkpoint_state(self) -> dict[str, Any]:
        """Returns the sinks' entries in a checkpoint of this iteration."""
        state: dict[str, Any] = {}
        self._each(lambda sink: state.update(sink.checkpoint_state()))
        return state

    def make_durable(self) -> None:
        """Waits until the metrics are on disk, before a checkpoint of this iteration is published."""
        self._each(lambda sink: sink.make_durable())

    def close(self) -> None:
        """Closes the sinks, the last one first."""
        for guard, sink in reversed(self._sinks):
            guard(sink.close)

    def _write(self, entry: Mapping[str, Any]) -> None:
        if self._sinks and self._lost_to() is None:
            self._each(lambda sink: sink.write(entry))

    def _each(self, call: Callable[[Sink], None]) -> None:
        for guard, sink in self._sinks:
            guard(partial(call, sink))


class JsonLines(Sink):
    """metrics.jsonl: one line per entry, floats in full precision, no repeated iteration."""

    def __init__(self, path: Path, iteration: int, metrics_bytes: int | None):
        """Opens the file and drops lines after `iteration`; see `MetricsFile`, also for the OSError.

        Args:
            metrics_bytes: size of the file in the checkpoint from which the run resumes.
        """
        self.subject = str(path)
        # A run that starts may evaluate before its first step: lines of iteration 0 are not an earlier run's to keep.
        self._file = MetricsFile(path, iteration or -1, metrics_bytes)

    def write(self, entry: Mapping[str, Any]) -> None:
        self._file.write(entry)

    def checkpoint_state(self) -> dict[str, Any]:
        try:
            return {"metrics_bytes": self._file.size()}
        except OSError:
            # A resume without the size reads the lines.
            return {}

    def make_durable(self) -> None:
        self._file.make_durable()

    def close(self) -> None:
        self._file.close()


class TensorBoard(Sink):
    """TensorBoard events: a scalar for every number, and a chart for each kind of domain entry; see charts.py."""

    def __init__(self, folder: Path, iteration: int):
        """Starts a new file of events in `folder`; see `EventsFile`, also for the OSError."""
        self.subject = f"TensorBoard in {folder}"
        self._file = EventsFile(folder, iteration)

    def write(self, entry: Mapping[str, Any]) -> None:
        self._file.write(entry)

    def close(self) -> None:
        self._file.close()


class Console(Sink):
    """Lines on stdout with the time of day, and at a terminal a progress bar on stderr below them."""

    subject, errors = "the console", CONSOLE_ERRORS

    def __init__(self, title: str, iteration: int, train_iters: int):
        """Shows the bar.

        Args:
            title: of the bar.
            iteration: steps already taken.
        """
        self._total, self._steps = train_iters, 0
        # The time of the first step: whatever it builds once would distort the time left.
        self._began = time.monotonic()
        self._pacer: LinePacer | None = None
        self._bar = tqdm(
            total=train_iters,
            initial=iteration,
            desc=title,
            unit="step",
            mininterval=0.2,
            dynamic_ncols=True,
            leave=False,
            disable=not is_terminal(sys.stderr),
        )

    def step(self, entry: Mapping[str, Any] | None) -> None:
        if not self._steps:
            self._began = time.monotonic()
        self._steps += 1
        if entry is not None:
            rate = entry["tokens_per_second"]
            self._bar.set_postfix_str(f"loss {entry['loss']:.4f}, {rate:,.0f} tokens/s", refresh=False)
        self._bar.update(1)

    def show(self, entry: Mapping[str, Any]) -> None:
        now = time.monotonic()
        first, last = self._pacer is None, entry["iteration"] == self._total
        self._pacer = self._pacer or LinePacer(now)
        if self._pacer.due(now) or first or last:
            self.say(step_summary(entry, self._total, self._time_left(self._total - entry["iteration"], now)))

    def say(self, text: str) -> None:
        say(text)

    def close(self) -> None:
        self._bar.close()

    def _time_left(self, remaining: int, now: float) -> str:
        steps = self._steps - 1
        if not remaining:
            return ""
        return duration(remaining * (now - self._began) / steps) if steps > 0 else ""


def open_log(config: Config, iteration: int, metrics_bytes: int | None, lost_to: Callable[[], str | None]) -> RunLog:
    """Opens a training run's outputs on rank 0; a collective call.

    Args:
        iteration: steps already taken.
        metrics_bytes, lost_to: see `JsonLines` and `RunLog`.

    Raises:
        RunError: on every rank, where an output cannot be opened.
        ConfigError: on every rank, where Weights & Biases refuses the run.
    """
    save = Path(config.run.save)
    sinks: list[Sink] = []

    def open_sinks() -> None:
        sinks.append(JsonLines(save / "metrics.jsonl", iteration, metrics_bytes))
        sinks.append(TensorBoard(Path(config.run.tensorboard_dir or save / "tensorboard"), iteration))
        if config.run.wandb_project:
            from megatron_doremi.phases.wandb_sink import WeightsAndBiases

            sinks.append(WeightsAndBiases(config))
        sinks.append(Console(config.data.phase, iteration, config.data.train_iters))

    from_rank_0(open_sinks)
    return RunLog(sinks, lost_to)
