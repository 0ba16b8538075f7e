"""Mixtures that cannot be learned are refused, those that learn slowly are warned of, before the first step.

Run alone: python -m pytest tests/planning/test_mixture_checks.py
"""

from __future__ import annotations

import numpy as np
import pytest

from megatron_doremi.arguments import parse_config
from megatron_doremi.config import gpt_config
from megatron_doremi.mixture.controller import MixtureController
from megatron_doremi.mixture.controllers import make_controller
from megatron_doremi.parallel.topology import Topology
from megatron_doremi.plan import make_plan
from megatron_doremi.planning.mixture_checks import mixture_faults, mixture_warnings


def plan_of(weights, phase="proxy", replicas=1, micro=1, batch=8):
    sizes = f"--micro-batch-size {micro} --global-batch-size {batch} --num-layers 1 --hidden-size 8"
    flags = f"--phase {phase} --domains d --save s --train-iters 9 --num-attention-heads 1 {sizes}"
    flags += " --reference-load r" if phase == "proxy" else ""
    config = parse_config(flags.split(), replicas)
    gpt = gpt_config(config.model, seq_length=8, vocab_size=10)
    names = tuple(f"d{i}" for i in range(len(weights)))
    topology = Topology(data_size=replicas)
    return make_plan(config, topology, gpt, names, (10,) * len(names), np.array(weights) / np.sum(weights))


def checked(plan):
    controller = make_controller(plan)
    return mixture_faults(plan, controller, [0] * len(plan.names)), mixture_warnings(plan, controller)


def test_one_domain_is_a_fault_for_a_proxy_and_a_line_for_a_main_run():
    faults, _ = checked(plan_of([1.0]))
    assert [fault.value for fault in faults] == ["one domain, 'd0'"]
    assert "--phase main" in faults[0].remedy
    assert checked(plan_of([1.0], "main")) == ([], ["one domain, 'd0': every mixture is the same"])


def test_more_domains_than_windows_in_a_step():
    assert checked(plan_of([1.0] * 8)) == checked(plan_of([1.0] * 8, "main")) == ([], [])
    _, lines = checked(plan_of([1.0] * 9, "main"))
    assert [line.split(":")[0] for line in lines] == ["9 domains, but 8 windows in a step"]
    _, lines = checked(plan_of([1.0] * 9))
    assert len(lines) == 2
    assert "9 of 9 domains are missing from some batches ('d0' every 1.1 steps" in lines[1]
    assert "give --global-batch-size 9 or more" in lines[1]


@pytest.mark.parametrize(("replicas", "micro", "size"), [(1, 1, 10), (2, 1, 10), (2, 2, 12), (1, 4, 12)])
def test_a_rare_domain_of_a_proxy(replicas, micro, size):
    """A domain of a tenth has 0.8 windows in a batch of 8; a batch is a multiple of micro-batches x replicas."""
    assert checked(plan_of([0.1, 0.9], "main"))[1] == []
    _, (line,) = checked(plan_of([0.1, 0.9], replicas=replicas, micro=micro))
    assert "1 of 2 domains are missing from some batches ('d0' every 1.2 steps)" in line
    assert f"give --global-batch-size {size} or more" in line
    assert checked(plan_of([0.1, 0.9], replicas=replicas, micro=micro, batch=size))[1] == []


def test_a_method_of_held_out_losses_needs_them_in_every_domain():
    class Follows(MixtureController):
        method, needs_held_out = "follows", True

    plan = plan_of([1.0] * 5)
    assert mixture_faults(plan, Follows(), [1] * 5) == []
    (fault,) = mixture_faults(plan, Follows(), [0, 3, 0, 0, 0])
    assert fault.value == "none for 'd0', 'd2', 'd3' and 1 more"
    assert "follows" in fault.rule
