"""What a training run prints at its end: what it did, what it learned, and where its results are."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_doremi.mixture.early_stop import FinalMean
from megatron_doremi.plan import RunPlan
from megatron_doremi.planning.describe import table
from megatron_doremi.progress import duration

_LISTED_DOMAINS = 12


def end_lines(
    plan: RunPlan,
    iteration: int,
    steps: int,
    seconds: float,
    last_loss: float | None,
    settled: FinalMean | None = None,
) -> list[str]:
    """What a finished run did, and where its results are.

    Args:
        iteration: steps that the run has taken in all.
        steps: steps since this program started.
        seconds: time that these took, with evaluations and checkpoints.
        last_loss: training loss of the last step, nats per token; None if no step was taken.
        settled: why a run that took fewer than all steps ended; else None.
    """
    run = plan.config.run
    early = [] if settled is None else [_early_stop(settled, plan.config.doremi.doremi_stop_drift)]
    if not steps:
        which = f"all {iteration:,}" if settled is None else f"the {iteration:,}"
        return [f"done: {which} steps were taken before; results in {run.save}", *early]
    tokens = steps * plan.step_tokens
    done = f"done: {steps:,} step{'s' if steps > 1 else ''}, {tokens:,} tokens in {duration(seconds)}"
    done += f" (after {iteration - steps:,} steps of earlier starts)" if steps < iteration else ""
    done += "" if last_loss is None else f"; last training loss {last_loss:.4f} nats per token"
    return [done, f"results in {run.save}; newest checkpoint: checkpoints/iter_{iteration:07}", *early]


def _early_stop(settled: FinalMean, drift: float) -> str:
    total, saved = settled.train_iters, settled.train_iters - settled.steps
    return (
        f"stopped early after {settled.steps:,} of {total:,} steps, {saved:,} saved ({saved / total:.0%}): the mean "
        f"weights of all steps are known to within {settled.half_width:.4f} (95 % interval; --doremi-stop-drift "
        f"{drift:g}); to take all steps, resume without this flag"
    )


def weights_table(
    names: tuple[str, ...], learned: NDArray[np.float64], natural: NDArray[np.float64], path: str
) -> list[str]:
    """The learned domain weights beside the natural ones, largest first.

    Args:
        names: of the k domains.
        learned, natural: [k] weights, sum 1.
        path: the file that holds all of them.
    """
    order = np.argsort(-learned, kind="stable")
    shown, uniform = order[:_LISTED_DOMAINS], 1.0 / len(names)
    columns = {
        "domain": [names[i] for i in shown],
        "learned": [f"{learned[i]:.4f}" for i in shown],
        "natural": [f"{natural[i]:.4f}" for i in shown],
        "uniform": [f"{uniform:.4f}" for _ in shown],
        "learned / natural": [f"{learned[i] / natural[i]:.2f}" if natural[i] else "-" for i in shown],
    }
    left = len(names) - len(shown)
    return [
        f"learned domain weights ({path}):",
        *table(columns),
        *([f"  and {left:,} more"] if left else []),
    ]
