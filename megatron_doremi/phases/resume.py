"""Finds the checkpoint to resume from, and checks that it belongs to this run, before any model is built."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import create_model

from megatron_doremi.checkpoint.folder import (
    CheckpointState,
    check_contents,
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
    compared_entries,
    differences,
    for_message,
    free_in_the_stable_phase,
    override_faults,
    schedule_change,
)
from megatron_doremi.phases.load_target import branch_entry, checkpoint_to_resume
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
    path = from_rank_0(lambda: _path_text(checkpoint_to_resume(config.run, print_stderr)))
    if path is None:
        return None
    checkpoint = Path(path)
    state, learned, overridden = _matching_state(checkpoint, plan, identity, controller)
    before = state.recorded_identity()
    check_files(checkpoint, topology.rank, topology.world_size)
    check_contents(checkpoint, state, topology.rank, topology.world_size, progress)
    was_read, is_read = compared_entries(before), compared_entries(identity)
    changed = [name for name, value in is_read.items() if name in was_read and was_read[name] != value]
    branch = branch_entry(config.run, checkpoint, state.iteration)
    overrides = [
        *state.overrides,
        *branch,
        *({"iteration": state.iteration, "name": n, "before": before[n], "now": identity[n]} for n in changed),
    ]
    blend = BlendState.from_dict(state.blend.model_dump(), names)
    entry = None if learned is None else learned.model_dump()
    metrics_bytes = None if branch else state.metrics_bytes
    statements = _statements(before, identity, overridden, config, state.iteration, bool(branch))
    statements += _notes(controller, learned)
    return ResumePoint(checkpoint, state.iteration, blend, entry, metrics_bytes, tuple(overrides), tuple(statements))


def planned_resume(
    plan: RunPlan, identity: Identity, controller: MixtureController, unknown: Collection[str]
) -> list[str]:
    """What a run would say about its resume, or that it has ended; empty for a new run. Not collective; for a dry run.

    Args:
        controller: takes the checkpoint's state, if it learns.
        unknown: entries of the identity that are not known yet.

    Raises:
        ConfigError: as `resume_point`, but files are not compared with their checksums.
    """
    config = plan.config
    raise_if_any(override_faults(config.run.override_resume, identity))
    checkpoint = checkpoint_to_resume(config.run, print_stderr)
    if checkpoint is None:
        return []
    known = {name: value for name, value in identity.items() if name not in unknown}
    state, learned, overridden = _matching_state(checkpoint, plan, known, controller)
    branch = branch_entry(config.run, checkpoint, state.iteration)
    lines = _statements(state.recorded_identity(), known, overridden, config, state.iteration, bool(branch))
    if learned is not None:
        controller.load_state_dict(learned.model_dump(), plan.names)
    ended = _ended(config, state.iteration, controller.settled() is not None)
    if ended and not branch:
        lines[0] = ended
    return [*lines, *_notes(controller, learned)]


def _ended(config: Config, iteration: int, settled: bool) -> str:
    """A line if a run after `iteration` steps has none left to take, because it took all or has settled; else ""."""
    total, again = config.data.train_iters, "the same command takes no step"
    if iteration >= total:
        return f"finished: all {total:,} steps were taken; {again}"
    drift = f"--doremi-stop-drift {config.doremi.doremi_stop_drift:g}"
    return f"finished: stopped early after {iteration:,} of {total:,} steps ({drift}); {again}" if settled else ""


def _matching_state(
    checkpoint: Path, plan: RunPlan, identity: Identity, controller: MixtureController
) -> tuple[CheckpointState, ControllerState | None, list[str]]:
    """The state of a checkpoint, that of its controller, and the entries of the identity that are overridden.

    Raises:
        ConfigError: with all differences between the checkpoint and this run.
    """
    config, names = plan.config, plan.names
    state = read_state(checkpoint)
    subject = f"--load {checkpoint}"
    allowed = {*config.run.override_resume}
    if config.data.change_domain_weights:
        allowed.add("sampling_weights")
    allowed |= free_in_the_stable_phase(state.recorded_identity(), config, state.iteration)
    faults, overridden = differences(state.recorded_identity(), identity, subject, allowed)
    if config.data.train_iters < state.iteration:
        rule = f"at least the {state.iteration:,} steps that were taken"
        faults.append(Fault("--train-iters", f"{config.data.train_iters:,}", rule, "give more, or a new --save"))
    learned = None
    try:
        learned = _controller_state(checkpoint, state, controller)
    except ConfigError as error:
        faults += error.faults
    if state.recorded_identity().get("domains", list(names)) == list(names):
        faults += _domain_faults(state, learned, controller.state_name, names, subject)
    raise_if_any(faults)
    return state, learned, overridden


def _notes(controller: MixtureController, learned: ControllerState | None) -> list[str]:
    """What the user is told about changed settings of the controller."""
    notes = [] if learned is None else controller.resume_notes(learned.model_dump())
    return [f"resume: {note}" for note in notes]


def _path_text(path: Path | None) -> str | None:
    return None if path is None else str(path)


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
    branches: bool,
) -> list[str]:
    """What the user is told about a resume: overrides, a changed schedule, and entries that an old checkpoint does not
    record."""
    origin = f", branched from {config.run.load_folder}" if branches else ""
    lines = [f"resume: from iteration {iteration:,} of {config.data.train_iters:,}{origin}"]
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
