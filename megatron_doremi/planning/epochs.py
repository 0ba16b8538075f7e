"""Epochs of each domain under a mixture: known before the first step, printed at the start, capped on demand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_doremi.errors import Fault, raise_if_any
from megatron_doremi.mixture.controller import MixtureController
from megatron_doremi.plan import RunPlan
from megatron_doremi.settings import TRAINING

# Domains that repeat only a few windows are not listed.
_LISTED_FROM = 1.05
_LISTED_DOMAINS = 10


def repetition_notice(names: Sequence[str], epochs: NDArray[np.float64]) -> str:
    """A line that lists the domains that repeat, most epochs first; empty if none repeats."""
    order = np.argsort(-epochs, kind="stable")
    repeated = [f"{names[i]} {epochs[i]:,.1f}" for i in order if epochs[i] > _LISTED_FROM]
    if not repeated:
        return ""
    left = len(repeated) - _LISTED_DOMAINS
    more = f", and {left:,} more" if left > 0 else ""
    return "epochs of domains that repeat: " + ", ".join(repeated[:_LISTED_DOMAINS]) + more


def check_repetition(plan: RunPlan, controller: MixtureController) -> str:
    """The `repetition_notice` of a training run, before anything is built.

    Raises:
        ConfigError: a domain repeats more often than --max-epochs-per-domain allows, or the cap cannot be checked,
            because the sampling weights are learned during the run.
    """
    config = plan.config
    if config.data.phase not in TRAINING:
        return ""
    cap = config.data.max_epochs_per_domain
    if not controller.samples_ahead:
        if cap:
            rule = "sampling weights that are known at the start"
            remedy = "leave it out, or sample by fixed weights (a proxy: --doremi-weighting reweight)"
            value = f"{cap:g} with sampling weights that are learned ({controller.method})"
            raise_if_any([Fault("--max-epochs-per-domain", value, rule, remedy)])
        return ""
    epochs = plan.epochs
    domains = (plan.names, epochs, plan.window_counts, plan.sampling_weights)
    faults = [
        Fault(
            f"domain {name!r}",
            f"{passes:,.2f} epochs: {plan.windows * weight:,.0f} of {count:,} windows",
            f"at most --max-epochs-per-domain {cap:g}",
            f"lower its weight ({weight:.4f}), add text, train fewer steps, or raise the cap",
        )
        for name, passes, count, weight in zip(*domains, strict=True)
        # A mixture fitted to the cap may exceed it by a rounding error.
        if cap and passes > cap * (1.0 + 1e-9)
    ]
    raise_if_any(faults)
    return repetition_notice(plan.names, epochs)
