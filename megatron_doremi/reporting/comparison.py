"""Sets a main model on DoReMi's weights beside a baseline: numbers only, nothing is written or drawn here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_doremi.data.manifest import Domain
from megatron_doremi.errors import Fault, raise_if_any
from megatron_doremi.reporting.differences import Difference, differences, look_alike
from megatron_doremi.reporting.evaluations import Evaluation
from megatron_doremi.reporting.runs import Floats, Run, find_number

# Two planted domains of the embedded corpus need little weight: one cannot be learned, one is at once.
PLANTED = ("noise", "boilerplate")
# The run sums its mean and the report takes its own from the trajectory: they differ by rounding.
SAME_MEAN = 1e-6


@dataclass(frozen=True)
class Pair:
    """A held-out loss of both models in nats a token, None where it was not measured."""

    baseline: float | None
    main: float | None

    @property
    def difference(self) -> float | None:
        """main - baseline in nats a token; negative where main is better."""
        return None if self.baseline is None or self.main is None else self.main - self.baseline


@dataclass(frozen=True)
class DomainResult:
    """A row of the table.

    Attributes:
        name: the domain.
        tokens: training tokens.
        natural_weight: its share of all training tokens.
        doremi_weight: mean of alpha_t over all steps.
        last_weight: alpha_t at the proxy's last step.
        loss: last held-out loss of both models, nats a token.
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
    """Everything the table and the words are made from.

    Attributes:
        domains: in the manifest's order.
        uniform_mean: mean over the domains that both models were evaluated on.
        worst: highest loss among them.
        worst_names: the domain of it, for baseline and main.
        token_mean: mean over held-out tokens as the runs wrote it.
        iterations: step of the last evaluation of baseline and main.
        notes: what limits the comparison, in sentences.
        differences: what baseline and main do not have in common.
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
    """Returns the mean of all rows up to each row: [steps, domains] to the same.

    NaN entries are skipped; a column without any number so far is NaN.
    """
    present = ~np.isnan(values)
    counts = np.cumsum(present, axis=0)
    sums = np.cumsum(np.where(present, values, 0.0), axis=0)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def mean_and_last_weights(run: Run, names: Sequence[str]) -> tuple[Floats, Floats]:
    """Returns the mean over all steps and the last weights of a proxy, each [domains] in `names`' order.

    The mean is domain_weights.json's where the run has written one, since that is what a main run trains on;
    else it is taken from the trajectory.
    """
    trajectory = run.weights.ordered(names)
    if run.recorded_weights is None:
        mean = running_mean(trajectory)[-1]
    else:
        mean = np.array([run.recorded_weights[name] for name in names])
    return mean, trajectory[-1]


def smoothing_floor(run: Run, domain_count: int) -> float | None:
    """Returns c / k, which no weight goes below; None where the run does not record c."""
    smoothing = find_number(run.weights_provenance, "smoothing")
    if smoothing is None:
        smoothing = find_number(run.config, "smoothing")
    return None if smoothing is None else smoothing / domain_count


def compare(manifest: Sequence[Domain], proxy: Run, main: Run, baseline: Run) -> Comparison:
    """Builds the comparison, or raises a ConfigError with every reason why it cannot be built."""
    names = [domain.name for domain in manifest]
    raise_if_any(_faults(names, proxy, main, baseline))
    mean, last = mean_and_last_weights(proxy, names)
    total = sum(domain.tokens for domain in manifest)
    of_main, of_baseline = main.evaluations[-1], baseline.evaluations[-1]
    domains = tuple(
        DomainResult(
            domain.name,
            domain.tokens,
            domain.tokens / total,
            float(mean[index]),
            float(last[index]),
            Pair(of_baseline.losses.get(domain.name), of_main.losses.get(domain.name)),
        )
        for index, domain in enumerate(manifest)
    )
    shared = [name for name in names if name in of_main.losses and name in of_baseline.losses]
    baseline_shared, main_shared = _only(of_baseline, shared), _only(of_main, shared)
    return Comparison(
        domains,
        Pair(baseline_shared.uniform_mean, main_shared.uniform_mean),
        Pair(baseline_shared.worst[1], main_shared.worst[1]),
        (baseline_shared.worst[0], main_shared.worst[0]),
        Pair(of_baseline.token_mean, of_main.token_mean),
        (of_baseline.iteration, of_main.iteration),
        tuple(_notes(names, shared, proxy, main, baseline)),
        differences({"baseline": baseline, "main": main}),
    )


def uniform_mean_without(comparison: Comparison, left_out: Iterable[str]) -> Pair:
    """Returns the mean over domains without `left_out`, of those measured for both models."""
    skip = set(left_out)
    pairs = [domain.loss for domain in comparison.domains if domain.name not in skip]
    both = [(p.baseline, p.main) for p in pairs if p.baseline is not None and p.main is not None]
    if not both:
        return Pair(None, None)
    return Pair(sum(b for b, _ in both) / len(both), sum(m for _, m in both) / len(both))


def _only(evaluation: Evaluation, names: Sequence[str]) -> Evaluation:
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
    for what, run in (("--main", main), ("--baseline", baseline)):
        if run.evaluations:
            evaluated = tuple(run.evaluations[-1].losses)
            faults += _name_faults(what, f"{run.path}/metrics.jsonl", names, evaluated, False)
            faults += _diverged_faults(what, run)
        else:
            remedy = "train it with held-out text, or run --phase evaluate --load DIR --save DIR with this folder"
            rule = "needs at least one evaluation line in metrics.jsonl"
            faults.append(Fault(what, str(run.path), rule, remedy))
    if not faults and not set(main.evaluations[-1].losses) & set(baseline.evaluations[-1].losses):
        rule = "must share at least one evaluated domain"
        faults.append(Fault("--main and --baseline", "", rule, "evaluate both on the same manifest"))
    return faults


def _name_faults(what: str, file: str, expected: Sequence[str], found: Sequence[str], complete: bool) -> list[Fault]:
    """Faults of `found` names against the manifest's; without `complete`, some may be missing."""
    missing = [name for name in expected if name not in found] if complete else []
    left_over = [name for name in found if name not in expected]
    if not missing and not left_over:
        return []
    parts = [f"missing: {', '.join(missing)}"] * bool(missing)
    parts += [f"not in the manifest: {', '.join(left_over)}"] * bool(left_over)
    remedy = "give --domains the manifest that the runs were trained on"
    rule = "domain names must be the manifest's"
    return [Fault(what, f"{file}: {'; '.join(parts)}", rule, remedy)]


