"""Static mixtures: weights computed before training from the domains' sizes and the run's budget, or read from a file.

With N_i the tokens of domain i, B the tokens that a run reads, and E the maximum number of epochs of a domain:

    uniform        1 / k
    natural        N_i / sum_j N_j
    temperature:T  N_i^(1/T) / sum_j N_j^(1/T): natural for T = 1, approaches uniform as T grows
    unimax         as uniform as the caps E N_i allow (UniMax, Chung et al. 2023, arXiv 2304.09151, Algorithm 1)
    given          the weights in a list 'weight prefix weight prefix ...'
    A=0.5,B=0.5    these weights, by domain name; 0 leaves a domain out
    FILE           the weights in a weights file; FILE.csv@RUN: in a table's row of this run
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np
from numpy.typing import NDArray

from megatron_doremi.data.given_weights import is_inline
from megatron_doremi.data.manifest import Manifest
from megatron_doremi.data.weights_file import SMALLEST_SHARE, inline_weights, load_weights, shares_of
from megatron_doremi.errors import ConfigError, Fault
from megatron_doremi.mixture.controller import MixtureController
from megatron_doremi.settings import UNIMAX

_WITHOUT_PARAMETER = ("given", "uniform", "natural", UNIMAX)
_TEMPERATURE = "temperature:"
_NAMES = "uniform, natural, temperature:T, unimax"


def names_domains(setting: str) -> bool:
    """Whether --domain-weights gives weights by name, inline or in a file; "" is the phase's default mixture."""
    return setting not in ("", *_WITHOUT_PARAMETER) and not setting.startswith(_TEMPERATURE)


def is_weights_file(setting: str) -> bool:
    """Whether --domain-weights names a file."""
    return names_domains(setting) and not is_inline(setting)


def similar_mixture(path: str) -> str | None:
    """The mixture that a path of --domain-weights looks like a misspelling of; None if it looks like none."""
    name = path.partition(":")[0]
    if "." in name or os.sep in path:
        return None
    matches = get_close_matches(name, [*_WITHOUT_PARAMETER, "temperature"], n=1, cutoff=0.7)
    similar = matches[0] if matches else None
    return "temperature:T, for example temperature:3" if similar == "temperature" else similar


@dataclass(frozen=True)
class Budget:
    """The budget that `unimax` divides among the domains.

    Attributes:
        tokens: B, tokens that the run reads in total.
        domain_tokens: [k] N_i, tokens in the windows of one epoch of each domain.
        max_epochs: E, maximum number of epochs of a domain.
    """

    tokens: int
    domain_tokens: Sequence[int]
    max_epochs: float


class StaticMixture(MixtureController):
    """Sampling weights that never change; the loss is the mean over tokens."""

    method = "static"

    def __init__(self, weights: NDArray[np.float64]):
        """
        Args:
            weights: [k] sampling weights, sum 1.
        """
        self._weights = weights

    def sampling_weights(self, step: int) -> NDArray[np.float64]:
        return self._weights


def temperature_weights(tokens: Sequence[int], temperature: float) -> NDArray[np.float64]:
    """[k] weights proportional to N_i^(1/T).

    Args:
        tokens: [k] N_i, non-negative, at least one positive.
        temperature: T, positive.
    """
    # NaN for a T so small that a logarithm divided by it is no float.
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        logs = np.log(np.array(tokens, dtype=np.float64)) / temperature
        # The largest power is 1, so that none overflows for a small T.
        powers = np.exp(logs - logs.max())
    return powers / powers.sum()


def unimax_weights(budget: Budget) -> NDArray[np.float64]:
    """[k] weights of UniMax: in ascending order of size, each domain takes an equal share of the remaining budget, or
    its cap E N_i if that is less.

    Raises:
        ValueError: E epochs of all domains are fewer than B tokens.
    """
    sizes = np.array(budget.domain_tokens, dtype=np.float64)
    caps = budget.max_epochs * sizes
    # The tolerance admits a budget that equals the sum of the caps up to rounding.
    if not caps.sum() >= budget.tokens * (1.0 - 1e-12):
        raise ValueError("the caps sum to less than the budget")
    remaining, taken = float(budget.tokens), np.zeros(len(sizes))
    for served, domain in enumerate(np.argsort(sizes, kind="stable")):
        taken[domain] = min(remaining / (len(sizes) - served), caps[domain])
        remaining -= taken[domain]
    return taken / taken.sum()


