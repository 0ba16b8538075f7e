"""A run that another one reads: the reference of a proxy or of scoring, and the model of an evaluation."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from megatron_doremi.checkpoint.folder import newest_checkpoint, read_state
from megatron_doremi.checkpoint.run_config import read_run_config
from megatron_doremi.config import Config
from megatron_doremi.errors import ConfigError, Fault, raise_if_any
from megatron_doremi.mixture.controller import MixtureController
from megatron_doremi.mixture.reference import OnlineReference, ReferenceRun, check_reference
from megatron_doremi.parallel.context import ParallelContext
from megatron_doremi.phases.run_data import RunData
from megatron_doremi.plan import RunPlan
from megatron_doremi.settings import EVALUATE
from megatron_doremi.validation import misfits


def scores_online(config: Config, controller: MixtureController) -> bool:
    """Whether a training run scores its own batches with a reference."""
    return controller.needs_reference and config.doremi.reference_losses == "online"


def reads_reference_losses(config: Config, controller: MixtureController) -> bool:
    """Whether a run reads recorded reference losses."""
    return controller.needs_reference and config.doremi.reference_losses != "online"


def read_trained(folder: Path, flag: str, data: RunData, config: Config, needs_all_steps: bool = False) -> ReferenceRun:
    """Finds the newest model of a run, `folder` given by `flag`, and checks that it fits this data and layout.

    Args:
        needs_all_steps: the run has to be finished, unless --allow-unfinished is given.
    """
    run_config = read_run_config(folder, flag)
    gpt = check_reference(run_config, flag, folder, data.manifest, config.data.seq_length, data.vocab_size)
    faults = [
        Fault(f"{flag} {folder}", f"{name} {value}", rule, "run it at another layout, or train another model")
        for name, value, rule in misfits(gpt, config.parallel)
    ]
    checkpoint = newest_checkpoint(folder)
    if checkpoint is None:
        rule = "a run that was trained to its end"
        raise ConfigError([*faults, Fault(f"{flag} {folder}", "no complete checkpoint", rule, "train it first")])
    state = read_state(checkpoint)
    # config.json can be edited; the checkpoint says what was trained.
    recorded = state.recorded_identity()
    told = {"domains": run_config.domains, "tokenizer_sha256": run_config.tokenizer_sha256, **asdict(gpt)}
    trained = {name: recorded[name] for name in ("domains", "tokenizer_sha256") if name in recorded}
    trained |= recorded.get("gpt", {})
    names = [name for name, value in trained.items() if told[name] != value]
    if names:
        value = ", ".join(f"{name} {told.get(name)!r}" for name in names)
        rule = "what its checkpoint says: " + ", ".join(f"{name} {trained[name]!r}" for name in names)
        faults.append(Fault(f"{flag} {folder}: config.json", value, rule, "restore config.json, or train it again"))
    planned = recorded.get("train_iters", run_config.train_iters())
    if needs_all_steps and state.iteration < planned and not config.run.allow_unfinished:
        value = f"{state.iteration:,} of its {planned:,} steps taken"
        remedy = "train it to its end, or give --allow-unfinished to take it as it is"
        faults.append(Fault(f"{flag} {folder}", value, "a finished run", remedy))
    raise_if_any(faults)
    batch = recorded.get("global_batch_size", run_config.global_batch_size)
    return ReferenceRun(gpt, checkpoint / "weights", state.iteration, batch)


def read_reference(config: Config, data: RunData) -> ReferenceRun:
    """Finds and checks the reference of a proxy, or of scoring."""
    return read_trained(Path(config.doremi.reference_load), "--reference-load", data, config, needs_all_steps=True)


def read_loaded(config: Config, data: RunData) -> ReferenceRun:
    """Finds and checks the model of scoring or of an evaluation."""
    if config.data.phase == EVALUATE:
        return read_trained(Path(config.run.load), "--load", data, config)
    return read_reference(config, data)


def make_reference(plan: RunPlan, run: ReferenceRun | None, context: ParallelContext) -> OnlineReference | None:
    """The frozen reference on the proxy's layout and in its precision; None if the losses are on disk or not needed."""
    if run is None:
        return None
    return OnlineReference(run, context, plan.dtype, plan.batch_shape, plan.config.parallel.loss_chunk_tokens)
