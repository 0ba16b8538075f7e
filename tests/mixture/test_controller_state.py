"""A controller's state in a checkpoint is checked before anything is built; a damaged state is reported as a fault.

Run alone: python -m pytest tests/mixture/test_controller_state.py
"""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest

from megatron_doremi.checkpoint.folder import CheckpointState
from megatron_doremi.config import DoReMiConfig
from megatron_doremi.errors import ConfigError, raise_if_any
from megatron_doremi.mixture.group_dro import GroupDRO
from megatron_doremi.mixture.static import StaticMixture
from megatron_doremi.phases.resume import _controller_state, _domain_faults

NAMES, STEPS = ("a", "b"), 4
STATE = {
    "format": "megatron-doremi-checkpoint/2",
    "iteration": STEPS,
    "files": {},
    "blend": {"step": STEPS, "credits": dict.fromkeys(NAMES, 0.0), "cursors": dict.fromkeys(NAMES, 8)},
    "doremi": {
        "steps": STEPS,
        "weights": {"a": 0.25, "b": 0.75},
        "excess": {"a": 0.5, "b": 0.0},
        "weight_sum": {"a": 1.5, "b": 2.5},
    },
}


def resume(entry):
    """A proxy's controller that has loaded the state in `entry`, checked as at the start of a run."""
    state, proxy = CheckpointState.model_validate(entry), GroupDRO(DoReMiConfig(), np.full(2, 0.5))
    learned = _controller_state(Path("iter_0000004"), state, proxy)
    raise_if_any(_domain_faults(state, learned, proxy.state_name, NAMES, "--load"))
    assert learned is not None
    proxy.load_state_dict(learned.model_dump(), NAMES)
    return proxy


def test_a_state_is_taken_up_and_written_again():
    proxy = resume(STATE)
    assert proxy.state_dict(NAMES) == STATE["doremi"]
    assert proxy.result().tolist() == [1.5 / STEPS, 2.5 / STEPS]
    assert _controller_state(Path("c"), CheckpointState.model_validate(STATE), StaticMixture(np.ones(1))) is None


DAMAGE = {
    "missing": (lambda e: e.pop("doremi"), "doremi is missing"),
    "no object": (lambda e: e.update(doremi=[1]), "doremi: [1]"),
    "of another step": (
        lambda e: e["doremi"].update(steps=3, weight_sum={"a": 1.0, "b": 2.0}),
        "doremi.steps 3 must equal iteration 4",
    ),
    "weights that do not sum to 1": (lambda e: e["doremi"]["weights"].update(a=0.5), "weights must sum to 1"),
    "a sum of other steps": (lambda e: e["doremi"]["weight_sum"].update(a=3.0), "weight_sum must sum to 4"),
    "a negative weight": (lambda e: e["doremi"]["weights"].update(a=-0.25), "doremi.weights.a: -0.25"),
    "NaN": (lambda e: e["doremi"]["excess"].update(a=math.nan), "doremi.excess.a: nan"),
    "a domain less": (lambda e: e["doremi"]["excess"].pop("a"), "must name the same domains"),
    "other domains": (
        lambda e: e["doremi"].update({k: {"c": v["a"], "b": v["b"]} for k, v in e["doremi"].items() if k != "steps"}),
        "doremi.weights has no 'a', an extra 'c'",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_state_is_a_fault(name):
    entry, (change, text) = copy.deepcopy(STATE), DAMAGE[name]
    change(entry)
    with pytest.raises(ConfigError) as error:
        resume(entry)
    assert text in str(error.value)
