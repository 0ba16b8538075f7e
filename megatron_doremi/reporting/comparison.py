"""Compares a main model trained on DoReMi's weights with a baseline. Pure: nothing is read, written or drawn here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_doremi.data.manifest import Domain
from megatron_doremi.errors import Fault, raise_if_any
from megatron_doremi.reporting.differences import Difference, differences, similar_names_note
from megatron_doremi.reporting.evaluations import Evaluation
from megatron_doremi.reporting.runs import Floats, Run, find_number

# Two planted domains of the embedded corpus need little weight: one cannot be learned, the other is learned at once.
PLANTED = ("noise", "boilerplate")
# The run accumulates its mean and the report computes it from the trajectory: they differ by rounding.
SAME_MEAN = 1e-6


@dataclass(frozen=True)
class Pair:
    """A held-out loss of both models in nats per token; None if it was not measured."""

    baseline: float | None
    main: float | None

    @property
    def difference(self) -> float | None:
        """main - baseline in nats per token; negative if main is better."""
        return None if self.baseline is None or self.main is None else self.main - self.baseline


@dataclass(frozen=True)
class DomainResult:
    """A row of the table.

    Attributes:
        name: the domain.
        tokens: training tokens.
        natural_weight: the domain's share of all training tokens.
        doremi_weight: mean of alpha_t over all steps.
        last_weight: alpha_t at the proxy's last step.
        loss: last held-out loss of both models, nats per token.
    """

    name: str
    tokens: int
    natural_weight: float
    doremi_weight: float
    last_weight: float
    loss: Pair

    @property
    def planted(self) -> bool:
        """Whether this is one of the embedded corpus's planted domains."""
        return self.name in PLANTED


