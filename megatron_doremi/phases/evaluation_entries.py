"""The entries of an evaluation line, in nats per token and in bits per byte, and the table that shows them.

A domain's loss in bits per byte is the sum of its targets' losses, over ln 2, over the bytes of text of these targets
(Gao et al. 2020, section 3.1). It does not depend on the tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_doremi.console import COLUMNS
from megatron_doremi.mixture.statistics import DomainStats
from megatron_doremi.phases.bootstrap import Floats, degrees_of_sum, interval, resample
from megatron_doremi.text_table import table_lines

NATS, BITS = "eval", "eval_bpb"


def evaluation_entries(
    stats: DomainStats, sums: Floats, names: Sequence[str], shares: NDArray[np.float64], seq_length: int
) -> dict[str, Any]:
    """The losses of each domain that was read, and their means, without intervals.

    `..._uniform_mean` is the mean over domains, `..._worst` the largest. `..._token_mean` is the loss on text that
    has the domains in their natural shares of tokens: in nats the mean by shares, in bits per byte the total bits over
    the total bytes of such text. `eval_bpb` has the domains whose bytes are known; its means need those of every
    domain, so that they are means over the same domains as those in nats.

    Args:
        stats: over the windows that were read.
        sums: [4, k, g] of `DocumentSums`, over all ranks.
        shares: [k] natural shares of the domains; those of the domains read are scaled to sum 1.
    """
    loss, targets = torch.stack((stats.loss, stats.targets)).tolist()
    text_bytes, documents = sums[2:].sum(axis=2).tolist()
    read = [number for number, count in enumerate(targets) if count]
    read_names, weights = [names[n] for n in read], _scaled(shares[read]).tolist()
    nats = [loss[n] / targets[n] for n in read]
    # NaN marks what is unknown; a domain of empty documents has no bits per byte either.
    density = [text_bytes[n] / targets[n] or math.nan for n in read]
    bits = [x / math.log(2) / d for x, d in zip(nats, density, strict=True)]
    nats_mean = math.fsum(w * x for w, x in zip(weights, nats, strict=True))
    bits_mean = nats_mean / math.log(2) / math.fsum(w * d for w, d in zip(weights, density, strict=True))
    entries = _entries(NATS, read_names, nats, nats_mean) | _entries(BITS, read_names, bits, bits_mean)
    return {
        **entries,
        "eval_windows": {names[n]: int(targets[n]) // seq_length for n in read},
        "eval_documents": {names[n]: int(documents[n]) for n in read},
    }


def _scaled(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Shares that sum to 1; equal ones if all are 0."""
    total = shares.sum()
    return shares / total if total else np.full(len(shares), 1 / len(shares))


def _entries(key: str, names: Sequence[str], losses: Sequence[float], token_mean: float) -> dict[str, Any]:
    """The entries of one unit; NaN marks an unknown loss."""
    known = {name: loss for name, loss in zip(names, losses, strict=True) if not math.isnan(loss)}
    if len(known) < len(losses):
        return {key: known} if known else {}
    return {
        key: known,
        f"{key}_uniform_mean": sum(losses) / len(losses),
        f"{key}_worst": max(losses),
        f"{key}_token_mean": token_mean,
    }


def interval_entries(
    entries: Mapping[str, Any], sums: Floats, names: Sequence[str], shares: NDArray[np.float64]
) -> dict[str, Any]:
    """`KEY_interval` for each figure in `evaluation_entries`: its 95 % interval, [low, high], see bootstrap.py.

    An interval is null for a domain with a single document, and for means over such a domain. The interval of the
    worst loss is that of the domain that has it. The largest loss of each resample would be no guide where several
    domains are close: the largest of several noisy losses lies above the largest of the true ones, and the largest of
    their resamples still higher.

    Args:
        sums: [4, k, g] of `DocumentSums`, over all ranks; the other arguments as for `evaluation_entries`.
    """
    read = [number for number, name in enumerate(names) if name in entries[NATS]]
    names, weights = [names[n] for n in read], _scaled(shares[read])
    drawn = resample(names, *sums[:3, read])
    nats, density = drawn.loss / drawn.targets, drawn.text_bytes / drawn.targets
    # A resample of empty documents only has no bytes; `interval` gives None.
    with np.errstate(divide="ignore"):
        bits = nats / math.log(2) / density
    result = _intervals(NATS, entries, names, nats, drawn.degrees)
    loss, terms = entries[f"{NATS}_token_mean"], nats * weights
    degrees = degrees_of_sum(terms, drawn.degrees)
    result[f"{NATS}_token_mean_interval"] = interval(loss, terms.sum(axis=1), degrees)
    result |= _intervals(BITS, entries, names, bits, drawn.degrees)
    if f"{BITS}_token_mean" in entries:
        # A ratio of sums over domains; its terms are those of the first-order expansion.
        loss = entries[f"{BITS}_token_mean"]
        values = (nats @ weights) / math.log(2) / (density @ weights)
        degrees = degrees_of_sum(weights * (nats / math.log(2) - loss * density), drawn.degrees)
        result[f"{BITS}_token_mean_interval"] = interval(loss, values, degrees)
    return result


def _intervals(
    key: str, entries: Mapping[str, Any], names: Sequence[str], values: Floats, degrees: NDArray[np.int64]
) -> dict[str, Any]:
    """The intervals of one unit, except that of its token mean; `values`: [resamples, k] losses of the domains."""
    if key not in entries:
        return {}
    by_domain = {
        name: interval(entries[key][name], values[:, number], degrees[number])
        for number, name in enumerate(names)
        if name in entries[key]
    }
    result: dict[str, Any] = {f"{key}_interval": by_domain}
    if f"{key}_uniform_mean" in entries:
        mean = interval(entries[f"{key}_uniform_mean"], values.mean(axis=1), degrees_of_sum(values, degrees))
        result[f"{key}_uniform_mean_interval"] = mean
        result[f"{key}_worst_interval"] = by_domain[max(entries[key], key=entries[key].get)]
    return result


def evaluation_table(entries: Mapping[str, Any]) -> list[str]:
    """The lines of a table for people: domains, then means; bits per byte only where a domain has them."""
    units = [(key, unit) for key, unit in ((BITS, "bits/byte"), (NATS, "nats/token")) if key in entries]
    head = [""]
    for _, unit in units:
        head += [unit, "95 % interval"]
    rows = [[*head, "documents", "windows"]]
    for name in entries[NATS]:
        row = [name]
        for key, _ in units:
            row += [_number(entries[key].get(name)), _range(entries[f"{key}_interval"].get(name))]
        rows.append([*row, f"{entries['eval_documents'][name]:,}", f"{entries['eval_windows'][name]:,}"])
    for label in ("uniform mean", "worst", "token mean"):
        row, figure = [label], label.replace(" ", "_")
        for key, _ in units:
            row += [_number(entries.get(f"{key}_{figure}")), _range(entries.get(f"{key}_{figure}_interval"))]
        rows.append([*row, "", ""])
    return table_lines(rows[0], rows[1:], COLUMNS - len("HH:MM:SS   "))


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"


def _range(bounds: Sequence[float] | None) -> str:
    return "n/a" if bounds is None else f"{bounds[0]:.4f} to {bounds[1]:.4f}"
