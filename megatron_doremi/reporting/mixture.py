"""The weights that a proxy learned, and how often a mixture repeats each domain. Pure: nothing is read here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from megatron_doremi.reporting.runs import Floats, Run, find_number

# The run accumulates its mean and the report computes it from the trajectory: they differ by rounding.
SAME_MEAN = 1e-6


def running_mean(values: Floats) -> Floats:
    """Returns the mean of all rows up to each row: [steps, domains] to [steps, domains].

    NaN values are skipped; the mean is NaN until a column's first number.
    """
    present = ~np.isnan(values)
    counts = np.cumsum(present, axis=0)
    sums = np.cumsum(np.where(present, values, 0.0), axis=0)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def entropy(weights: Floats) -> Floats:
    """Returns the entropy of each row in nats: [steps, domains] to [steps]; NaN where a row sums to 0 or holds NaN.

    exp(entropy) is the number of domains with equal weights that would have the same entropy.
    """
    totals = weights.sum(axis=1, keepdims=True)
    shares = np.divide(weights, totals, out=np.full_like(weights, np.nan), where=totals > 0)
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    return -(shares * logs).sum(axis=1)


def learned_weights(run: Run) -> dict[str, float]:
    """Returns the mean over all steps of a proxy's weights, by domain.

    It is read from domain_weights.json if that has the run's domains, since a main run trains on that file; otherwise
    it is computed from the trajectory.
    """
    names = run.weights.names
    if run.recorded_weights is not None and set(run.recorded_weights) == set(names):
        return {name: run.recorded_weights[name] for name in names}
    return dict(zip(names, running_mean(run.weights.values)[-1].tolist(), strict=True))


def last_weights(run: Run) -> dict[str, float]:
    """Returns alpha_t at a proxy's last step, by domain."""
    return dict(zip(run.weights.names, run.weights.values[-1].tolist(), strict=True))


def weights_file_note(run: Run, label: str) -> str | None:
    """A sentence if domain_weights.json is not the mean of the trajectory in metrics.jsonl, or is of an early stop."""
    if run.recorded_weights is None:
        return None
    early = run.weights_provenance.get("early_stop")
    if isinstance(early, dict):
        steps, planned = (find_number(run.weights_provenance, name) for name in ("steps", "train_iters"))
        error = find_number(early, "half_width")
        if steps is not None and planned is not None and error is not None:
            return (
                f"{label} stopped early, after {steps:,.0f} of {planned:,.0f} steps: its learned weights are the mean "
                f"over all of them, extrapolated, within {error:.4f} (95 %); domain_weights.json has each domain's "
                "interval."
            )
    if set(run.recorded_weights) != set(run.weights.names):
        return f"domain_weights.json of {label} has other domains than its metrics.jsonl; the trajectory's mean counts."
    recorded = np.array([run.recorded_weights[name] for name in run.weights.names])
    gap = float(np.nanmax(np.abs(running_mean(run.weights.values)[-1] - recorded)))
    if gap <= SAME_MEAN:
        return None
    return (
        f"domain_weights.json of {label} differs from the mean of the trajectory in metrics.jsonl by up to {gap:.2g}: "
        "it is from the last checkpoint, or lines are missing. The report shows the file's weights."
    )


def smoothing_floor(run: Run, domain_count: int) -> float | None:
    """Returns c / k, the lower bound of every weight; None if the run does not record the smoothing c."""
    smoothing = find_number(run.weights_provenance, "smoothing")
    if smoothing is None:
        smoothing = find_number(run.config, "smoothing")
    return None if smoothing is None else smoothing / domain_count


def trained_tokens(run: Run) -> float | None:
    """Returns the tokens that a run has read; None if its training lines do not record them."""
    tokens = run.scalars.get("consumed_tokens")
    if tokens is None or tokens.size == 0 or np.isnan(tokens[-1]):
        return None
    return float(tokens[-1])


def epochs(run: Run, domain_tokens: Mapping[str, int]) -> dict[str, float]:
    """Returns how often a run that samples by given weights has read each domain; {} if that is not recorded.

    Args:
        domain_tokens: training tokens of each domain.
    """
    weights, tokens = mean_sampling_weights(run), trained_tokens(run)
    if not weights or tokens is None:
        return {}
    return {name: weights[name] * tokens / count for name, count in domain_tokens.items() if count and name in weights}


def mean_sampling_weights(run: Run) -> dict[str, float]:
    """Returns the mean over a run's steps of its sampling weights, which --change-domain-weights changes on the way.

    {} if config.json does not record them.
    """
    now = run.sampling_weights
    if now is None or not run.iterations.size:
        return {}
    last, begun, parts = int(run.iterations[-1]), 0, []
    for iteration, before in sorted(_changes(run), key=lambda change: change[0]):
        parts.append((min(iteration, last) - begun, before))
        begun = min(iteration, last)
    parts.append((last - begun, now))
    means = dict.fromkeys(now, 0.0)
    for steps, weights in parts:
        total = sum(weights.values())
        for name in means if steps and total else ():
            means[name] += steps / last * weights.get(name, 0.0) / total
    return means


def _changes(run: Run) -> list[tuple[int, dict[str, float]]]:
    """(last step, weights) of each mixture that was changed after it, from the overrides in config.json."""
    entries = run.config.get("overrides")
    changes = []
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict) and entry.get("name") == "sampling_weights":
            iteration, before = entry.get("iteration"), entry.get("before")
            if isinstance(iteration, int) and isinstance(before, dict):
                changes.append((iteration, {name: x for name, x in before.items() if isinstance(x, int | float)}))
    return changes


def natural_weights(domain_tokens: Mapping[str, int]) -> dict[str, float]:
    """Returns each domain's share of the training tokens."""
    total = sum(domain_tokens.values())
    return {name: count / total if total else float("nan") for name, count in domain_tokens.items()}


def mean_by_domain(mixtures: Sequence[Mapping[str, float]], name: str) -> list[float]:
    """Returns a domain's value in each mixture that has it."""
    return [mixture[name] for mixture in mixtures if name in mixture]
