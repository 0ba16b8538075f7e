"""Files of domain weights. Weights are stored and matched by domain name, never by position."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from megatron_doremi.data.manifest import Manifest
from megatron_doremi.data.prefix_list import LARGEST_WEIGHT
from megatron_doremi.errors import ConfigError, Fault, raise_if_any
from megatron_doremi.storage.files import atomic_write_text, read_json_object
from megatron_doremi.storage.formats import Count, Name, Schema, check_entry, format_fault

WEIGHTS_FORMAT = "megatron-doremi-weights/1"
# A smaller share is less than one window in 10^12 and vanishes in the rounding of the others.
SMALLEST_SHARE = 1e-12
_REMEDY = "leave a domain out of the manifest to train without it"
Weight = Annotated[float, Field(gt=0.0, lt=LARGEST_WEIGHT)]


class BareWeights(Schema):
    """Weights by domain name, the common part of all file formats below."""

    weights: dict[Name, Weight]


class Provenance(Schema):
    """The fields of `provenance` that the program reads; the others are for people."""

    steps: Count | None = None
    train_iters: Count | None = None


class WeightsEntry(BareWeights):
    """The content of domain_weights.json."""

    FORMAT: ClassVar[str] = WEIGHTS_FORMAT
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
    """Reads [k] weights for the manifest's domains, in its order, normalized to sum 1.

    Accepts this program's file, a bare {name: weight}, and the format of the DoReMi authors' repository,
    {"train_domain_weights": {name: weight}, ...}.

    Args:
        allow_tokenizer_mismatch: accept weights that were learned with another tokenizer.
        allow_unfinished: accept weights of a proxy that has not finished all of its steps.

    Raises:
        ConfigError: with all faults, including unknown or missing names and another tokenizer.
    """
    subject = f"--domain-weights {path}"
    entry = read_json_object(path, subject)
    faults: list[Fault] = []
    # A domain may be named "format"; its value is then a number.
    if "format" in entry and not isinstance(entry["format"], int | float):
        raise_if_any([fault for fault in [format_fault(entry, subject, WeightsEntry, "give a weights file")] if fault])
        faults += _tokenizer_faults(subject, entry.get("tokenizer_sha256"), manifest, allow_tokenizer_mismatch)
        schema: type[BareWeights] = WeightsEntry
    else:
        key = "train_domain_weights"
        bare = key not in entry or key in manifest.names
        schema, entry = BareWeights, {"weights": entry if bare else entry[key]}
    if isinstance(entry.get("weights"), dict):
        faults += _name_faults(subject, entry["weights"], manifest)
    try:
        checked = check_entry(entry, subject, schema, _REMEDY)
    except ConfigError as error:
        raise ConfigError([*faults, *error.faults]) from error
    if isinstance(checked, WeightsEntry) and not allow_unfinished:
        faults += _unfinished_faults(subject, checked.provenance)
    raise_if_any(faults)
    return positive_shares(subject, manifest, [checked.weights[name] for name in manifest.names])


def _unfinished_faults(subject: str, provenance: Provenance) -> list[Fault]:
    steps, planned = provenance.steps, provenance.train_iters
    if steps is None or planned is None or steps >= planned:
        return []
    remedy = "run the proxy to its end, or give --allow-unfinished to use the mean so far"
    return [Fault(subject, f"the mean of {steps:,} of the proxy's {planned:,} steps", "a finished proxy", remedy)]


def positive_shares(
    subject: str, manifest: Manifest, weights: Sequence[float] | NDArray[np.float64]
) -> NDArray[np.float64]:
    """[k] positive weights, normalized to sum 1. Raises ConfigError if one is below `SMALLEST_SHARE`."""
    shares = np.array(weights) / np.sum(weights)
    raise_if_any(
        [
            Fault(
                subject,
                f"{name!r}: a share of {share:.1e}",
                f"shares of at least {SMALLEST_SHARE}",
                _REMEDY,
            )
            for name, share in zip(manifest.names, shares, strict=True)
            if share < SMALLEST_SHARE
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


def _name_faults(subject: str, weights: Mapping[str, Any], manifest: Manifest) -> list[Fault]:
    faults = []
    unknown = [name for name in weights if name not in manifest.names]
    missing = [name for name in manifest.names if name not in weights]
    if unknown:
        rule = "the manifest's names exactly: " + ", ".join(map(repr, manifest.names))
        faults.append(
            Fault(subject, "unknown: " + ", ".join(map(repr, unknown)), rule, "rename or remove these entries")
        )
    if missing:
        value = "missing: " + ", ".join(map(repr, missing))
        faults.append(Fault(subject, value, "a weight for each domain", "add them"))
    return faults
