"""Early stop on proxies that took all of their steps: where --doremi-stop-drift would have ended them, and the error.

    python benchmarks/early_stop.py PROXY... [--drift 0.01 0.02 0.03]

PROXY is the --save folder of a proxy. Its metrics.jsonl holds the weights of every step, so the program's own rule
(megatron_doremi/mixture/early_stop.py) can be asked at every step at which it checks, and its answer compared with the
mean that the run reached. Prints for each proxy and each drift the step of the stop, what it saves, the largest error
of any weight, the half-width that was promised, the domains whose interval holds the truth, and what the mean so far,
without extrapolation, is off. Then the coverage over all checks, for this estimate and for a plain one: the mean of the
window stands for the steps to come, with the standard error of batch means. Last the spread of the final weights
between proxies of the same domains, which an early stop should not add much to.

benchmarks/early_stop.sh trains such proxies.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_doremi.mixture.early_stop import GROUPS, EarlyStop, FinalMean
from megatron_doremi.optimizer_settings import OptimizerConfig
from megatron_doremi.reporting.runs import read_run
from megatron_doremi.student_t import student_t_quantile

# Only the smallest error is asked for, so that every check is answered and none ends the run.
_NEVER = 1e-12


@dataclass(frozen=True)
class Proxy:
    """A proxy that took all of its steps.

    Attributes:
        name: its folder.
        domains: names of the k domains.
        weights: [steps, k] alpha_t.
        warmup: steps in which the learning rate rose.
    """

    name: str
    domains: tuple[str, ...]
    weights: NDArray[np.float64]
    warmup: int

    @property
    def final(self) -> NDArray[np.float64]:
        """[k] the mean over all steps."""
        return self.weights.mean(axis=0)

    def checks(self) -> Iterator[tuple[FinalMean, int]]:
        """The answer of every check, and the steps of its groups."""
        total = len(self.weights)
        early_stop, sums = EarlyStop(_NEVER, total, self.warmup), np.cumsum(self.weights, axis=0)
        for step in range(1, total):
            early_stop.observe(step, torch.from_numpy(sums[step - 1]))
            group = early_stop.group_steps(step)
            if early_stop.estimate is not None and group is not None:
                yield early_stop.estimate, group


def read_proxy(folder: Path) -> Proxy:
    """Reads the weights of every step. Raises SystemExit if the run has not taken all of its steps."""
    run = read_run(folder, "PROXY")
    total, steps, domains = run.config["identity"]["train_iters"], len(run.iterations), tuple(run.config["domains"])
    weights = run.weights.ordered(domains)
    if run.iterations.tolist() != list(range(1, total + 1)) or not np.isfinite(weights).all():
        raise SystemExit(f"error: {folder} has the weights of {steps:,} of {total:,} steps")
    warmup = OptimizerConfig(**run.config["settings"]["optimizer"]).warmup_steps(total)
    return Proxy(str(folder), domains, weights, warmup)


def plain_half_width(proxy: Proxy, steps: int, group: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The plain estimate of the final mean and half its 95 % interval: no drift, the noise of batch means."""
    total, rest = len(proxy.weights), len(proxy.weights) - steps
    window = proxy.weights[steps - GROUPS * group : steps].reshape(GROUPS, group, -1).mean(axis=1)
    mean = (proxy.weights[:steps].sum(axis=0) + rest * window.mean(axis=0)) / total
    noise = np.sqrt(window.var(axis=0, ddof=1) * (1 / GROUPS + group / rest))
    return mean, student_t_quantile(GROUPS - 1) * noise * rest / total


def stop_rows(proxies: list[Proxy], drift: float) -> list[list[str]]:
    """A row for each proxy: what the first check that is good enough for `drift` would have given."""
    rows = []
    for proxy in proxies:
        final = proxy.final
        for answer, _ in proxy.checks():
            if answer.half_width <= drift:
                held = (answer.low <= final) & (final <= answer.high)
                errors = [np.abs(mean - final).max() for mean in (answer.mean, answer.so_far)]
                saved = 1 - answer.steps / answer.train_iters
                figures = [f"{x:.4f}" for x in (answer.half_width, errors[0])]
                rows.append(
                    [proxy.name, f"{answer.steps:,}", f"{saved:.0%}", *figures, f"{held.sum()} of {len(final)}"]
                    + [f"{errors[1]:.4f}"]
                )
                break
        else:
            rows.append([proxy.name, "never", "0%", "-", "-", "-", "-"])
    return rows


def coverage(proxies: list[Proxy]) -> list[list[str]]:
    """Coverage over all checks, by the part of the run that was taken."""
    bins = [(0.25, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 1.0)]
    rows = []
    for low, high in bins:
        held: list[NDArray[np.bool_]] = []
        plain_held: list[NDArray[np.bool_]] = []
        widths: list[float] = []
        for proxy in proxies:
            final = proxy.final
            for answer, group in proxy.checks():
                if low <= answer.steps / answer.train_iters < high:
                    held.append((answer.low <= final) & (final <= answer.high))
                    mean, half = plain_half_width(proxy, answer.steps, group)
                    plain_held.append(np.abs(mean - final) <= half)
                    widths.append(answer.half_width)
        if held:
            every, plain = np.concatenate(held), np.concatenate(plain_held)
            joint = np.mean([each.all() for each in held])
            median = float(np.median(widths))
            rows.append(
                [f"{low:.0%} to {high:.0%}", f"{len(held):,}", f"{median:.4f}", f"{every.mean():.1%}", f"{joint:.1%}"]
                + [f"{plain.mean():.1%}"]
            )
    return rows


def spread(proxies: list[Proxy]) -> list[list[str]]:
    """The standard deviation over proxies of the same domains and length, which seeds tell apart."""
    alike: dict[tuple[tuple[str, ...], int], list[Proxy]] = {}
    for proxy in proxies:
        alike.setdefault((proxy.domains, len(proxy.weights)), []).append(proxy)
    rows = []
    for (domains, steps), group in alike.items():
        if len(group) > 1:
            deviations = np.std([proxy.final for proxy in group], axis=0, ddof=1)
            shown = f"{len(domains)}, {domains[int(deviations.argmax())]}"
            rows.append([f"{len(group)}", shown, f"{steps:,}", f"{deviations.max():.4f}", f"{deviations.mean():.4f}"])
    return rows


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table of Markdown, aligned."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def main() -> None:
    """Reads the proxies and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("proxies", nargs="+", type=Path, metavar="PROXY", help="--save folder of a finished proxy")
    parser.add_argument("--drift", nargs="+", type=float, default=[0.01, 0.02, 0.03], help="values of the rule")
    args = parser.parse_args()
    proxies = [read_proxy(folder) for folder in args.proxies]
    for drift in args.drift:
        if not 0.0 < drift < 1.0 or math.isnan(drift):
            raise SystemExit(f"error: --drift {drift}: give a number between 0 and 1")
        print(f"\n--doremi-stop-drift {drift:g}")
        header = ["proxy", "stops at", "saved", "half-width", "largest error", "held", "error of the mean so far"]
        print(table(header, stop_rows(proxies, drift)))
    print("\nAll checks")
    header = ["steps taken", "checks", "half-width", "domains held", "all domains held", "plain estimate: domains held"]
    print(table(header, coverage(proxies)))
    print("\nStandard deviation of the final weights between proxies of the same domains and steps")
    header = ["proxies", "domains, the noisiest", "steps", "of the noisiest", "mean over domains"]
    print(table(header, spread(proxies)))


if __name__ == "__main__":
    main()