def resolve_weights(
    setting: str,
    manifest: Manifest,
    allow_tokenizer_mismatch: bool = False,
    allow_unfinished: bool = True,
    budget: Budget | None = None,
    renames: Mapping[str, str] | None = None,
) -> NDArray[np.float64]:
    """[k] sampling weights, sum 1, for --domain-weights. A weight of 0 was given by hand and leaves the domain out.

    Args:
        setting: one of the names in the module's docstring, or a file.
        allow_tokenizer_mismatch, allow_unfinished: see `load_weights`.
        budget: of the run; read for `unimax` only.
        renames: the manifest's names for names in weights that are given by name.

    Raises:
        ConfigError: `given` for a manifest without weights, unknown domain sizes, a temperature that is not a positive
            number, a budget above the caps of `unimax`, or an error of `load_weights`.
    """
    subject, count = f"--domain-weights {setting}", len(manifest.domains)
    if setting == "given":
        if manifest.given_weights is None:
            rule = "a list 'weight prefix weight prefix ...', with weights, as --domains"
            raise ConfigError(Fault(subject, str(manifest.path), rule, f"give {_NAMES} or a weights file"))
        return shares_of(f"manifest {manifest.path}", manifest, manifest.given_weights)
    if setting == "uniform":
        return np.full(count, 1.0 / count)
    if setting == UNIMAX:
        return _resolve_unimax(subject, manifest, budget)
    if setting == "natural" or setting.startswith(_TEMPERATURE):
        temperature = 1.0 if setting == "natural" else _temperature(setting)
        if not sum(domain.tokens for domain in manifest.domains):
            remedy = "use a domains.json of tools/preprocess_data.py, or uniform, or a weights file"
            value = f"no token counts in {manifest.path}"
            raise ConfigError(Fault(subject, value, "domains whose sizes are known", remedy))
        if setting == "natural":
            return manifest.natural_weights()
        return _checked_temperature(subject, manifest, temperature)
    if is_inline(setting):
        return inline_weights(setting, manifest, renames)
    similar = similar_mixture(setting)
    if similar and not os.path.lexists(setting):
        rule = f"{_NAMES}, given, or a weights file that exists"
        raise ConfigError(Fault("--domain-weights", setting, rule, f"did you mean {similar}?"))
    return load_weights(setting, manifest, allow_tokenizer_mismatch, allow_unfinished, renames)


def _temperature(setting: str) -> float:
    try:
        temperature = float(setting.removeprefix(_TEMPERATURE))
    except ValueError:
        temperature = math.nan
    if not 0.0 < temperature < math.inf:
        rule = "temperature:T with T above 0; 1 is natural, a large T is nearly uniform"
        raise ConfigError(Fault("--domain-weights", setting, rule, "give such a T, for example temperature:3"))
    return temperature


def _checked_temperature(subject: str, manifest: Manifest, temperature: float) -> NDArray[np.float64]:
    weights = temperature_weights([domain.tokens for domain in manifest.domains], temperature)
    smallest = int(np.argmin(weights))
    if not weights[smallest] >= SMALLEST_SHARE:
        value = f"a share of {weights[smallest]:.1e} for {manifest.names[smallest]!r}"
        rule = f"shares of at least {SMALLEST_SHARE}; a small T gives the largest domains everything"
        raise ConfigError(Fault(subject, value, rule, "give a larger T; 1 is natural"))
    return shares_of(subject, manifest, weights)


def _resolve_unimax(subject: str, manifest: Manifest, budget: Budget | None) -> NDArray[np.float64]:
    if budget is None:
        rule = "a number of steps, and a cap on the epochs of each domain"
        raise ConfigError(Fault(subject, "no budget", rule, "give --train-iters and --max-epochs-per-domain"))
    try:
        weights = unimax_weights(budget)
    except ValueError:
        available = budget.max_epochs * sum(budget.domain_tokens)
        value = f"{available:,.0f} tokens in {budget.max_epochs:g} epochs of every domain"
        rule = f"at least the {budget.tokens:,} that the run reads"
        remedy = "raise --max-epochs-per-domain, add text, or train fewer steps"
        raise ConfigError(Fault(subject, value, rule, remedy)) from None
    return shares_of(subject, manifest, weights)
