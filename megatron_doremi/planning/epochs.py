"""How often a mixture repeats its domains: known before the first step, said at the start, and capped on demand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_doremi.errors import Fault, raise_if_any
from megatron_doremi.mixture.controller import MixtureController
from megatron_doremi.plan import RunPlan
from megatron_doremi.settings import TRAINING

# A domain that is read once and a few windows more is not worth a word.
_WORTH_A_WORD = 1.05


def repetition_notice(names: Sequence[str], epochs: NDArray[np.float64]) -> str:
    """A line that names the domains that repeat, most often first; empty where none does."""
    order = np.argsort(-epochs, kind="stable")
    repeated = [f"{names[i]} {epochs[i]:,.1f}" for i in order if epochs[i] > _WORTH_A_WORD]
    return "epochs of domains that repeat: " + ", ".join(repeated) if repeated else ""


def check_repetition(plan: RunPlan, controller: MixtureController) -> str:
    """The notice of a training run under its sampling weights, before anything is built.

    Raises:
        ConfigError: a domain repeats more often than --max-epochs-per-domain allows, or, where the weights are learned
            while they sample, nobody can say.
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
        # A mixture that was fitted to the cap may exceed it by a rounding.
        if cap and passes > cap * (1.0 + 1e-9)
    ]
    raise_if_any(faults)
    return repetition_notice(plan.names, epochs)
