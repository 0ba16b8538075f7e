"""Finds the checkpoint to resume from, and checks that it belongs to this run, before any model is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import create_model

from megatron_doremi.checkpoint.folder import (
    CheckpointState,
    check_contents,
    newest_checkpoint,
    read_state,
)
from megatron_doremi.checkpoint.reader import check_files
from megatron_doremi.config import Config
from megatron_doremi.console import print_stderr
from megatron_doremi.data.blend import BlendState
from megatron_doremi.errors import ConfigError, Fault, raise_if_any
from megatron_doremi.mixture.controller import ControllerState, MixtureController
from megatron_doremi.parallel.exchange import from_rank_0
from megatron_doremi.phases.identity import (
    Identity,
    differences,
    for_message,
    override_faults,
    schedule_change,
)
from megatron_doremi.plan import RunPlan
from megatron_doremi.storage.formats import Schema, check_entry


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint from which a run can resume.

    Attributes:
        checkpoint: its folder.
        iteration: steps taken.
        blend: state of the blend.
        controller_state: state of a controller that learns, else None; see `MixtureController.load_state_dict`.
        metrics_bytes: size of metrics.jsonl when the checkpoint was saved; None if the checkpoint does not record it.
        overrides: entries of the run's identity that the user has changed since the run began, with their iterations.
        statements: what the user is told about the resume.
    """

    checkpoint: Path
    iteration: int
    blend: BlendState
    controller_state: dict[str, Any] | None
    metrics_bytes: int | None = None
    overrides: tuple[dict[str, Any], ...] = ()
    statements: tuple[str, ...] = ()


def resume_point(
    plan: RunPlan,
    identity: Identity,
    controller: MixtureController,
    progress: Callable[[], None] = lambda: None,
) -> ResumePoint | None:
    """The checkpoint from which the run resumes; None for a new run. A collective call.

    Args:
        identity: of this run.
        controller: of the mixture; gives the name and the schema of its state.
        progress: called for each file of the checkpoint that is read.

    Raises:
        ConfigError: the checkpoint belongs to another run (all differences are reported), or is damaged.
    """
    config, names, topology = plan.config, plan.names, plan.topology
    raise_if_any(override_faults(config.run.override_resume, identity))
    if not config.run.load:
        return None
    # Rank 0 decides: on a shared file system ranks may see different files.
    newest = from_rank_0(lambda: _find_checkpoint(Path(config.run.load)))
    if newest is None:
        return None
    checkpoint = Path(newest)
    state = read_state(checkpoint)
    subject = f"--load {checkpoint}"
    allowed = {*config.run.override_resume}
    if config.data.change_domain_weights:
        allowed.add("sampling_weights")
    before = state.recorded_identity()
    faults, overridden = differences(before, identity, subject, allowed)
    if config.data.train_iters < state.iteration:
        rule = f"at least the {state.iteration:,} steps that were taken"
        faults.append(Fault("--train-iters", f"{config.data.train_iters:,}", rule, "give more, or a new --save"))
    learned = None
    try:
        learned = _controller_state(checkpoint, state, controller)
    except ConfigError as error:
        faults += error.faults
    faults += _domain_faults(state, learned, controller.state_name, names, subject)
    raise_if_any(faults)
    check_files(checkpoint)
    check_contents(checkpoint, state, topology.rank, topology.world_size, progress)
    changed = [name for name in identity if name in before and before[name] != identity[name]]
    overrides = [
        *state.overrides,
        *({"iteration": state.iteration, "name": n, "before": before[n], "now": identity[n]} for n in changed),
    ]
    blend = BlendState.from_dict(state.blend.model_dump(), names)
    entry = None if learned is None else learned.model_dump()
    statements = _statements(before, identity, overridden, config, state.iteration)
    return ResumePoint(
        checkpoint, state.iteration, blend, entry, state.metrics_bytes, tuple(overrides), tuple(statements)
    )


def _find_checkpoint(load: Path) -> str | None:
    """The newest complete checkpoint in `load`; None if `load` holds no checkpoint.

    Raises:
        ConfigError: there are checkpoints, but none is complete.
    """
    rejected: list[str] = []
    newest = newest_checkpoint(load, rejected.append)
    if newest is None:
        # A new run would overwrite what this run has written.
        rule, remedy = "a complete checkpoint, or none at all", "copy it again, or delete the folder to start over"
        subject = f"--load: checkpoints of {load}"
        raise_if_any([Fault(subject, f"no complete one: {line}", rule, remedy) for line in rejected])
        return None
    for line in rejected:
        print_stderr(line)
    return str(newest)


def _controller_state(
    checkpoint: Path, state: CheckpointState, controller: MixtureController
) -> ControllerState | None:
    """The controller's state in state.json, checked; None if it does not learn. Raises ConfigError."""
    if not controller.learns:
        return None
    name, subject = controller.state_name, str(checkpoint / "state.json")
    remedy = f"delete {checkpoint} to resume from an older one"
    # Checked under its name, so that messages show it.
    schema = create_model("State", __base__=Schema, **{name: (controller.state_schema, ...)})  # type: ignore[call-overload]
    raw = state.entry(name)
    entry: ControllerState = getattr(check_entry({} if raw is None else {name: raw}, subject, schema, remedy), name)
    if entry.steps != state.iteration:
        rule = f"{name}.steps {entry.steps} must equal iteration {state.iteration}"
        raise ConfigError(Fault(subject, f"{name}.steps: {entry.steps}", rule, remedy))
    return entry


def _domain_faults(
    state: CheckpointState, learned: ControllerState | None, learned_name: str, names: Sequence[str], subject: str
) -> list[Fault]:
    """A fault for each part of the state whose domains are not exactly the run's."""
    domains_of: dict[str, set[str]] = {"blend": set(state.blend.cursors)}
    for key, value in learned or ():
        if isinstance(value, dict):
            domains_of[f"{learned_name}.{key}"] = set(value)
    faults = []
    rule, remedy = "the state of exactly the run's domains", "delete this checkpoint to resume from an older one"
    for part, domains in domains_of.items():
        wrong = [f"no {name!r}" for name in names if name not in domains]
        wrong += [f"an extra {name!r}" for name in sorted(domains - set(names))]
        if wrong:
            faults.append(Fault(subject, f"state.json: {part} has {', '.join(wrong)}", rule, remedy))
    return faults


def _statements(
    before: Mapping[str, Any],
    identity: Identity,
    overridden: Sequence[str],
    config: Config,
    iteration: int,
) -> list[str]:
    """What the user is told about a resume: overrides, a changed schedule, and entries that an old checkpoint does not
    record."""
    lines = [f"resume: from iteration {iteration:,} of {config.data.train_iters:,}"]
    lines += [
        f"resume: {name} changed from {for_message(before[name], identity[name])} "
        f"to {for_message(identity[name], before[name])}"
        for name in overridden
    ]
    change = schedule_change(before, config, iteration)
    if change is not None:
        lines.append(f"resume: {change}")
    unknown = [name for name in identity if name not in before]
    if unknown:
        lines.append(f"resume: the checkpoint does not record {', '.join(unknown)}: not compared")
    return lines
