"""Which checkpoint --load names: a run's newest, or the one of `DIR@STEP`, from which a run branches."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_doremi.checkpoint.folder import checkpoint_at, newest_checkpoint, read_state
from megatron_doremi.errors import ConfigError, Fault, raise_if_any
from megatron_doremi.run_settings import RunConfig

# The name, in the overrides of a run's identity, of the checkpoint from which the run branched.
BRANCH = "branch"


def checkpoint_to_resume(run: RunConfig, report: Callable[[str], None]) -> Path | None:
    """The checkpoint from which a training run resumes or branches; None if it starts.

    A branch (--load DIR@STEP, another --save) starts from that checkpoint, and resumes from its own newest one.

    Args:
        report: called with a message for each incomplete checkpoint that is skipped.

    Raises:
        ConfigError: no checkpoint is complete, the step has none, or --save holds something else.
    """
    if not run.load:
        return None
    folder, save = Path(run.load_folder), Path(run.save)
    if run.load_step is None:
        return _newest(folder, report)
    if os.path.realpath(folder) == os.path.realpath(save):
        newest, wanted = _newest(folder, report), checkpoint_at(folder, run.load_step)
        if newest != wanted:
            rule = f"the newest checkpoint of a run that resumes in its own folder, {newest and newest.name}"
            remedy = f"give another folder to --save to branch from this step, or --load {folder} to resume"
            raise ConfigError(Fault("--load", run.load, rule, remedy))
        return newest
    newest = _newest(save, report) if run.save else None
    if newest is None:
        return checkpoint_at(folder, run.load_step)
    if not _branched_from(read_state(newest).overrides, folder, run.load_step):
        rule = f"an empty folder, or a branch of {run.load}"
        remedy = f"give --load {save} to resume the run that it holds, or another --save"
        raise ConfigError(Fault(f"--save {save}", "holds another run", rule, remedy))
    return newest


def is_branch(entry: dict[str, Any]) -> bool:
    """Whether an entry of a run's overrides records where the run branched from another."""
    return entry.get("name") == BRANCH


def _branched_from(overrides: Sequence[dict[str, Any]], folder: Path, step: int) -> bool:
    """Whether a run branched last from `step` of the run in `folder`, which may have been moved since."""
    branches = [entry for entry in overrides if is_branch(entry)]
    if not branches or branches[-1].get("iteration") != step:
        return False
    recorded = Path(str(branches[-1].get("before")))
    moved = not recorded.exists() and recorded.name == folder.name
    return moved or os.path.realpath(recorded) == os.path.realpath(folder)


def branch_entry(run: RunConfig, checkpoint: Path, iteration: int) -> list[dict[str, Any]]:
    """What a branch records among its overrides; empty unless `checkpoint` is another run's."""
    if checkpoint.parent.parent.resolve() == Path(run.save).resolve():
        return []
    return [{"iteration": iteration, "name": BRANCH, "before": run.load_folder, "now": run.save}]


def _newest(folder: Path, report: Callable[[str], None]) -> Path | None:
    """The newest complete checkpoint of a folder; None if it holds none. Raises ConfigError if none is complete."""
    rejected: list[str] = []
    newest = newest_checkpoint(folder, rejected.append)
    if newest is None:
        # A new run would overwrite what this run has written.
        rule, remedy = "a complete checkpoint, or none at all", "copy it again, or delete the folder to start over"
        subject = f"--load: checkpoints of {folder}"
        raise_if_any([Fault(subject, f"no complete one: {line}", rule, remedy) for line in rejected])
        return None
    for line in rejected:
        report(line)
    return newest
