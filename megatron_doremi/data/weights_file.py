"""Files of domain weights. Weights are stored and matched by domain name, never by position."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from megatron_doremi.data.domain_names import match_names
from megatron_doremi.data.given_weights import read_inline
from megatron_doremi.data.manifest import Manifest
from megatron_doremi.data.prefix_list import LARGEST_WEIGHT
from megatron_doremi.data.weights_formats import read_weights_file, weights_within
from megatron_doremi.errors import ConfigError, Fault, raise_if_any
from megatron_doremi.storage.files import atomic_write_text
from megatron_doremi.storage.formats import Count, Name, Schema, check_entry, format_fault

WEIGHTS_FORMAT = "megatron-doremi-weights/1"
# A smaller share is less than one window in 10^12 and vanishes in the rounding of the others.
SMALLEST_SHARE = 1e-12
_REMEDY = "give --exclude-domains to train without a domain"
Weight = Annotated[float, Field(gt=0.0, lt=LARGEST_WEIGHT)]
WeightByHand = Annotated[float, Field(ge=0.0, lt=LARGEST_WEIGHT)]


class WeightsByHand(Schema):
    """Weights by domain name that a person or another program wrote: inline, in a bare file, or in a format of
    weights_formats.py. A weight of 0 leaves a domain out."""

    weights: dict[Name, WeightByHand]


class Provenance(Schema):
    """The fields of `provenance` that the program reads; the others are for people."""

    steps: Count | None = None
    train_iters: Count | None = None
    seed: Count | None = None
    # Of a proxy that --doremi-stop-drift ended: its weights are those of all steps, within an interval.
    early_stop: dict[str, Any] | None = None


class WeightsEntry(Schema):
    """The content of domain_weights.json."""

    FORMAT: ClassVar[str] = WEIGHTS_FORMAT
    weights: dict[Name, Weight]
    tokenizer_sha256: str | None = None
    provenance: Provenance = Field(default_factory=Provenance)


def save_weights(
    path: Path, weights: Mapping[str, float], tokenizer_sha256: str | None, provenance: Mapping[str, Any]
) -> None:
    """Writes domain weights and their provenance; floats in full precision."""
    entry = {
        "format": WEIGHTS_FORMAT,
        "weights": dict(weights),
        "tokenizer_sha256": tokenizer_sha256,
        "provenance": dict(provenance),
    }
    atomic_write_text(path, json.dumps(entry, indent=2) + "\n")


def load_weights(
    setting: str | Path,
    manifest: Manifest,
    allow_tokenizer_mismatch: bool,
    allow_unfinished: bool = True,
    renames: Mapping[str, str] | None = None,
) -> NDArray[np.float64]:
    """Reads [k] weights for the manifest's domains, in its order, normalized to sum 1. Weights of 0 are kept.

    Accepts this program's file, a bare {name: weight}, and the formats of weights_formats.py. Only this program's names
    a tokenizer; the weights of the others are taken as they are.

    Args:
        setting: path, or FILE.csv@RUN.
        allow_tokenizer_mismatch: accept weights that were learned with another tokenizer.
        allow_unfinished: accept weights of a proxy that has not finished all of its steps.
        renames: the manifest's names for names in the file.

    Raises:
        ConfigError: with all faults, including unknown or missing names and another tokenizer.
    """
    subject, renames = f"--domain-weights {setting}", renames or {}
    domains = {*manifest.names, *manifest.excluded, *renames}
    entry = read_weights_file(str(setting), subject, _unreadable_remedy(Path(setting)), domains)
    # A domain may be named "format"; its value is then a number.
    if "format" not in entry or isinstance(entry["format"], int | float):
        return weights_by_hand(subject, weights_within(entry, subject, domains), manifest, renames)
    raise_if_any([fault for fault in [format_fault(entry, subject, WeightsEntry, "give a weights file")] if fault])
    faults = _tokenizer_faults(subject, entry.get("tokenizer_sha256"), manifest, allow_tokenizer_mismatch)
    weights, matches = entry.get("weights"), dict[str, str]()
    if isinstance(weights, dict):
        matches, name_faults = match_names(subject, list(weights), manifest, renames, learned=True)
        faults += name_faults
    try:
        checked = check_entry(entry, subject, WeightsEntry, _REMEDY)
    except ConfigError as error:
        raise ConfigError([*faults, *error.faults]) from error
    if not allow_unfinished:
        faults += unfinished_faults(subject, checked.provenance)
    raise_if_any(faults)
    return shares_of(subject, manifest, [checked.weights[matches[name]] for name in manifest.names])


def inline_weights(setting: str, manifest: Manifest, renames: Mapping[str, str] | None = None) -> NDArray[np.float64]:
    """[k] weights of `A=0.5,B=0.5`, in the manifest's order, normalized to sum 1. Raises ConfigError."""
    subject = "--domain-weights"
    weights, faults = read_inline(setting, subject)
    if faults:
        raise ConfigError([*faults, *match_names(subject, list(weights), manifest, renames or {})[1]])
    return weights_by_hand(subject, weights, manifest, renames or {})


