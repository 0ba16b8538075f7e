"""The errors for losses and gradients that are NaN or Inf: whose, and in which windows."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_doremi.data.loader import MicroBatch
from megatron_doremi.errors import RunError
from megatron_doremi.mixture.objective import Objective
from megatron_doremi.parallel.exchange import gather_json

_SHOWN_WINDOWS = 20
_REMEDY = (
    "      nothing was saved after the last checkpoint; look at the text with tools/inspect_data.py, or resume from\n"
    "      the checkpoint with a lower --lr or --clip-grad"
)


class NonFinite(RunError):
    """A loss or a gradient is NaN or Inf: another step would spoil the parameters."""


def explain_loss(
    objective: Objective, micro_batches: Sequence[MicroBatch], names: Sequence[str], iteration: int, model: str
) -> NonFinite:
    """The error for a step with a loss that is NaN or Inf: whose loss, and in which windows; a collective call.

    Args:
        micro_batches: this rank's of the step.
        iteration: the step's number, the first being 1.
        model: what the message calls the model that is trained.
    """
    windows = _windows(objective, micro_batches)
    parts = []
    # A window's entry: domain, window, whether the model's losses are finite, and the reference's.
    for place, subject in ((2, model), (3, "reference")):
        bad = [window for window in windows if not window[place]]
        if bad:
            places = windows_by_domain([(domain, number) for domain, number, _, _ in bad], names)
            parts.append(f"the {subject}'s loss of iteration {iteration} is NaN or Inf in {places}")
    if not any(not window[2] for window in windows):
        parts.append(f"the {model}'s own losses are finite: check the reference or its recorded losses")
    return NonFinite("\n      ".join([*parts, _batch(windows, names)]) + "\n" + _REMEDY)


def explain_gradient(
    objective: Objective, micro_batches: Sequence[MicroBatch], names: Sequence[str], iteration: int
) -> NonFinite:
    """The error for a step whose gradient is NaN or Inf although its losses are finite; a collective call."""
    return NonFinite(
        f"the gradient of iteration {iteration} is NaN or Inf, although every loss is finite; the step was not taken\n"
        f"      {_batch(_windows(objective, micro_batches), names)}\n{_REMEDY}"
    )


def _windows(objective: Objective, micro_batches: Sequence[MicroBatch]) -> list[tuple[int, int, bool, bool]]:
    """(domain, window, model's losses finite, reference's losses finite) of the global batch, in order."""
    topology, own = objective.context.topology, []
    if topology.rank == topology.loss_rank():
        for batch, finite in zip(micro_batches, objective.current.finite, strict=True):
            rows = zip(batch.domains.tolist(), batch.windows.tolist(), *finite.tolist(), strict=True)
            own += [row for row in rows if row[0] >= 0]
    return sorted(tuple(row) for part in gather_json(own) for row in part)


def windows_by_domain(windows: Sequence[tuple[int, int]], names: Sequence[str]) -> str:
    """Text that names (domain, window) pairs, some of each domain's."""
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
