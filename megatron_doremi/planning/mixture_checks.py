"""What makes a mixture meaningless or slow to learn, known before the first step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_doremi.errors import Fault
from megatron_doremi.mixture.controller import MixtureController
from megatron_doremi.plan import RunPlan

_LISTED = 3


def mixture_faults(plan: RunPlan, controller: MixtureController, held_out_counts: Sequence[int]) -> list[Fault]:
    """Faults of a training run whose mixture cannot be learned from its domains.

    Args:
        held_out_counts: [k] windows of each held-out stream.
    """
    faults = []
    if controller.learns and len(plan.names) == 1:
        value, rule = f"one domain, {plan.names[0]!r}", f"two domains or more: {controller.method} weighs them"
        remedy = "split the data by source (tools/preprocess_data.py --domain-key), or train --phase main"
        faults.append(Fault("--domains", value, rule, remedy))
    if controller.needs_held_out:
        without = [name for name, count in zip(plan.names, held_out_counts, strict=True) if not count]
        if without:
            rule = f"held-out text that fills a window in every domain: {controller.method} follows their losses"
            remedy = "run tools/preprocess_data.py with --split valid, or leave these domains out (--exclude-domains)"
            faults.append(Fault("--domains", f"none for {_listed(without)}", rule, remedy))
    return faults


def mixture_warnings(plan: RunPlan, controller: MixtureController) -> list[str]:
    """Warnings about a training run whose domains are one, or more than its batches hold."""
    count, batch = len(plan.names), plan.global_batch_size
    if count == 1:
        return [f"one domain, {plan.names[0]!r}: every mixture is the same"]
    lines = []
    if count > batch:
        lines.append(
            f"{count:,} domains, but {batch:,} windows in a step: a step reads at most {batch:,} of them; over many "
            "steps each gets its share"
        )
    if controller.learns:
        shares = batch * plan.sampling_weights
        # A share of one window up to rounding is in every batch.
        rare = np.flatnonzero(shares < 1.0 - 1e-9)
        if len(rare):
            first = rare[np.argsort(shares[rare], kind="stable")]
            examples = ", ".join(f"{plan.names[i]!r} every {1.0 / shares[i]:,.1f} steps" for i in first[:_LISTED])
            lines.append(
                f"{len(rare):,} of {count:,} domains are missing from some batches ({examples}): in between, their "
                f"last loss moves the weights; give --global-batch-size {_batch_for(plan):,} or more"
            )
    return lines


def _batch_for(plan: RunPlan) -> int:
    """The smallest global batch, in micro-batches of this layout, in which every domain has a window."""
    step = plan.batch_shape[0] * plan.topology.data_size
    smallest = float(plan.sampling_weights.min())
    return step * int(np.ceil((1.0 - 1e-9) / (smallest * step)))


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(map(repr, names[:_LISTED])) + (f" and {more:,} more" if more > 0 else "")
