"""Names of domains in a weights file, matched with the manifest's: exactly, or through the map of --domain-names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from megatron_doremi.data.given_weights import did_you_mean
from megatron_doremi.data.manifest import Manifest
from megatron_doremi.errors import Fault
from megatron_doremi.storage.files import read_json_object
from megatron_doremi.storage.formats import Name, Schema, check_entry

_FLAG = "--domain-names"
_FORM = "{name in the file: name in the manifest}"
# Names that a message lists.
_SHOWN_NAMES = 25
# Comparisons of names to guess what unknown ones mean.
_COMPARISONS = 200_000


class DomainNames(Schema):
    """The map of --domain-names."""

    names: dict[Name, Name]


def read_domain_names(path: Path) -> dict[str, str]:
    """Reads {name in the weights file: name in the manifest}. Raises ConfigError, also for a name that occurs twice."""
    subject, remedy = f"{_FLAG} {path}", f"give a JSON file {_FORM}"
    entry = read_json_object(path, subject, remedy)
    return check_entry({"names": entry}, subject, DomainNames, remedy).names


def match_names(
    subject: str, given: Sequence[str], manifest: Manifest, renames: Mapping[str, str], learned: bool = False
) -> tuple[dict[str, str], list[Fault]]:
    """Matches the names of weights with the manifest's: weights are never spread over other domains than were named.

    Args:
        subject: of the weights, in messages.
        given: names in the weights file.
        renames: the manifest's names for some of them. Names that are not given have no effect.
        learned: the weights were learned together, by a proxy.

    Returns:
        the name in the file by the manifest's name, and faults: of each name that is unknown, excluded or renamed to
        another's, and of the names that are missing.
    """
    known = set(manifest.names)
    files: dict[str, list[str]] = {}
    for name in given:
        files.setdefault(renames.get(name, name), []).append(name)
    faults = [
        Fault(
            subject, f"{_listed(names)} for one domain, {target!r}", "one weight for each domain", "remove the others"
        )
        for target, names in files.items()
        if len(names) > 1
    ]
    excluded = [target for target in files if target in manifest.excluded]
    unknown = [target for target in files if target not in known and target not in manifest.excluded]
    missing = [name for name in manifest.names if name not in files]
    if excluded:
        rule, remedy = "weights of the domains that the run reads", "remove these entries"
        if learned:
            remedy = "learn weights without these domains: what was learned with them is no mixture of the others"
        faults.append(Fault(subject, f"excluded: {_listed(excluded)}", rule, remedy))
    rule = "the manifest's names exactly: " + _listed(manifest.names)
    remedy = f"rename or remove them, or give {_FLAG} MAP.json with {_FORM}"
    for number, target in enumerate(unknown):
        name = files[target][0]
        value = f"unknown: {name!r}" + (f", renamed to {target!r}" if name != target else "")
        # Each guess compares with every name.
        guess = (
            "" if number * len(missing) > _COMPARISONS else did_you_mean(target, missing) or did_you_mean(name, missing)
        )
        faults.append(Fault(subject, f"{value}; {guess}" if guess else value, rule, remedy))
    left = "write the names of the weights file on the left"
    if unknown and renames and not any(name in renames for name in given):
        turned = any(target in given for target in renames.values())
        value = "none of its names is in the weights file"
        faults.append(Fault(_FLAG, value, _FORM, "swap names and values" if turned else left))
    else:
        # Names of the map that no weight has, although the domain that they stand for has none.
        unused = [name for name, target in renames.items() if name not in given and target in missing]
        for number, name in enumerate(unused):
            guess = "" if number * len(given) > _COMPARISONS else did_you_mean(name, given)
            value = f"{name!r} is not in the weights file" + (f"; {guess}" if guess else "")
            faults.append(Fault(_FLAG, value, _FORM, left))
    if missing:
        remedy = "give --exclude-domains to train without them, and weights learned so" if learned else "add them"
        remedy += "" if learned else "; a weight of 0 leaves a domain out"
        faults.append(Fault(subject, "missing: " + _listed(missing), "a weight for each domain", remedy))
    return {target: names[0] for target, names in files.items()}, faults


def _listed(names: Iterable[str]) -> str:
    listed = [repr(name) for name in names]
    more = len(listed) - _SHOWN_NAMES
    return ", ".join(listed[:_SHOWN_NAMES]) + (f" and {more:,} more" if more > 0 else "")
