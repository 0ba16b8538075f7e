"""Errors for losses and gradients that are NaN or Inf; they name the model and the windows."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_doremi.data.loader import MicroBatch
from megatron_doremi.errors import RunError
from megatron_doremi.mixture.objective import Objective
from megatron_doremi.parallel.exchange import gather_json

_SHOWN_WINDOWS = 20


class NonFinite(RunError):
    """A loss or a gradient is NaN or Inf: another step would corrupt the parameters."""


def explain_loss(
    objective: Objective, micro_batches: Sequence[MicroBatch], names: Sequence[str], iteration: int, model: str
) -> NonFinite:
    """The error for a step with a loss that is NaN or Inf, naming the model and the windows; a collective call.

    Args:
        micro_batches: this rank's micro-batches of the step.
        iteration: the step's number; the first step is 1.
        model: name of the trained model in the message.
    """
    windows = _windows(objective, micro_batches)
    parts = []
    for column, subject in ((2, model), (3, "reference")):
        bad = [window for window in windows if not window[column]]
        if bad:
            listed = windows_by_domain([(domain, number) for domain, number, _, _ in bad], names)
            parts.append(f"the {subject}'s loss of iteration {iteration} is NaN or Inf in {listed}")
    if not any(not window[2] for window in windows):
        parts.append(f"the {model}'s own losses are finite: check the reference or its recorded losses")
    return NonFinite("\n      ".join([*parts, _batch(windows, names), *_remedy(iteration)]))


def explain_gradient(
    objective: Objective, micro_batches: Sequence[MicroBatch], names: Sequence[str], iteration: int
) -> NonFinite:
    """The error for a step whose gradient is NaN or Inf although its losses are finite; a collective call."""
    first = (
        f"the gradient of iteration {iteration} is NaN or Inf, although every loss is finite; the step was not taken"
    )
    return NonFinite("\n      ".join([first, _batch(_windows(objective, micro_batches), names), *_remedy(iteration)]))


def _remedy(iteration: int) -> list[str]:
    return [
        f"nothing was saved after the last checkpoint; tools/inspect_step.py --step {iteration} shows the batch,",
        "or resume from the checkpoint with a lower --lr or --clip-grad",
    ]


def _windows(objective: Objective, micro_batches: Sequence[MicroBatch]) -> list[tuple[int, int, bool, bool]]:
    """The windows of the global batch, sorted: (domain, window, model's losses finite, reference's losses finite)."""
    topology, local = objective.context.topology, []
    if topology.rank == topology.loss_rank():
        for batch, finite in zip(micro_batches, objective.current.finite, strict=True):
            rows = zip(batch.domains.tolist(), batch.windows.tolist(), *finite.tolist(), strict=True)
            local += [row for row in rows if row[0] >= 0]
    return sorted(tuple(row) for part in gather_json(local) for row in part)


def windows_by_domain(windows: Sequence[tuple[int, int]], names: Sequence[str]) -> str:
    """(domain, window) pairs as text; of each domain at most 20 windows."""
    numbers_of: dict[int, list[int]] = {}
    for domain, window in windows:
        numbers_of.setdefault(domain, []).append(window)
    parts = []
    for number, numbers in numbers_of.items():
        shown = ", ".join(map(str, numbers[:_SHOWN_WINDOWS])) + (", ..." if len(numbers) > _SHOWN_WINDOWS else "")
        parts.append(f"{names[number]!r} (windows {shown})")
    return "; ".join(parts)


def _batch(windows: Sequence[tuple[int, int, bool, bool]], names: Sequence[str]) -> str:
    counts = {name: sum(window[0] == number for window in windows) for number, name in enumerate(names)}
    return "the batch: windows of " + ", ".join(f"{name!r} {count}" for name, count in counts.items() if count)
