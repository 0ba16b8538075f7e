"""Everything that a run reads, opened with all faults of all files collected."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_doremi.config import Config, gpt_config
from megatron_doremi.data.reference_losses import ReferenceLosses
from megatron_doremi.errors import ConfigError, Fault, raise_if_any
from megatron_doremi.mixture.controller import MixtureController
from megatron_doremi.mixture.controllers import make_controller
from megatron_doremi.mixture.reference import TrainedModel
from megatron_doremi.parallel.exchange import gather_json
from megatron_doremi.parallel.topology import Topology
from megatron_doremi.phases.document_ends import document_warnings, with_documents
from megatron_doremi.phases.early_checks import reference_faults
from megatron_doremi.phases.identity import run_identity
from megatron_doremi.phases.load_target import checkpoint_to_resume
from megatron_doremi.phases.output_checks import planned_output_faults
from megatron_doremi.phases.resume import planned_resume
from megatron_doremi.phases.run_data import RunData, open_data
from megatron_doremi.phases.score import missing_losses, open_reference_losses
from megatron_doremi.phases.selected_domains import sampling_setting
from megatron_doremi.phases.stand_in_data import stand_in_data
from megatron_doremi.phases.to_come import DATA, LOSSES, WEIGHTS, inputs_to_come
from megatron_doremi.phases.trained_run import (
    initial_shape,
    loaded_warnings,
    read_initial,
    read_loaded,
    read_reference,
    reads_reference_losses,
    recorded_warnings,
    scores_online,
)
from megatron_doremi.plan import RunPlan, make_plan
from megatron_doremi.planning.describe import describe_plan, start_lines
from megatron_doremi.planning.epochs import check_repetition
from megatron_doremi.planning.layouts import suggest_layouts, suggestion_text
from megatron_doremi.planning.machine_plan import memory_faults
from megatron_doremi.planning.mixture_checks import mixture_faults, mixture_warnings
from megatron_doremi.planning.recomputation import with_held_logits, with_recomputation
from megatron_doremi.planning.shape_checks import shape_warnings
from megatron_doremi.settings import EVALUATE, TRAINING
from megatron_doremi.shapes import Shape
from megatron_doremi.storage.files import sha256_of

T = TypeVar("T")


@dataclass(frozen=True)
class Inputs:
    """What a run reads.

    Attributes:
        plan: the resolved run.
        controller: what decides the mixture.
        repeated: a line that lists the domains that repeat; "" if none does.
        loaded: the run whose model scoring, an evaluation, or a proxy with an online reference loads; else None.
        initial: the model whose weights a new run starts from (--init-from); else None.
        reference_losses: of a proxy that reads them from disk; else None.
        to_come: see `inputs_to_come`; empty unless the run is a dry run.
        resumes: of a dry run, what the run would say about its resume; empty if it would start.
        fitting: lines on what `fitted` chose.
    """

    data: RunData
    plan: RunPlan
    controller: MixtureController
    repeated: str
    loaded: TrainedModel | None
    initial: TrainedModel | None
    reference_losses: ReferenceLosses | None
    to_come: Mapping[str, str]
    resumes: tuple[str, ...] = ()
    fitting: tuple[str, ...] = ()


def open_inputs(config: Config, topology: Topology) -> Inputs:
    """Opens what the run reads. Raises ConfigError with all faults of all files."""
    phase, faults = config.data.phase, list[Fault]()

    def collect(work: Callable[[], T]) -> T | None:
        try:
            return work()
        except ConfigError as error:
            faults.extend(error.faults)
            return None

    to_come = inputs_to_come(config)
    if DATA in to_come:
        opened = collect(lambda: stand_in_data(config, topology.data_size))
    else:
        opened = collect(lambda: open_data(config, phase != EVALUATE, topology.data_size, to_come))
    if opened is None:
        # The reference can be checked without the data.
        raise ConfigError([*faults, *reference_faults(config)])
    data, weights = opened
    if config.run.dry_run:
        faults += planned_output_faults(config)
    if phase not in TRAINING:
        loaded = collect(lambda: read_loaded(config, data, to_come))
        raise_if_any(faults)
        assert loaded is not None
        plan = plan_run(config, topology, data, weights, loaded.shape)
        data = _with_warnings(data, loaded_warnings(config, loaded.shape, loaded))
        return Inputs(data, plan, make_controller(plan), "", loaded, None, None, to_come)
    initial = None
    try:
        initial = read_initial(config, data, to_come)
    except ConfigError as error:
        # Without its shape there is no plan. The checks of config.json find some of its faults again.
        raise ConfigError([*dict.fromkeys([*faults, *error.faults, *reference_faults(config)])]) from error
    shape = initial_shape(config, initial) if initial else gpt_config(config.model, *_sizes(config, data))
    shape = collect(lambda: with_documents(shape, config, data)) or shape
    plan = plan_run(config, topology, data, weights, shape)
    controller = make_controller(plan)
    repeated = None if WEIGHTS in to_come else collect(lambda: check_repetition(plan, controller))
    reference = reference_losses = None
    if scores_online(config, controller):
        reference = collect(lambda: read_reference(config, data, to_come))
    if reads_reference_losses(config, controller) and LOSSES not in to_come:
        reference_losses = collect(lambda: open_reference_losses(config, data))
    if config.run.dry_run and reference_losses is not None:
        # A run checks this after its ranks have joined.
        faults += missing_losses(reference_losses, plan)
    resumes: list[str] | None = None
    if config.run.load_step is not None and not config.run.dry_run:
        # A step that does not exist is a fault before anything is written; the run searches again under its lock.
        collect(lambda: checkpoint_to_resume(config.run, lambda skipped: None))
    if config.run.dry_run:
        # The reference's weights are not read.
        unknown = ["reference", "init_from", *(["sampling_weights"] if WEIGHTS in to_come else [])]
        resumes = collect(lambda: planned_resume(plan, run_identity(plan, data, controller), controller, unknown))
    faults += mixture_faults(plan, controller, data.held_out_counts(config.data.seq_length))
    raise_if_any(faults)
    warnings = [
        *shape_warnings(config.model, plan.gpt),
        *mixture_warnings(plan, controller),
        *loaded_warnings(config, plan.gpt, reference),
        *(recorded_warnings(plan.gpt, reference_losses) if reference_losses is not None else []),
        *(document_warnings(plan.gpt, data) if DATA not in to_come else []),
    ]
    data = _with_warnings(data, warnings)
    return Inputs(
        data, plan, controller, repeated or "", reference, initial, reference_losses, to_come, tuple(resumes or ())
    )


def _with_warnings(data: RunData, warnings: Sequence[str]) -> RunData:
    return replace(data, manifest=replace(data.manifest, warnings=(*data.manifest.warnings, *warnings)))


def _sizes(config: Config, data: RunData) -> tuple[int, int]:
    """(window length, token ids), which the data give a model."""
    return config.data.seq_length, data.vocab_size


def plan_run(
    config: Config, topology: Topology, data: RunData, weights: NDArray[np.float64], loaded: Shape | None = None
) -> RunPlan:
    """Resolves the run.

    Args:
        weights: [k] sampling weights, sum 1.
        loaded: shape of a loaded model; None: the shape of the model flags.
    """
    shape = loaded or gpt_config(config.model, *_sizes(config, data))
    counts = data.window_counts(config.data.seq_length)
    return make_plan(config, topology, shape, data.names, counts, weights)


def plan_text(inputs: Inputs) -> str:
    """What --dry-run prints."""
    if inputs.plan.config.run.suggest_layout:
        return suggestion(inputs)
    data, plan, to_come = inputs.data, inputs.plan, inputs.to_come
    setting = sampling_setting(plan.config, data.manifest)
    # --eval-iters counts batches of the evaluated run: this one, or the one that an evaluation loads.
    evaluated = inputs.loaded if plan.config.data.phase == EVALUATE else None
    limit = plan.config.data.eval_iters * (evaluated or plan).global_batch_size
    counts = data.held_out_counts(plan.config.data.seq_length)
    held_out = [min(count, limit) if limit else count for count in counts]
    lines = [*_origin(inputs), *inputs.fitting, *to_come.values(), *inputs.resumes]
    return describe_plan(plan, inputs.controller, setting, held_out, held_reference(inputs), lines)


def planned_faults(inputs: Inputs) -> list[Fault]:
    """What a dry run finds once it has printed the plan: a rank that does not fit the stated device."""
    if inputs.plan.config.run.suggest_layout:
        return []
    return memory_faults(inputs.plan, inputs.controller.before_backward, held_reference(inputs))


def start_text(inputs: Inputs, device: str, kernels: str = "") -> str:
    """What a run prints at its start.

    Args:
        device: what a rank computes on.
        kernels: a line on the kernels of its models; "" if there is none.
    """
    setting = sampling_setting(inputs.plan.config, inputs.data.manifest)
    plan, reference = inputs.plan, held_reference(inputs)
    lines = start_lines(plan, inputs.controller, setting, reference, device, inputs.repeated)
    others = [*_origin(inputs), *inputs.fitting, *_line(kernels)]
    return "\n".join([*lines, *(f"  {line}" for line in others)])


def _origin(inputs: Inputs) -> list[str]:
    """Where the weights of a run come from that did not start from random ones."""
    return [] if inputs.initial is None else [f"weights at step 0: those of {inputs.initial.path}"]


def _line(text: str) -> list[str]:
    return [text] if text else []


def device_memory(config: Config) -> float | None:
    """Bytes of the device of a rank: as stated; of a run what its GPU has free; of a dry run all that the GPU here has.
    None on a CPU, and of a plan for another GPU."""
    if config.run.device_memory_gib:
        return config.run.device_memory_gib * 2**30
    if not torch.cuda.is_available():
        return None
    if not config.run.dry_run:
        free, _ = torch.cuda.mem_get_info()
        return float(free + torch.cuda.memory_reserved())
    if "dry_run_device" in config.given:
        planned, here = config.planning.dry_run_device, torch.cuda.get_device_name(0)
        if not re.search(rf"\b{planned}\b", here):
            return None
    return float(torch.cuda.get_device_properties(0).total_memory)


def least_device_memory(config: Config) -> float | None:
    """The least `device_memory` of all ranks; a collective call."""
    return min((each for each in gather_json(device_memory(config)) if each is not None), default=None)


def fitted(inputs: Inputs, device_bytes: float | None) -> Inputs:
    """The inputs with a plan that recomputes what a device cannot hold, and holds what it can; see
    planning/recomputation.py."""
    if device_bytes is None or inputs.plan.config.run.suggest_layout:
        return inputs
    alternating, reference = inputs.controller.before_backward, held_reference(inputs)
    plan, blocks = with_recomputation(inputs.plan, alternating, reference, device_bytes)
    plan, logits = with_held_logits(plan, alternating, reference, device_bytes)
    return replace(inputs, plan=plan, fitting=(*_line(blocks), *_line(logits)))


def held_reference(inputs: Inputs) -> Shape | None:
    """The model that a proxy holds beside its own. Scoring and an evaluation hold one model, the plan's."""
    return inputs.loaded.shape if inputs.loaded and inputs.plan.config.data.phase in TRAINING else None


