"""The domains that a run reads: those of the manifest without the ones that the user leaves out. Needs no torch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_doremi.config import Config
from megatron_doremi.data.domain_names import read_domain_names
from megatron_doremi.data.manifest import Manifest, open_manifest
from megatron_doremi.errors import ConfigError, Fault
from megatron_doremi.mixture.static import names_domains, resolve_weights
from megatron_doremi.phases.to_come import WEIGHTS
from megatron_doremi.settings import NO_EVALUATION, PROXY, SCORE


def sampling_setting(config: Config, manifest: Manifest) -> str:
    """--domain-weights, or its default: uniform for a proxy (Algorithm 1) and for scoring, else the weights of a list
    that has them, else natural."""
    if config.data.domain_weights:
        return config.data.domain_weights
    if config.data.phase in (PROXY, SCORE):
        return "uniform"
    return "natural" if manifest.given_weights is None else "given"


def select_domains(
    config: Config, to_come: Collection[str], faults: list[Fault]
) -> tuple[Manifest, NDArray[np.float64] | None]:
    """Reads the manifest, and leaves out the domains of --exclude-domains and those whose weight is 0 by hand.

    Args:
        to_come: see `inputs_to_come`.
        faults: of the weights and of --domain-names; appended to.

    Returns:
        the manifest, and [k] sampling weights, sum 1, if they are given by name, else None.

    Raises:
        ConfigError: the manifest is faulty, or --exclude-domains names other domains.
    """
    data = config.data
    manifest = open_manifest(data.domains, data.data_path, data.split_shares, data.exclude_domains)
    setting, renames = config.data.domain_weights, dict[str, str]()
    if data.domain_names:
        try:
            if not names_domains(setting):
                rule = "weights by name in --domain-weights, whose names it translates"
                raise ConfigError(
                    Fault("--domain-names", data.domain_names, rule, "leave it out, or give such weights")
                )
            renames = read_domain_names(Path(data.domain_names))
        except ConfigError as error:
            faults += error.faults
            return manifest, None
    if config.data.phase not in NO_EVALUATION or WEIGHTS in to_come or not names_domains(setting):
        return manifest, None
    try:
        weights = resolve_weights(
            setting, manifest, data.allow_tokenizer_mismatch, config.run.allow_unfinished, renames=renames
        )
    except ConfigError as error:
        faults += error.faults
        return manifest, None
    dropped = [name for name, weight in zip(manifest.names, weights, strict=True) if weight == 0.0]
    if dropped:
        listed = ", ".join(map(repr, dropped))
        line = f"--domain-weights: left out, because their weight is 0: {listed}"
        manifest = manifest.without(dropped)
        manifest = replace(manifest, warnings=(*manifest.warnings, line))
    return manifest, weights[weights > 0.0]