def _diverged_faults(what: str, run: Run) -> list[Fault]:
    losses = run.evaluations[-1].losses
    diverged = [name for name, loss in losses.items() if not np.isfinite(loss)]
    if not diverged:
        return []
    remedy = "the run has diverged: train it again, with a lower --lr for instance"
    value = f"{run.path}, step {run.evaluations[-1].iteration}: {', '.join(diverged)}"
    return [Fault(what, value, "the last held-out losses must be finite numbers", remedy)]


def _notes(names: Sequence[str], shared: Sequence[str], proxy: Run, main: Run, baseline: Run) -> Iterable[str]:
    steps = baseline.evaluations[-1].iteration, main.evaluations[-1].iteration
    tokens = _last_tokens(baseline), _last_tokens(main)
    if steps[0] != steps[1]:
        yield f"The budgets differ: the baseline was evaluated at step {steps[0]}, main at step {steps[1]}."
    elif None not in tokens and tokens[0] != tokens[1]:
        yield f"The budgets differ: {tokens[0]:,.0f} tokens for the baseline, {tokens[1]:,.0f} for main."
    for difference in differences({"baseline": baseline, "main": main}):
        yield difference.sentence()
    alike = look_alike(names)
    if alike is not None:
        yield alike
    if len(shared) < len(names):
        missing = ", ".join(name for name in names if name not in shared)
        yield f"Not evaluated for both models, and so left out of uniform mean and worst domain: {missing}."
    if proxy.recorded_weights is not None:
        mean = running_mean(proxy.weights.ordered(names))[-1]
        recorded = np.array([proxy.recorded_weights[name] for name in names])
        gap = float(np.nanmax(np.abs(mean - recorded)))
        if gap > SAME_MEAN:
            yield (
                "domain_weights.json differs from the mean of the trajectory in metrics.jsonl by up to "
                f"{gap:.2g}: it is the last checkpoint's, or lines are missing. The table shows the file's."
            )


def _last_tokens(run: Run) -> float | None:
    tokens = run.scalars.get("consumed_tokens")
    if tokens is None or tokens.size == 0 or np.isnan(tokens[-1]):
        return None
    return float(tokens[-1])


def comparison_as_data(comparison: Comparison) -> dict[str, Any]:
    """Returns the table as plain data for results.json; losses in nats a token, None where not measured."""
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
