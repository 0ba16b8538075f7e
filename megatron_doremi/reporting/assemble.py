"""Builds a report from runs: console text, images, HTML, and results as data.

Nothing is read or written here; tools/report.py does both.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_doremi.reporting import plots, statements
from megatron_doremi.reporting.comparison import (
    Comparison,
    comparison_as_data,
    mean_and_last_weights,
    smoothing_floor,
)
from megatron_doremi.reporting.differences import differences, similar_names_note
from megatron_doremi.reporting.html import Image, Section, page
from megatron_doremi.reporting.runs import Run, flatten
from megatron_doremi.reporting.tables import (
    Table,
    across_runs_table,
    comparison_table,
    format_text,
    last_finite,
    run_table,
)

RESULTS_FORMAT = "megatron-doremi-results/1"
# Keys of config.json, without groups, prefixes and units, that a reader needs to interpret a run's numbers.
CONFIG_KEYS = (
    *(
        "domains",
        "domain_weights",
        "seq_length",
        "micro_batch_size",
        "global_batch_size",
        "train_iters",
        "seed",
    ),
    *(
        "model_size",
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
    ),
    *("step_size", "smoothing", "update", "weighting", "objective", "reference_load", "reference_losses"),
    *("lr", "min_lr", "lr_decay_style", "weight_decay", "clip_grad", "bf16", "fp16", "version", "world_size"),
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "zero_stage"),
)


@dataclass(frozen=True)
class Report:
    """A finished report.

    Attributes:
        console: the text to print.
        html: contents of report.html.
        images: the PNGs, also written as files.
        results: contents of results.json.
    """

    console: str
    html: str
    images: tuple[Image, ...]
    results: dict[str, Any]


def comparison_report(comparison: Comparison, runs: Mapping[str, Run]) -> Report:
    """Builds the report on a main model and a baseline.

    Args:
        comparison: the numbers.
        runs: "proxy", "main", "baseline" and optionally "reference".
    """
    table, sentences = comparison_table(comparison), statements.describe(comparison)
    images = _comparison_images(comparison, runs)
    by_name = {image.name: image for image in images}
    first = [by_name[name] for name in ("held_out_loss.png", "domain_weights.png")]
    rest = [image for image in images if image not in first]
    count = len(comparison.domains)
    sections = [
        Section("Result", tables=[table]),
        Section("Findings", sentences),
        Section("Held-out loss and weights", images=first),
        Section("Training", images=rest),
        _provenance_section(runs),
    ]
    subtitle = f"Domain weights learned by a proxy on {count} domains, and the model trained on them"
    title = "DoReMi: main model against baseline"
    console = "\n".join([format_text(table), "", *(f"- {sentence}" for sentence in sentences)])
    data = {
        "format": RESULTS_FORMAT,
        "kind": "comparison",
        **comparison_as_data(comparison),
        "statements": sentences,
        "runs": {label: _run_as_data(run) for label, run in runs.items()},
    }
    return Report(console, page(title, subtitle, sections), images, plain_numbers(data))


def runs_report(runs: Sequence[Run]) -> Report:
    """Builds the report on any number of runs: a section per run, and a comparison if two were evaluated."""
    labels = unique_labels([run.path.resolve().name for run in runs])
    labeled = dict(zip(labels, runs, strict=True))
    sections, text, images = [], [], []
    together = across_runs_table(labels, runs)
    notes = _notes(labeled)
    if together is not None:
        overlay = _evaluation_image(labeled, "held_out_over_time.png")
        sections.append(Section("Held-out losses side by side", notes, [together], overlay))
        text.append("\n".join([format_text(together), *(f"- {note}" for note in notes)]))
        images += overlay
    for label, run in labeled.items():
        table, figures = run_table(run), _run_images(f"{label}_", run)
        if together is None:
            figures += _evaluation_image({label: run}, f"{label}_held_out_over_time.png")
        title = f"{label} ({run.phase})" if run.phase != "unknown" else label
        sections.append(Section(title, [_run_sentence(run)], [table], figures))
        text.append(f"{format_text(table)}\n- {_run_sentence(run)}")
        images += figures
    sections.append(_provenance_section(labeled))
    count = "one run" if len(runs) == 1 else f"{len(runs)} runs"
    data = {
        "format": RESULTS_FORMAT,
        "kind": "runs",
        "runs": {label: _run_as_data(run) for label, run in labeled.items()},
        "notes": notes,
    }
    html = page("Training report", f"Report on {count}: {', '.join(labels)}", sections)
    return Report("\n\n".join(text), html, tuple(images), plain_numbers(data))


def _notes(runs: Mapping[str, Run]) -> list[str]:
    """Limits of a comparison of the evaluated runs, in sentences."""
    evaluated = {label: run for label, run in runs.items() if run.evaluations}
    similar = similar_names_note(list(dict.fromkeys(name for run in runs.values() for name in run.domain_names())))
    return [*(difference.sentence() for difference in differences(evaluated)), *([similar] if similar else [])]


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


def provenance_table(runs: Mapping[str, Run]) -> Table:
    """Returns the runs' important configuration values and those in which they differ, one column per run."""
    flat = {label: flatten(run.config) for label, run in runs.items()}
    keys = dict.fromkeys(key for values in flat.values() for key in values)
    chosen = [key for key in keys if _matters(key) or _differs(key, flat)]
    rows = [
        ("folder", *(str(run.path) for run in runs.values())),
        ("phase", *(run.phase for run in runs.values())),
        ("last step", *(str(_last_step(run)) for run in runs.values())),
    ]
    for key in chosen:
        if key.rsplit(".", 1)[-1] != "phase":
            rows.append((key, *(_shown(flat[label].get(key)) for label in runs)))
    return Table(("", *runs), tuple(rows))