@dataclass(frozen=True)
class Comparison:
    """Everything that the table and the statements are made from.

    Attributes:
        domains: in the manifest's order.
        uniform_mean: mean over the domains that both models were evaluated on.
        worst: highest loss among them.
        worst_names: the domain with that loss, for baseline and main.
        token_mean: mean over held-out tokens, as recorded by the runs.
        iterations: step of the last evaluation of baseline and main.
        notes: limits of the comparison, in sentences.
        differences: configuration and data in which baseline and main differ.
    """

    domains: tuple[DomainResult, ...]
    uniform_mean: Pair
    worst: Pair
    worst_names: tuple[str, str]
    token_mean: Pair
    iterations: tuple[int, int]
    notes: tuple[str, ...]
    differences: tuple[Difference, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Domain names in the manifest's order."""
        return tuple(domain.name for domain in self.domains)

    @property
    def uniform_weight(self) -> float:
        """1 / k."""
        return 1.0 / len(self.domains)


def running_mean(values: Floats) -> Floats:
    """Returns the mean of all rows up to each row: [steps, domains] to [steps, domains].

    NaN values are skipped; the mean is NaN until a column's first number.
    """
    present = ~np.isnan(values)
    counts = np.cumsum(present, axis=0)
    sums = np.cumsum(np.where(present, values, 0.0), axis=0)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def mean_and_last_weights(run: Run, names: Sequence[str]) -> tuple[Floats, Floats]:
    """Returns the mean over all steps and the last weights of a proxy, each [domains] in `names`' order.

    The mean is read from domain_weights.json if the run has written it, since a main run trains on that file;
    otherwise it is computed from the trajectory.
    """
    trajectory = run.weights.ordered(names)
    if run.recorded_weights is None:
        mean = running_mean(trajectory)[-1]
    else:
        mean = np.array([run.recorded_weights[name] for name in names])
    return mean, trajectory[-1]


def smoothing_floor(run: Run, domain_count: int) -> float | None:
    """Returns c / k, the lower bound of every weight; None if the run does not record the smoothing c."""
    smoothing = find_number(run.weights_provenance, "smoothing")
    if smoothing is None:
        smoothing = find_number(run.config, "smoothing")
    return None if smoothing is None else smoothing / domain_count


def compare(manifest: Sequence[Domain], proxy: Run, main: Run, baseline: Run) -> Comparison:
    """Compares the runs. Raises a ConfigError with every reason why they cannot be compared."""
    names = [domain.name for domain in manifest]
    raise_if_any(_faults(names, proxy, main, baseline))
    mean, last = mean_and_last_weights(proxy, names)
    total = sum(domain.tokens for domain in manifest)
    main_eval, baseline_eval = main.evaluations[-1], baseline.evaluations[-1]
    domains = tuple(
        DomainResult(
            domain.name,
            domain.tokens,
            domain.tokens / total,
            float(mean[index]),
            float(last[index]),
            Pair(baseline_eval.losses.get(domain.name), main_eval.losses.get(domain.name)),
        )
        for index, domain in enumerate(manifest)
    )
    shared = [name for name in names if name in main_eval.losses and name in baseline_eval.losses]
    baseline_shared, main_shared = _restricted_to(baseline_eval, shared), _restricted_to(main_eval, shared)
    return Comparison(
        domains,
        Pair(baseline_shared.uniform_mean, main_shared.uniform_mean),
        Pair(baseline_shared.worst[1], main_shared.worst[1]),
        (baseline_shared.worst[0], main_shared.worst[0]),
        Pair(baseline_eval.token_mean, main_eval.token_mean),
        (baseline_eval.iteration, main_eval.iteration),
        tuple(_notes(names, shared, proxy, main, baseline)),
        differences({"baseline": baseline, "main": main}),
    )


def uniform_mean_without(comparison: Comparison, excluded: Iterable[str]) -> Pair:
    """Returns the mean over the domains that were measured for both models, except `excluded`."""
    skip = set(excluded)
    pairs = [domain.loss for domain in comparison.domains if domain.name not in skip]
    both = [(p.baseline, p.main) for p in pairs if p.baseline is not None and p.main is not None]
    if not both:
        return Pair(None, None)
    return Pair(sum(b for b, _ in both) / len(both), sum(m for _, m in both) / len(both))


def _restricted_to(evaluation: Evaluation, names: Sequence[str]) -> Evaluation:
    losses = {name: evaluation.losses[name] for name in names}
    return replace(evaluation, losses=losses)


def _faults(names: Sequence[str], proxy: Run, main: Run, baseline: Run) -> list[Fault]:
    faults = []
    if not proxy.has_weights:
        rule = "needs training lines with domain_weights, as a run of --phase proxy writes"
        faults.append(Fault("--proxy", f"{proxy.path} (phase {proxy.phase})", rule, "give the proxy's folder"))
    else:
        faults += _name_faults("--proxy", f"{proxy.path}/metrics.jsonl", names, proxy.weights.names, True)
        if proxy.recorded_weights is not None:
            file = f"{proxy.path}/domain_weights.json"
            faults += _name_faults("--proxy", file, names, tuple(proxy.recorded_weights), True)
    for flag, run in (("--main", main), ("--baseline", baseline)):
        if run.evaluations:
            evaluated = tuple(run.evaluations[-1].losses)
            faults += _name_faults(flag, f"{run.path}/metrics.jsonl", names, evaluated, False)
            faults += _diverged_faults(flag, run)
        else:
            remedy = "train it with held-out text, or run --phase evaluate --load DIR --save DIR with this folder"
            rule = "needs at least one evaluation line in metrics.jsonl"
            faults.append(Fault(flag, str(run.path), rule, remedy))
    if not faults and not set(main.evaluations[-1].losses) & set(baseline.evaluations[-1].losses):
        rule = "must share at least one evaluated domain"
        faults.append(Fault("--main and --baseline", "", rule, "evaluate both on the same manifest"))
    return faults


def _name_faults(flag: str, file: str, expected: Sequence[str], names: Sequence[str], complete: bool) -> list[Fault]:
    """Faults of a file's domain names, compared with the manifest's; without `complete`, some may be missing."""
    missing = [name for name in expected if name not in names] if complete else []
    unknown = [name for name in names if name not in expected]
    if not missing and not unknown:
        return []
    parts = [f"missing: {', '.join(missing)}"] * bool(missing)
    parts += [f"not in the manifest: {', '.join(unknown)}"] * bool(unknown)
    remedy = "give --domains the manifest that the runs were trained on"
    rule = "domain names must be the manifest's"
    return [Fault(flag, f"{file}: {'; '.join(parts)}", rule, remedy)]


def _diverged_faults(flag: str, run: Run) -> list[Fault]:
    losses = run.evaluations[-1].losses
    diverged = [name for name, loss in losses.items() if not np.isfinite(loss)]
    if not diverged:
        return []
    remedy = "the run has diverged: train it again, for instance with a lower --lr"
    value = f"{run.path}, step {run.evaluations[-1].iteration}: {', '.join(diverged)}"
    return [Fault(flag, value, "the last held-out losses must be finite numbers", remedy)]


def _notes(names: Sequence[str], shared: Sequence[str], proxy: Run, main: Run, baseline: Run) -> Iterable[str]:
    steps = baseline.evaluations[-1].iteration, main.evaluations[-1].iteration
    tokens = _last_tokens(baseline), _last_tokens(main)
    if steps[0] != steps[1]:
        yield f"The budgets differ: the baseline was evaluated at step {steps[0]}, main at step {steps[1]}."
    elif None not in tokens and tokens[0] != tokens[1]:
        yield f"The budgets differ: {tokens[0]:,.0f} tokens for the baseline, {tokens[1]:,.0f} for main."
    for difference in differences({"baseline": baseline, "main": main}):
        yield difference.sentence()
    similar = similar_names_note(names)
    if similar is not None:
        yield similar
    if len(shared) < len(names):
        missing = ", ".join(name for name in names if name not in shared)
        yield f"Not evaluated for both models, and so excluded from uniform mean and worst domain: {missing}."
    if proxy.recorded_weights is not None:
        mean = running_mean(proxy.weights.ordered(names))[-1]
        recorded = np.array([proxy.recorded_weights[name] for name in names])
        gap = float(np.nanmax(np.abs(mean - recorded)))
        if gap > SAME_MEAN:
            yield (
                "domain_weights.json differs from the mean of the trajectory in metrics.jsonl by up to "
                f"{gap:.2g}: it is from the last checkpoint, or lines are missing. The table shows the file's weights."
            )


def _last_tokens(run: Run) -> float | None:
    tokens = run.scalars.get("consumed_tokens")
    if tokens is None or tokens.size == 0 or np.isnan(tokens[-1]):
        return None
    return float(tokens[-1])


def comparison_as_data(comparison: Comparison) -> dict[str, Any]:
    """Returns the table as plain data for results.json; losses in nats per token, None if not measured."""
    rows = [
        {
            "name": domain.name,
            "tokens": domain.tokens,
            "natural_weight": domain.natural_weight,
            "doremi_weight": domain.doremi_weight,
            "last_weight": domain.last_weight,
            **_pair_as_data(domain.loss),
        }
        for domain in comparison.domains
    ]
    worst = _pair_as_data(comparison.worst)
    worst["baseline_domain"], worst["main_domain"] = comparison.worst_names
    return {
        "domains": rows,
        "uniform_mean": _pair_as_data(comparison.uniform_mean),
        "worst": worst,
        "token_mean": _pair_as_data(comparison.token_mean),
        "differences": {difference.name: difference.values for difference in comparison.differences},
        "evaluated_at": {"baseline": comparison.iterations[0], "main": comparison.iterations[1]},
    }


def _pair_as_data(pair: Pair) -> dict[str, Any]:
    return {"baseline_loss": pair.baseline, "main_loss": pair.main, "difference": pair.difference}
