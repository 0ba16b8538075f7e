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
from megatron_doremi.settings import PROXY

# Each makes a controller from the settings and the [k] weights of --domain-weights.
METHODS: dict[str, Callable[[Config, NDArray[np.float64]], MixtureController]] = {
    "static": lambda config, weights: StaticMixture(weights),
    "doremi": lambda config, weights: GroupDRO(config.doremi, weights),
}


def make_controller(config: Config, weights: NDArray[np.float64]) -> MixtureController:
    """What decides a run's mixture: Group DRO for a proxy, the given weights for every other phase.

    Args:
        weights: [k] sampling weights, sum 1.
    """
    return METHODS["doremi" if config.data.phase == PROXY else "static"](config, weights)


def make_objective(
    config: Config, controller: MixtureController, weights: NDArray[np.float64], context: ParallelContext
) -> Objective:
    """What a run descends under a controller.

    Args:
        weights: [k] sampling weights, sum 1.
    """
    if not controller.learns:
        return MeanObjective(len(weights), context)
    return WeightedObjective(controller, torch.from_numpy(weights), context, config.doremi.doremi_normalization)
