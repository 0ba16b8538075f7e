"""Which domains a mixture repeats is said at the start, and a cap on it holds.

Run alone: python -m pytest tests/planning/test_epochs.py
"""

from __future__ import annotations

import numpy as np
import pytest
from phases.small import MODEL, write_data

from megatron_doremi.arguments import parse_config
from megatron_doremi.data.blend import Blend, BlendState
from megatron_doremi.errors import ConfigError
from megatron_doremi.mixture.controllers import make_controller
from megatron_doremi.parallel.topology import Topology
from megatron_doremi.phases.inputs import plan_run
from megatron_doremi.phases.run_data import open_data
from megatron_doremi.plan import RunPlan
from megatron_doremi.planning.epochs import check_repetition, repetition_notice


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Domains of 1,000, 2,000 and 3,000 tokens: 62, 124 and 187 windows of 16."""
    return write_data(tmp_path_factory.mktemp("data"), tokens=1000)


def opened(data, *flags, phase="main", world_size=1):
    base = ["--phase", phase, "--domains", str(data), "--save", "unused", "--train-iters", "31", *MODEL]
    config = parse_config([*base, *flags], world_size)
    topology = Topology(data_size=world_size)
    return plan_run(config, topology, *open_data(config, True, world_size))


def check(data, *flags, phase="main", world_size=1):
    plan = opened(data, *flags, phase=phase, world_size=world_size)
    return check_repetition(plan, make_controller(plan))


def test_said_at_the_start(data):
    # 31 steps of 8 windows: 248 in all, 82.7 a domain.
    assert check(data, "--domain-weights", "uniform") == "epochs of domains that repeat: domain 0 1.3"
    assert check(data, "--domain-weights", "natural") == ""
    assert check(data, "--domain-weights", "uniform", "--train-iters", "310", "--global-batch-size", "16").endswith(
        "domain 0 26.7, domain 1 13.3, domain 2 8.8"
    )


def test_the_cap(data):
    assert check(data, "--domain-weights", "uniform", "--max-epochs-per-domain", "1.34") != ""
    with pytest.raises(ConfigError) as caught:
        check(data, "--domain-weights", "uniform", "--max-epochs-per-domain", "0.5")
    text = str(caught.value)
    assert "2 faults" in text
    assert "domain 'domain 0': 1.33 epochs: 83 of 62 windows" in text
    assert "domain 'domain 1': 0.67 epochs: 83 of 124 windows" in text
    assert "at most --max-epochs-per-domain 0.5" in text
    with pytest.raises(ConfigError, match="not negative"):
        check(data, "--max-epochs-per-domain", "-1")


def test_a_mixture_that_is_fitted_to_the_cap(data):
    """248 windows: a third of them is more than the 62 of domain 0, so that the others share the other 186."""
    unimax = ["--domain-weights", "unimax", "--max-epochs-per-domain"]
    plan = opened(data, *unimax, "1")
    assert plan.sampling_weights.tolist() == pytest.approx([62 / 248, 93 / 248, 93 / 248], abs=1e-15)
    assert check(data, *unimax, "1") == ""
    assert check(data, *unimax, "1.3", "--train-iters", "50").startswith("epochs of domains that repeat: domain 0 1.3")
    # Nothing to divide: the fault is the missing text alone.
    with pytest.raises(ConfigError, match="1 fault in"):
        opened(data, *unimax, "1", "--seq-length", "1500")
    # Caps of 93, 186 and 280.5 windows for 600: every one binds before they are read.
    with pytest.raises(ConfigError, match="raise --max-epochs-per-domain"):
        check(data, *unimax, "1.5", "--train-iters", "75")


def test_a_mixture_that_is_learned_while_it_samples(data):
    resample = ["--reference-load", "r", "--doremi-weighting", "resample"]
    assert check(data, *resample, "--train-iters", "3000", phase="proxy") == ""
    with pytest.raises(ConfigError, match="known at the start"):
        check(data, *resample, "--max-epochs-per-domain", "2", phase="proxy")


def test_the_blend_reads_as_often_as_was_said():
    weights, counts = np.array([0.5, 0.3, 0.2]), (7, 40, 300)
    blend, state = Blend(("a", "b", "c"), counts, 8, 1), BlendState.start(3)
    for _ in range(33):
        _, state = blend.next_batch(state, weights)
    settings = parse_config(["--phase", "main", "--domains", "d", "--save", "s", "--train-iters", "33", *MODEL], 1)
    plan = RunPlan(settings, Topology(), None, blend.names, counts, weights, 8, 1)
    epochs = plan.epochs
    assert np.abs(state.cursors - epochs * counts).max() < 1.0
    assert repetition_notice(blend.names, epochs) == "epochs of domains that repeat: a 18.9, b 2.0"
