"""Builds a report from a study: HTML, charts, and results as data.

Nothing is read or written here; tools/report.py does both.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_doremi.reporting.charts.chart import Chart
from megatron_doremi.reporting.charts.curves import curves
from megatron_doremi.reporting.charts.held_out import held_out_charts
from megatron_doremi.reporting.charts.mixture import mixture_charts
from megatron_doremi.reporting.charts.rounds import rounds_chart
from megatron_doremi.reporting.comparison import Study, comparison_as_data
from megatron_doremi.reporting.evaluations import HeldOut
from megatron_doremi.reporting.html import Section, page
from megatron_doremi.reporting.mixture import last_weights, learned_weights
from megatron_doremi.reporting.rounds import (
    RoundsEntry,
    concentration_warning,
    round_table,
    rounds_table,
    verdict_of_round,
)
from megatron_doremi.reporting.runs import Run, flatten
from megatron_doremi.reporting.study_tables import (
    cost_table,
    difference_table,
    domain_table,
    held_out_table,
    run_table,
    training_seconds,
    weights_table,
)
from megatron_doremi.reporting.tables import Column, Row, Table
from megatron_doremi.reporting.verdict import findings, verdict

RESULTS_FORMAT = "megatron-doremi-results/2"
# Keys of config.json, without groups, prefixes and units, that a reader needs to interpret a run's numbers.
CONFIG_KEYS = (
    *("program", "python", "torch", "deepspeed", "numpy", "commit"),
    *("version", "phase", "seed", "domains", "domain_weights", "seq_length", "micro_batch_size"),
    *("global_batch_size", "train_iters", "model_size", "num_layers", "hidden_size", "ffn_hidden_size"),
    *("num_attention_heads", "num_query_groups", "vocab_size", "tokenizer_sha256", "data_fingerprint"),
    *("data_content", "held_out_content", "step_size", "smoothing", "update", "weighting", "objective"),
    *("reference_load", "reference_losses", "lr", "min_lr", "lr_decay_style", "weight_decay", "clip_grad", "bf16"),
    *("world_size", "tensor_model_parallel_size", "pipeline_model_parallel_size", "zero_stage"),
)
CONTENT = "data_content"
# Values by domain, which have tables of their own.
_BY_DOMAIN = ("sampling_weights.", "domain_weights.json: early_stop.")
# Charts of further proxies and of whole trajectories are folded, so that a report of many seeds stays short.
_FIRST_PROXY = "_1"


@dataclass(frozen=True)
class Report:
    """A finished report.

    Attributes:
        html: contents of report.html.
        charts: the charts of the page that are not folded, to be drawn as pictures.
        results: contents of results.json.
    """

    html: str
    charts: tuple[Chart, ...]
    results: dict[str, Any]


def make_report(study: Study, version: str, rounds: RoundsEntry | None = None) -> Report:
    """Builds the report.

    Args:
        version: of this program, for the footer.
        rounds: the rounds whose trajectory is shown; at least one has ended.
    """
    sections = [*([] if rounds is None else [_rounds_section(rounds)]), *make_sections(study)]
    charts = tuple(chart for section in sections for chart in section.charts)
    if study.subject is None and rounds is not None:
        title = "Rounds of DoReMi"
    elif study.subject is None:
        title = f"Training report: {_listed([group.name for group in study.groups])}"
    else:
        title = f"{study.subject} against {_listed([each.pairing.rival for each in study.comparisons]) or 'nothing'}"
    sentence, sentences = verdict(study), findings(study)
    if rounds is not None:
        warning = concentration_warning(rounds)
        sentences = [verdict_of_round(rounds), *([warning] if warning else []), *sentences]
    html = page(title, sentence, sentences, sections, f"Made by megatron-doremi {version}, tools/report.py.")
    results = {
        "format": RESULTS_FORMAT,
        "verdict": sentence,
        "findings": sentences,
        "unit": study.unit.value,
        "comparisons": [comparison_as_data(each) for each in study.comparisons],
        "groups": {group.name: [group.label(run) for run in group.runs] for group in study.groups},
        "runs": {label: run_as_data(run) for label, run in study.runs.items()},
        **({} if rounds is None else {"rounds": rounds.model_dump()["rounds"], "rounds_ended": rounds.ended}),
    }
    return Report(html, charts, plain_numbers(results))


def make_sections(study: Study) -> list[Section]:
    """The report's sections, in order; empty ones are left out."""
    held_out = {chart.name: chart for chart in held_out_charts(study)}
    differences = [held_out.pop("differences")] if "differences" in held_out else []
    domains = [held_out.pop(name) for name in list(held_out) if name.startswith(("domains_", "ranks_"))]
    mixture = {chart.name: chart for chart in mixture_charts(study)}
    weights = [mixture.pop("domain_weights")] if "domain_weights" in mixture else []
    open_charts = [chart for name, chart in mixture.items() if name == "entropy" or name.endswith(_FIRST_PROXY)]
    by_weight, runs = weights_table(study), run_table(study)
    losses = [held_out_table(study)] if study.compared else []
    sections = [
        Section("Result", charts=differences, tables=[difference_table(study)] if study.comparisons else []),
        Section("Weights", charts=weights, tables=[] if by_weight is None else [by_weight]),
        Section("Held-out loss", charts=list(held_out.values()), tables=[*losses, *([] if runs is None else [runs])]),
        Section(
            "Who gets better, who gets worse",
            charts=domains,
            tables=[domain_table(study, comparison) for comparison in study.comparisons],
        ),
        Section(
            "Trajectories",
            charts=open_charts,
            more=[chart for chart in mixture.values() if chart not in open_charts],
        ),
        Section("Loss over the steps", charts=curves(study)),
        Section("Cost", tables=[cost_table(study)]),
        _provenance_section(study.runs),
    ]
    return [each for each in sections if each.charts or each.tables or each.values or each.more]


