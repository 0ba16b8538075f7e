"""Everything that a run reads, opened with every fault of every file collected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from megatron_doremi.config import Config
from megatron_doremi.data.reference_losses import ReferenceLosses
from megatron_doremi.errors import ConfigError, Fault, raise_if_any
from megatron_doremi.mixture.controller import MixtureController
from megatron_doremi.mixture.controllers import make_controller
from megatron_doremi.mixture.reference import ReferenceRun
from megatron_doremi.phases import setup
from megatron_doremi.phases.early_checks import reference_faults
from megatron_doremi.phases.score import open_reference_losses
from megatron_doremi.planning.epochs import check_repetition
from megatron_doremi.settings import EVALUATE

T = TypeVar("T")


@dataclass(frozen=True)
class Inputs:
    """What a run reads.

    Attributes:
        controller: what decides the mixture.
        repeated: what its mixture repeats, in words; "" where nothing is.
        reference: the model that scoring, an evaluation, or a proxy that scores its batches with it loads.
        reference_losses: of a proxy that reads them from disk; else None.
    """

    data: setup.RunData
    controller: MixtureController
    repeated: str
    reference: ReferenceRun | None
    reference_losses: ReferenceLosses | None


def open_inputs(config: Config, world_size: int) -> Inputs:
    """Opens what the run reads. Raises ConfigError with every fault of every file."""
    phase, faults = config.data.phase, list[Fault]()

    def collect(work: Callable[[], T]) -> T | None:
        try:
            return work()
        except ConfigError as error:
            faults.extend(error.faults)
            return None

    data = collect(lambda: setup.open_data(config, phase != EVALUATE, world_size))
    if data is None:
        # What the reference says of itself can be known without the data.
        raise ConfigError([*faults, *reference_faults(config)])
    opened = data
    controller = make_controller(config, data.weights)
    repeated = collect(lambda: check_repetition(config, opened, controller, world_size))
    reference = reference_losses = None
    if setup.needs_reference(config, controller):
        reference = collect(lambda: setup.read_reference(config, opened))
    if phase == EVALUATE:
        reference = collect(lambda: setup.read_trained(Path(config.run.load), "--load", opened, config))
    if setup.reads_reference_losses(config, controller):
        reference_losses = collect(lambda: open_reference_losses(config, opened))
    raise_if_any(faults)
    return Inputs(data, controller, repeated or "", reference, reference_losses)