def weights_by_hand(subject: str, weights: Any, manifest: Manifest, renames: Mapping[str, str]) -> NDArray[np.float64]:
    """[k] weights that a person or another program wrote, by name, normalized to sum 1; at least one is positive."""
    names = list(weights) if isinstance(weights, dict) else []
    matches, faults = match_names(subject, names, manifest, renames) if isinstance(weights, dict) else ({}, [])
    try:
        checked = check_entry({"weights": weights}, subject, WeightsByHand, _REMEDY)
    except ConfigError as error:
        raise ConfigError([*faults, *error.faults]) from error
    if not faults and not any(checked.weights.values()):
        faults.append(Fault(subject, "0 for every domain", "at least one positive weight", "give one"))
    raise_if_any(faults)
    return shares_of(subject, manifest, [checked.weights[matches[name]] for name in manifest.names])


def _unreadable_remedy(path: Path) -> str:
    if os.path.isdir(path):
        inside = path / "domain_weights.json"
        return f"give the file, {inside}" if os.path.isfile(inside) else "give a weights file, not a folder"
    return "give a weights file, uniform, natural, or weights as in A=0.5,B=0.5"


def unfinished_faults(subject: str, provenance: Provenance) -> list[Fault]:
    """A fault if the weights are those of a proxy that has not finished all of its steps."""
    steps, planned = provenance.steps, provenance.train_iters
    if steps is None or planned is None or steps >= planned or provenance.early_stop is not None:
        return []
    remedy = "run the proxy to its end, or give --allow-unfinished to use the mean so far"
    return [Fault(subject, f"the mean of {steps:,} of the proxy's {planned:,} steps", "a finished proxy", remedy)]


def shares_of(subject: str, manifest: Manifest, weights: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    """[k] weights, normalized to sum 1. Raises ConfigError if one that is positive is below `SMALLEST_SHARE`."""
    shares = np.array(weights) / np.sum(weights)
    raise_if_any(
        [
            Fault(
                subject,
                f"{name!r}: a share of {share:.1e}",
                f"shares of at least {SMALLEST_SHARE}",
                _REMEDY,
            )
            for name, share, weight in zip(manifest.names, shares, weights, strict=True)
            if not share >= SMALLEST_SHARE and weight != 0.0
        ]
    )
    return shares


def _tokenizer_faults(subject: str, sha256: Any, manifest: Manifest, allowed: bool) -> list[Fault]:
    ours = manifest.tokenizer.sha256 if manifest.tokenizer else None
    if allowed or sha256 == ours:
        return []
    return [
        Fault(
            subject,
            f"learned with tokenizer {str(sha256)[:12]}"
            if sha256
            else "learned with a tokenizer that it does not name",
            f"the manifest's tokenizer, {str(ours)[:12]}",
            "learn weights with this tokenizer (they do not transfer), or give --allow-tokenizer-mismatch",
        )
    ]