def suggestion(inputs: Inputs) -> str:
    """What --suggest-layout prints.

    Raises:
        ConfigError: nothing fits, or the memory of a device is unknown.
    """
    device_bytes = device_memory(inputs.plan.config)
    if device_bytes is None:
        rule = "the memory of the device that a rank will have; this machine has no such GPU that could tell"
        raise ConfigError(Fault("--device-memory-gib", "not given", rule, "give it, such as --device-memory-gib 80"))
    before_backward = inputs.controller.before_backward
    ranked = suggest_layouts(inputs.plan, before_backward, held_reference(inputs), device_bytes)
    return suggestion_text(ranked, device_bytes)


def what_is_read(inputs: Inputs) -> dict[str, Any]:
    """Hashes of the files that decide a run, as this rank sees them: a node may hold a stale copy."""
    data, loaded, reference_losses = inputs.data, inputs.loaded, inputs.reference_losses
    entry: dict[str, Any] = {
        "domains": list(data.names),
        "tokenizer_sha256": data.tokenizer_sha256,
        "data_fingerprint": data.manifest.fingerprint(),
        "data_content": data.content,
        "held_out_content": data.held_out_content,
        "sampling weights": inputs.plan.sampling_weights.tolist(),
    }
    if loaded is not None:
        # Not the weights, which may be gigabytes, but the state.json that holds their checksums.
        entry["checkpoint of the loaded run"] = sha256_of(loaded.stamp)
    if inputs.initial is not None:
        entry["model of --init-from"] = sha256_of(inputs.initial.stamp)
    if reference_losses is not None:
        entry["scores.json of the reference losses"] = sha256_of(reference_losses.folder / "scores.json")
    return entry
