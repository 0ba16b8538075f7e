"""Makes the controller that the flags select, and the objective that the controller needs.

A new method is a controller in a file of its own and an entry of `METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_doremi.config import Config
from megatron_doremi.mixture.controller import MixtureController
from megatron_doremi.mixture.early_stop import EarlyStop
from megatron_doremi.mixture.group_dro import GroupDRO
from megatron_doremi.mixture.objective import MeanObjective, Objective, WeightedObjective
from megatron_doremi.mixture.static import StaticMixture
from megatron_doremi.parallel.context import ParallelContext
from megatron_doremi.plan import RunPlan
from megatron_doremi.settings import PROXY


def make_early_stop(config: Config) -> EarlyStop | None:
    """What ends a proxy early; None without --doremi-stop-drift."""
    drift, total = config.doremi.doremi_stop_drift, config.data.train_iters
    return EarlyStop(drift, total, config.optimizer.warmup_steps(total)) if drift else None


# Each entry makes a controller from the settings and the [k] weights of --domain-weights.
METHODS: dict[str, Callable[[Config, NDArray[np.float64]], MixtureController]] = {
    "static": lambda config, weights: StaticMixture(weights),
    "doremi": lambda config, weights: GroupDRO(config.doremi, weights, make_early_stop(config)),
}


def make_controller(plan: RunPlan) -> MixtureController:
    """The controller of a run: Group DRO for a proxy, a static mixture of the given weights for all other phases."""
    method = "doremi" if plan.config.data.phase == PROXY else "static"
    return METHODS[method](plan.config, plan.sampling_weights)


def make_objective(plan: RunPlan, controller: MixtureController, context: ParallelContext) -> Objective:
    """The objective that a run minimizes under a controller."""
    if not controller.learns:
        return MeanObjective(len(plan.names), context)
    sampling, normalization = torch.from_numpy(plan.sampling_weights), plan.config.doremi.doremi_normalization
    return WeightedObjective(controller, sampling, context, normalization)