def _matters(key: str) -> bool:
    leaf = key.rsplit(".", 1)[-1]
    return any(leaf == key or leaf.startswith(f"{key}_") or leaf.endswith(f"_{key}") for key in CONFIG_KEYS)


def _differs(key: str, flat: Mapping[str, Mapping[str, Any]]) -> bool:
    return len({_shown(values.get(key)) for values in flat.values()}) > 1


def _shown(value: Any) -> str:
    return "-" if value is None else str(value)


def _last_step(run: Run) -> int:
    trained = int(run.iterations[-1]) if run.iterations.size else 0
    return max(trained, run.evaluations[-1].iteration if run.evaluations else 0)


def _provenance_section(runs: Mapping[str, Run]) -> Section:
    values = [provenance_table(runs)]
    for label, run in runs.items():
        if run.weights_provenance:
            rows = tuple((key, _shown(value)) for key, value in flatten(run.weights_provenance).items())
            values.append(Table((f"domain_weights.json of {label}", "value"), rows))
    folded = [(f"Full configuration of {label}", flatten(run.config)) for label, run in runs.items()]
    return Section("Provenance", values=values, folded=folded)


def _comparison_images(comparison: Comparison, runs: Mapping[str, Run]) -> tuple[Image, ...]:
    names, proxy = comparison.names, runs["proxy"]
    natural = np.array([domain.natural_weight for domain in comparison.domains])
    doremi = np.array([domain.doremi_weight for domain in comparison.domains])
    pairs, bars = plots.held_out_pairs(comparison), plots.weight_bars(natural, doremi, names)
    images = [
        Image("held_out_loss.png", plots.png(pairs), "Last held-out loss of baseline and main by domain"),
        Image("domain_weights.png", plots.png(bars), "Natural weights and the weights learned by DoReMi"),
        *_training_images("proxy_", proxy, names),
        *_evaluation_image({label: runs[label] for label in ("baseline", "main")}, "held_out_over_time.png", names),
    ]
    return tuple(images)


def _run_images(prefix: str, run: Run) -> list[Image]:
    return _training_images(prefix, run, run.domain_names())


def _training_images(prefix: str, run: Run, names: Sequence[str]) -> list[Image]:
    """Draws weights, excess loss and training loss over time, those that the run has."""
    images = []
    if run.has_weights:
        floor = smoothing_floor(run, len(names))
        figure = plots.weights_over_time(run.iterations, run.weights.ordered(names), names, floor)
        caption = "Domain weights over time: at each step (faint) and their mean so far (strong)"
        images.append(Image(f"{prefix}weights.png", plots.png(figure), caption))
    if run.excess.values.size:
        figure = plots.excess_over_time(run.iterations, run.excess.ordered(names), names)
        caption = "Excess loss of the proxy over the reference, which drives the weights"
        images.append(Image(f"{prefix}excess_loss.png", plots.png(figure), caption))
    if run.score.values.size:
        title = "Score by domain"
        figure = plots.loss_over_time(run.iterations, run.score.ordered(names), names, title, "score")
        caption = "Score of each domain, which drives the weights in place of the excess loss"
        images.append(Image(f"{prefix}score.png", plots.png(figure), caption))
    if run.loss.values.size:
        figure = plots.loss_over_time(run.iterations, run.loss.ordered(names), names)
        images.append(Image(f"{prefix}training_loss.png", plots.png(figure), "Training loss by domain"))
    return images


def _evaluation_image(runs: Mapping[str, Run], file_name: str, names: Sequence[str] | None = None) -> list[Image]:
    """Draws held-out losses over time if a run has several evaluations; otherwise returns no image."""
    histories = {label: run.evaluations for label, run in runs.items() if run.evaluations}
    if not any(len(history) > 1 for history in histories.values()):
        return []
    evaluated = dict.fromkeys(name for history in histories.values() for each in history for name in each.losses)
    shown = [name for name in names if name in evaluated] if names is not None else list(evaluated)
    figure = plots.evaluations_over_time(histories, shown)
    return [Image(file_name, plots.png(figure), "Held-out loss over the steps, in nats per token")]


def _run_sentence(run: Run) -> str:
    parts = [f"phase {run.phase}, step {_last_step(run)}"]
    if run.iterations.size:
        final = float(run.scalars["loss"][-1])
        parts.append(f"last training loss {final:.3f} nats per token (step {int(run.iterations[-1])})")
    if run.evaluations:
        newest = run.evaluations[-1]
        parts.append(
            f"held-out loss at step {newest.iteration}: uniform mean {newest.uniform_mean:.3f}, "
            f"worst {newest.worst[1]:.3f} ({newest.worst[0]})"
        )
    else:
        parts.append("no evaluation line")
    return "; ".join(parts) + "."


def _run_as_data(run: Run) -> dict[str, Any]:
    data: dict[str, Any] = {"path": str(run.path), "phase": run.phase, "last_step": _last_step(run)}
    names = run.domain_names()
    if run.has_weights:
        in_file = run.recorded_weights is not None and set(run.recorded_weights) == set(names)
        mean, last = mean_and_last_weights(run if in_file else replace(run, recorded_weights=None), names)
        data["mean_weights"] = dict(zip(names, mean.tolist(), strict=True))
        data["last_weights"] = dict(zip(names, last.tolist(), strict=True))
    if run.iterations.size:
        final = last_finite(run.loss.ordered(names)).tolist()
        data["training_loss"] = dict(zip(names, final, strict=True))
    data["evaluations"] = [
        {
            "iteration": each.iteration,
            "losses": each.losses,
            "uniform_mean": each.uniform_mean,
            "worst": each.worst[1],
            "token_mean": each.token_mean,
        }
        for each in run.evaluations
    ]
    return data