def _rounds_section(rounds: RoundsEntry) -> Section:
    tables = [rounds_table(rounds), *(round_table(each) for each in rounds.rounds)]
    return Section("Rounds", charts=[rounds_chart(rounds)], tables=tables)


def _provenance_section(runs: Mapping[str, Run]) -> Section:
    folded = [(f"Full configuration of {label}", _settings(run)) for label, run in runs.items()]
    note = "Fingerprints of data and tokenizer, versions and settings; a value that all runs share stands once."
    return Section("Provenance", note, values=[provenance_table(runs)], folded=folded)


def provenance_table(runs: Mapping[str, Run]) -> Table:
    """The runs' important configuration values and those in which they differ: a row for each distinct value."""
    flat = {label: {"folder": str(run.path), **_settings(run)} for label, run in runs.items()}
    for label, run in runs.items():
        recorded = flatten(run.weights_provenance)
        flat[label] |= {f"domain_weights.json: {key}": value for key, value in recorded.items()}
    plain = dict.fromkeys(key for values in flat.values() for key in values)
    rows: list[Row] = []
    for key in plain:
        by_value: dict[str, list[str]] = {}
        for label, values in flat.items():
            by_value.setdefault(_shown(values.get(key)), []).append(label)
        if key.startswith(_BY_DOMAIN) or (len(by_value) == 1 and not _matters(key)):
            continue
        for value, labels in by_value.items():
            rows.append((key, "all runs" if len(by_value) == 1 else _listed(labels), value))
    return Table("provenance", (Column("setting"), Column("runs"), Column("value")), tuple(rows))


def _settings(run: Run) -> dict[str, Any]:
    """config.json without its groups; the identity repeats other values, except for the content of the data."""
    values = flatten(run.config)
    return {key: value for key, value in values.items() if not key.startswith("identity.") or _leaf(key) == CONTENT}


def _leaf(key: str) -> str:
    return key.rsplit(".", 1)[-1]


def _matters(key: str) -> bool:
    leaf = _leaf(key)
    return any(leaf == key or leaf.startswith(f"{key}_") or leaf.endswith(f"_{key}") for key in CONFIG_KEYS)


def _shown(value: Any) -> str:
    return "-" if value is None else str(value)


def _listed(names: Sequence[str], limit: int = 6) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def unique_labels(names: Sequence[str]) -> list[str]:
    """Returns labels that are valid in file names and unique, also on a file system that ignores case."""
    labels: list[str] = []
    for name in names:
        plain = re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip(".") or "run"
        label, number = plain, 2
        while label.casefold() in {other.casefold() for other in labels}:
            label, number = f"{plain}-{number}", number + 1
        labels.append(label)
    return labels


def plain_numbers(data: Any) -> Any:
    """Returns data with NaN and Inf, which JSON does not have, replaced by None."""
    if isinstance(data, Mapping):
        return {str(key): plain_numbers(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [plain_numbers(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def run_as_data(run: Run) -> dict[str, Any]:
    """A run as plain data for results.json; losses in nats per token under `nats`, in bits per byte under `bits`."""
    data: dict[str, Any] = {"path": str(run.path), "phase": run.phase, "seed": run.seed, "last_step": run.last_step}
    if run.has_weights:
        data["mean_weights"], data["last_weights"] = learned_weights(run), last_weights(run)
    data["training_seconds"] = training_seconds(run)
    data["evaluations"] = [
        {
            "iteration": each.iteration,
            "nats": _held_out_as_data(each.nats),
            "bits": None if each.bits is None else _held_out_as_data(each.bits),
        }
        for each in run.evaluations
    ]
    return data


def _held_out_as_data(figures: HeldOut) -> dict[str, Any]:
    return {
        "losses": figures.losses,
        "uniform_mean": figures.uniform_mean,
        "worst": figures.worst[1],
        "worst_domain": figures.worst[0],
        "token_mean": figures.token_mean,
    }
