"""The resolved run as text: what --dry-run prints in full, and what every run prints at its start."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from megatron_doremi.config import SECTIONS, Config
from megatron_doremi.console import COLUMNS, wrapped
from megatron_doremi.engine.optimizer import make_learning_rate
from megatron_doremi.mixture.controller import MixtureController
from megatron_doremi.plan import RunPlan
from megatron_doremi.planning.machine_plan import machine_lines
from megatron_doremi.planning.memory import parameter_counts, rank_memory
from megatron_doremi.settings import EVALUATE, NO_EVALUATION, SCORE, TRAINING, phases_of
from megatron_doremi.shapes import Shape, TransformersShape
from megatron_doremi.text_table import shown_name, table_lines

# Characters of the domains that a run lists at its start.
_LISTED_CHARACTERS = 200
_LONGEST_NAME = 32


def describe_plan(
    plan: RunPlan,
    controller: MixtureController,
    weights_setting: str,
    held_out_counts: Sequence[int],
    reference: Shape | None,
    stand_ins: Iterable[str],
) -> str:
    """What --dry-run prints: the settings as JSON, the run in a few lines, what it takes of the machine, and the
    table of its domains.

    Args:
        weights_setting: --domain-weights, its default resolved.
        held_out_counts: [k] held-out windows of each domain that an evaluation reads.
        reference: the model that a proxy holds beside its own; None: it holds none.
        stand_ins: lines on inputs that do not exist yet.
    """
    lines = [
        json.dumps(resolved_settings(plan, weights_setting), indent=2),
        *(part for line in plan_lines(plan, controller, weights_setting, reference) for part in wrapped(line)),
        *(part for line in machine_lines(plan, controller.before_backward, reference) for part in wrapped(line)),
        *table(_columns(plan, controller, held_out_counts)),
        *(part for line in stand_ins for part in wrapped(line)),
    ]
    return "\n".join(lines)


def start_lines(
    plan: RunPlan,
    controller: MixtureController,
    weights_setting: str,
    reference: Shape | None,
    device: str,
    repeated: str,
) -> list[str]:
    """What a run prints at its start; the arguments are those of `describe_plan`.

    Args:
        device: what a rank computes on, as text.
        repeated: a line that lists the domains that repeat; "" if none does.
    """
    config, ranks = plan.config, _count(plan.topology.world_size, "rank")
    layout, precision, *lines = plan_lines(plan, controller, weights_setting, reference)
    lines = [f"{layout}; {precision}", *lines]
    if config.data.phase in TRAINING:
        listed, left = _domains(plan, controller)
        lines.append(f"domains: {listed}" + (f", and {left:,} more (--dry-run lists all)" if left else ""))
        lines += [repeated] if repeated and left else []
    lines.append(f"results: {_results(config, controller.learns)}")
    return [f"{config.data.phase}: {ranks} on {device}", *(f"  {line}" for line in lines)]


def plan_lines(
    plan: RunPlan, controller: MixtureController, weights_setting: str, reference: Shape | None
) -> list[str]:
    """Layout, precision, sizes, tokens and mixture; the arguments are those of `describe_plan`."""
    config, topology = plan.config, plan.topology
    trains = config.data.phase in TRAINING
    precision = "float32"
    if config.optimizer.bf16:
        precision = "bfloat16 weights and activations"
        precision += ", float32 gradients and master weights" if trains else ""
    return [
        f"layout: tensor {topology.tensor_size} x pipeline {topology.pipe_size} x data {topology.data_size} "
        f"= {_count(topology.world_size, 'rank')}" + (f", ZeRO {config.parallel.zero_stage}" if trains else ""),
        f"precision: {precision}",
        *_sizes(plan, controller.before_backward, reference),
        *(_budget(plan) if trains else ["a forward pass: [{}, {}] per replica".format(*plan.batch_shape)]),
        *_mixture(plan, controller, weights_setting),
    ]


def _domains(plan: RunPlan, controller: MixtureController) -> tuple[str, int]:
    """The domains with the largest sampling weights, with their epochs where these are known, and how many are left."""
    order = np.argsort(-plan.sampling_weights, kind="stable")
    listed: list[str] = []
    for i in order:
        epochs = f" ({plan.epochs[i]:,.2f} epochs)" if controller.samples_ahead else ""
        listed.append(f"{shown_name(plan.names[i], _LONGEST_NAME)} {plan.sampling_weights[i]:.4f}{epochs}")
        if len(", ".join(listed)) > _LISTED_CHARACTERS:
            break
    return ", ".join(listed), len(order) - len(listed)


def _results(config: Config, learns: bool) -> str:
    """Where a run writes what."""
    run, phase = config.run, config.data.phase
    if phase == EVALUATE:
        return f"{run.save} (evaluations.jsonl)" if run.save else "printed only; --save DIR records them"
    if phase == SCORE:
        return f"{run.save} (scores.json, losses/)"
    wandb = f"; W&B project {run.wandb_project}" if run.wandb_project else ""
    files = ["metrics.jsonl", *(["domain_weights.json"] if learns else []), "checkpoints/"]
    if not run.tensorboard_dir:
        return f"{run.save} ({', '.join([*files, 'tensorboard/'])}){wandb}"
    return f"{run.save} ({', '.join(files)}), TensorBoard in {run.tensorboard_dir}{wandb}"


def resolved_settings(plan: RunPlan, weights_setting: str) -> dict[str, dict[str, Any]]:
    """The settings that the phase reads, by section, with defaults that depend on others resolved.

    `model` is the shape of the model, of the run's own or of the one that it loads.
    """
    config, phase = plan.config, plan.config.data.phase
    values: dict[str, dict[str, Any]] = {
        section: {
            field.name: getattr(getattr(config, section), field.name)
            for field in dataclasses.fields(cls)
            if phase in phases_of(cls, field)
        }
        for section, cls in SECTIONS.items()
    }
    values["model"] = dataclasses.asdict(plan.shape)
    if phase in NO_EVALUATION:
        values["data"] |= {"global_batch_size": plan.global_batch_size, "domain_weights": weights_setting}
    if phase in TRAINING:
        values["optimizer"]["lr_warmup_iters"] = make_learning_rate(config.optimizer, config.data.train_iters).warmup
    return {section: entries for section, entries in values.items() if entries}


def _sizes(plan: RunPlan, alternating: bool, reference: Shape | None) -> list[str]:
    """Parameters, and bytes on the rank that holds most. Replicas do not share a reference."""
    config, shape, topology = plan.config, plan.shape, plan.topology
    layout = (topology.tensor_size, topology.pipe_size)
    total, largest = parameter_counts(shape, *layout)
    trains, models = config.data.phase in TRAINING, (("model", shape), ("reference", reference))
    held = rank_memory(plan, alternating, reference)
    memory = [f"{_size(held.state)} of weights" + (", gradients and optimizer state" if trains else "")]
    if trains:
        memory.append(f"{_size(held.activations)} of activations of {_count(held.held, 'micro-batch', 'es')}")
    if reference is not None:
        memory.append(f"{_size(held.reference)} of the reference's weights")
    memory.append(f"{_size(held.loss)} while the loss is computed")
    if held.working > 0.05 * held.total:
        memory.append(f"{_size(held.working)} of buffers and backward passes")
    sharded = ""
    if trains and config.parallel.zero_stage == 3:
        largest, sharded = held.parameters, ", sharded by ZeRO 3"
    padded = shape.padded_vocab_size(1)
    vocabulary = f"{shape.vocab_size:,} tokens" + (f", padded to {padded:,}" if padded != shape.vocab_size else "")
    return [
        *(f"{name}: {each.statement()}" for name, each in models if isinstance(each, TransformersShape)),
        f"parameters: {total:,} (vocabulary {vocabulary}), at most {largest:,} per rank{sharded}",
        f"memory per rank: {_size(held.total)}, of which {', '.join(memory)} (docs/memory.md)",
    ]


def _budget(plan: RunPlan) -> list[str]:
    micro_batch, seq_length = plan.batch_shape
    return [
        f"a step: {plan.global_batch_size:,} windows = {plan.step_tokens:,} tokens in "
        f"{_count(plan.micro_batches, 'micro-batch', 'es')} per rank, each [{micro_batch}, {seq_length}]; "
        f"the run: {plan.config.data.train_iters:,} steps = {plan.tokens:,} tokens",
    ]


def _mixture(plan: RunPlan, controller: MixtureController, weights_setting: str) -> list[str]:
    """A line on what decides the mixture, and one on what ends the run early; none for an evaluation."""
    phase = plan.config.data.phase
    if phase == EVALUATE:
        return []
    if phase == SCORE:
        total, doremi = sum(plan.windows_needed), plan.config.doremi
        tasks = doremi.num_shards
        share = f"; task {doremi.shard} of {tasks:,}: about {-(-total // tasks):,} of them" if tasks > 1 else ""
        if not plan.config.data.train_iters:
            return [f"to record: all {total:,} windows{share}"]
        steps = f"{plan.config.data.train_iters:,} steps under sampling weights {weights_setting}"
        return [f"to record: the windows that a proxy reads in {steps}, at most {total:,}{share}"]
    start = "sampling weights" if controller.samples_ahead else "sampling weights of the first step"
    early = [f"early stop: {controller.stop_rule}"] if controller.stop_rule else []
    return [f"mixture: {controller.method}; {start}: {weights_setting}", *early]


def _columns(plan: RunPlan, controller: MixtureController, held_out_counts: Sequence[int]) -> dict[str, list[str]]:
    """The columns of the table of domains: a header and [k] cells each."""
    phase = plan.config.data.phase
    columns = {"domain": list(plan.names)}
    if phase != EVALUATE:
        columns["windows"] = [f"{count:,}" for count in plan.window_counts]
    if phase in TRAINING or (phase == SCORE and plan.config.data.train_iters):
        columns["weight"] = [f"{weight:.4f}" for weight in plan.sampling_weights]
    if phase == SCORE:
        columns["to record"] = [f"{count:,}" for count in plan.windows_needed]
    if phase in TRAINING and controller.samples_ahead:
        columns["epochs"] = [f"{passes:,.2f}" for passes in plan.epochs]
    if phase != SCORE:
        columns["held-out windows"] = [f"{count:,}" for count in held_out_counts]
    return columns


def _size(count: float) -> str:
    """A number of bytes."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def table(columns: dict[str, list[str]]) -> list[str]:
    """Lines of a table: its headers, and a row for each cell of the columns, as `table_lines` aligns them."""
    rows = list(zip(*columns.values(), strict=True))
    # Below the time of day, where a run prints it.
    return [f"  {line}" for line in table_lines(list(columns), rows, COLUMNS - len("HH:MM:SS   "))]
