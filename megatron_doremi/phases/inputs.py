"""Everything that a run reads, opened with every fault of every file collected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from megatron_doremi.config import Config, GPTConfig, gpt_config
from megatron_doremi.data.reference_losses import ReferenceLosses
from megatron_doremi.errors import ConfigError, Fault, raise_if_any
from megatron_doremi.mixture.controller import MixtureController
from megatron_doremi.mixture.controllers import make_controller
from megatron_doremi.mixture.reference import ReferenceRun
from megatron_doremi.parallel.topology import Topology
from megatron_doremi.phases.early_checks import reference_faults
from megatron_doremi.phases.run_data import RunData, open_data
from megatron_doremi.phases.score import open_reference_losses
from megatron_doremi.phases.trained_run import read_loaded, read_reference, reads_reference_losses, scores_online
from megatron_doremi.plan import RunPlan, make_plan
from megatron_doremi.planning.epochs import check_repetition
from megatron_doremi.settings import EVALUATE, TRAINING
from megatron_doremi.storage.files import sha256_of

T = TypeVar("T")


@dataclass(frozen=True)
class Inputs:
    """What a run reads.

    Attributes:
        plan: the run as resolved.
        controller: what decides the mixture.
        repeated: what its mixture repeats, in words; "" where nothing is.
        reference: the model that scoring, an evaluation, or a proxy that scores its batches with it loads.
        reference_losses: of a proxy that reads them from disk; else None.
    """

    data: RunData
    plan: RunPlan
    controller: MixtureController
    repeated: str
    reference: ReferenceRun | None
    reference_losses: ReferenceLosses | None


def open_inputs(config: Config, topology: Topology) -> Inputs:
    """Opens what the run reads. Raises ConfigError with every fault of every file."""
    phase, faults = config.data.phase, list[Fault]()

    def collect(work: Callable[[], T]) -> T | None:
        try:
            return work()
        except ConfigError as error:
            faults.extend(error.faults)
            return None

    data = collect(lambda: open_data(config, phase != EVALUATE, topology.data_size))
    if data is None:
        # What the reference says of itself can be known without the data.
        raise ConfigError([*faults, *reference_faults(config)])
    opened = data
    if phase not in TRAINING:
        # The model is that of the run that is loaded; no flag describes it.
        loaded = read_loaded(config, data)
        plan = plan_run(config, topology, data, loaded.gpt)
        return Inputs(data, plan, make_controller(plan), "", loaded, None)
    plan = plan_run(config, topology, data)
    controller = make_controller(plan)
    repeated = collect(lambda: check_repetition(plan, controller))
    reference = reference_losses = None
    if scores_online(config, controller):
        reference = collect(lambda: read_reference(config, opened))
    if reads_reference_losses(config, controller):
        reference_losses = collect(lambda: open_reference_losses(config, opened))
    raise_if_any(faults)
    return Inputs(data, plan, controller, repeated or "", reference, reference_losses)


def plan_run(config: Config, topology: Topology, data: RunData, gpt: GPTConfig | None = None) -> RunPlan:
    """The run as resolved.

    Args:
        gpt: shape of the model that is loaded; None: the one that the flags describe.
    """
    shape = gpt or gpt_config(config.model, config.data.seq_length, data.vocab_size)
    counts = data.window_counts(config.data.seq_length)
    return make_plan(config, topology, shape, data.names, counts, data.weights)


def what_is_read(inputs: Inputs) -> dict[str, Any]:
    """What this rank sees of the files that decide a run, in hashes: a node may hold a stale copy."""
    data, reference, reference_losses = inputs.data, inputs.reference, inputs.reference_losses
    entry: dict[str, Any] = {
        "domains": list(data.names),
        "tokenizer_sha256": data.tokenizer_sha256,
        "data_fingerprint": data.manifest.fingerprint(),
        "data_content": data.content,
        "held_out_content": data.held_out_content,
        "sampling weights": data.weights.tolist(),
    }
    if reference is not None:
        # Not its weights, which may be gigabytes: what its checkpoint says of them.
        entry["checkpoint of the reference"] = sha256_of(reference.weights.parent / "state.json")
    if reference_losses is not None:
        entry["scores.json of the reference losses"] = sha256_of(reference_losses.folder / "scores.json")
    return entry
