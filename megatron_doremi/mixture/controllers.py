"""The choice of a method: from the flags to a controller, and from a controller to the objective that it needs.

A new method is a controller in a file of its own and a line of `METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_doremi.config import Config
from megatron_doremi.mixture.controller import MixtureController
from megatron_doremi.mixture.group_dro import GroupDRO
from megatron_doremi.mixture.objective import MeanObjective, Objective, WeightedObjective
from megatron_doremi.mixture.static import StaticMixture
from megatron_doremi.parallel.context import ParallelContext
from megatron_doremi.plan import RunPlan
from megatron_doremi.settings import PROXY

# Each makes a controller from the settings and the [k] weights of --domain-weights.
METHODS: dict[str, Callable[[Config, NDArray[np.float64]], MixtureController]] = {
    "static": lambda config, weights: StaticMixture(weights),
    "doremi": lambda config, weights: GroupDRO(config.doremi, weights),
}


def make_controller(plan: RunPlan) -> MixtureController:
    """What decides a run's mixture: Group DRO for a proxy, the given weights for every other phase."""
    method = "doremi" if plan.config.data.phase == PROXY else "static"
    return METHODS[method](plan.config, plan.sampling_weights)


def make_objective(plan: RunPlan, controller: MixtureController, context: ParallelContext) -> Objective:
    """What a run descends under a controller."""
    if not controller.learns:
        return MeanObjective(len(plan.names), context)
    sampling, normalization = torch.from_numpy(plan.sampling_weights), plan.config.doremi.doremi_normalization
    return WeightedObjective(controller, sampling, context, normalization)
