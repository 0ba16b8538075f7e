"""Files of domain weights. Weights are stored and matched by domain name, never by position."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from megatron_doremi.data.given_weights import did_you_mean, read_inline
from megatron_doremi.data.manifest import Manifest
from megatron_doremi.data.prefix_list import LARGEST_WEIGHT
from megatron_doremi.errors import ConfigError, Fault, raise_if_any
from megatron_doremi.storage.files import atomic_write_text, read_json_object
from megatron_doremi.storage.formats import Count, Name, Schema, check_entry, format_fault

WEIGHTS_FORMAT = "megatron-doremi-weights/1"
# A smaller share is less than one window in 10^12 and vanishes in the rounding of the others.
SMALLEST_SHARE = 1e-12
_REMEDY = "give --exclude-domains to train without a domain"
Weight = Annotated[float, Field(gt=0.0, lt=LARGEST_WEIGHT)]
WeightByHand = Annotated[float, Field(ge=0.0, lt=LARGEST_WEIGHT)]


class WeightsByHand(Schema):
    """Weights by domain name that a person wrote: inline, in a bare file, or in the DoReMi authors' format. A weight of
    0 leaves a domain out."""

    weights: dict[Name, WeightByHand]


class Provenance(Schema):
    """The fields of `provenance` that the program reads; the others are for people."""

    steps: Count | None = None
    train_iters: Count | None = None


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
    path: Path, manifest: Manifest, allow_tokenizer_mismatch: bool, allow_unfinished: bool = True
) -> NDArray[np.float64]:
    """Reads [k] weights for the manifest's domains, in its order, normalized to sum 1. Weights of 0 are kept.

    Accepts this program's file, a bare {name: weight}, and the format of the DoReMi authors' repository,
    {"train_domain_weights": {name: weight}, ...}.

    Args:
        allow_tokenizer_mismatch: accept weights that were learned with another tokenizer.
        allow_unfinished: accept weights of a proxy that has not finished all of its steps.

    Raises:
        ConfigError: with all faults, including unknown or missing names and another tokenizer.
    """
    subject = f"--domain-weights {path}"
    entry = read_json_object(path, subject, _unreadable_remedy(path))
    # A domain may be named "format"; its value is then a number.
    if "format" not in entry or isinstance(entry["format"], int | float):
        key = "train_domain_weights"
        bare = key not in entry or key in manifest.names
        return weights_by_hand(subject, entry if bare else entry[key], manifest)
    raise_if_any([fault for fault in [format_fault(entry, subject, WeightsEntry, "give a weights file")] if fault])
    faults = _tokenizer_faults(subject, entry.get("tokenizer_sha256"), manifest, allow_tokenizer_mismatch)
    if isinstance(entry.get("weights"), dict):
        faults += _name_faults(subject, entry["weights"], manifest, learned=True)
    try:
        checked = check_entry(entry, subject, WeightsEntry, _REMEDY)
    except ConfigError as error:
        raise ConfigError([*faults, *error.faults]) from error
    if not allow_unfinished:
        faults += _unfinished_faults(subject, checked.provenance)
    raise_if_any(faults)
    return shares_of(subject, manifest, [checked.weights[name] for name in manifest.names])


def inline_weights(setting: str, manifest: Manifest) -> NDArray[np.float64]:
    """[k] weights of `A=0.5,B=0.5`, in the manifest's order, normalized to sum 1. Raises ConfigError."""
    subject = "--domain-weights"
    weights, faults = read_inline(setting, subject)
    if faults:
        raise ConfigError([*faults, *_name_faults(subject, weights, manifest)])
    return weights_by_hand(subject, weights, manifest)


def weights_by_hand(subject: str, weights: Any, manifest: Manifest) -> NDArray[np.float64]:
    """[k] weights that a person wrote, by name, normalized to sum 1; at least one is positive."""
    faults = _name_faults(subject, weights, manifest) if isinstance(weights, dict) else []
    try:
        checked = check_entry({"weights": weights}, subject, WeightsByHand, _REMEDY)
    except ConfigError as error:
        raise ConfigError([*faults, *error.faults]) from error
    if not faults and not any(checked.weights.values()):
        faults.append(Fault(subject, "0 for every domain", "at least one positive weight", "give one"))
    raise_if_any(faults)
    return shares_of(subject, manifest, [checked.weights[name] for name in manifest.names])


def _unreadable_remedy(path: Path) -> str:
    if path.is_dir():
        inside = path / "domain_weights.json"
        return f"give the file, {inside}" if inside.is_file() else "give a weights file, not a folder"
    return "give a weights file, uniform, natural, or weights as in A=0.5,B=0.5"


def _unfinished_faults(subject: str, provenance: Provenance) -> list[Fault]:
    steps, planned = provenance.steps, provenance.train_iters
    if steps is None or planned is None or steps >= planned:
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
            if share < SMALLEST_SHARE and weight != 0.0
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
            f"learned with tokenizer {str(sha256)[:12]}",
            f"the manifest's tokenizer, {str(ours)[:12]}",
            "learn weights with this tokenizer (they do not transfer), or give --allow-tokenizer-mismatch",
        )
    ]


def _name_faults(subject: str, weights: Mapping[str, Any], manifest: Manifest, learned: bool = False) -> list[Fault]:
    """Faults of names that are missing or unknown: weights are never spread over other domains than were named.

    Args:
        learned: the weights were learned together, by a proxy.
    """
    faults = []
    excluded = [name for name in weights if name in manifest.excluded]
    unknown = [name for name in weights if name not in manifest.names and name not in excluded]
    missing = [name for name in manifest.names if name not in weights]
    if excluded:
        rule, remedy = "weights of the domains that the run reads", "remove these entries"
        if learned:
            remedy = "learn weights without these domains: what was learned with them is no mixture of the others"
        faults.append(Fault(subject, f"excluded: {_listed(excluded)}", rule, remedy))
    if unknown:
        rule = "the manifest's names exactly: " + _listed(manifest.names)
        guess = did_you_mean(unknown[0], missing)
        faults.append(Fault(subject, "unknown: " + _listed(unknown), rule, guess or "rename or remove these entries"))
    if missing:
        remedy = "give --exclude-domains to train without them, and weights learned so" if learned else "add them"
        remedy += "" if learned else "; a weight of 0 leaves a domain out"
        faults.append(Fault(subject, "missing: " + _listed(missing), "a weight for each domain", remedy))
    return faults


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
