"""The extrapolated mean of a proxy's weights: by hand, on processes with a known mean, and through a checkpoint.

Run alone: python -m pytest tests/mixture/test_final_mean.py
"""

from __future__ import annotations

import json
import math
import shlex

import numpy as np
import pytest
import torch

from megatron_doremi.arguments import parse_config
from megatron_doremi.config import DoReMiConfig
from megatron_doremi.errors import ConfigError
from megatron_doremi.mixture.early_stop import EarlyStop, EarlyStopState, final_mean, sum_interval
from megatron_doremi.mixture.group_dro import GroupDRO, GroupDROState
from megatron_doremi.mixture.statistics import DomainStats

# Student's t with 6 degrees of freedom, 95 % (tables).
T_6 = 2.446911851144969


def running_sums(before: list[float], groups: list[list[float]], group_steps: int) -> np.ndarray:
    """[9, k] running sums: `before` at the start of the window, then the means of 8 groups."""
    return np.cumsum([before, *(group_steps * np.array(groups))], axis=0)


def test_a_line_without_noise_by_hand():
    """16 of 24 steps, 8 groups of a step: the first weight falls by .02 a step from .5 to .36, the second rises.

    The window's mean is .43, its middle 4 steps before its end; the middle of the 8 steps to come is 4 after it. So the
    line has fallen by another 8 * .02 = .16: between .43 and .27, which is .35 +- .08. The first 8 steps sum to 6.
    (6 + 8 * .43 + 8 * .35) / 24 = .51; 8 of 24 steps are to come: +- .08 / 3.
    """
    groups = [[0.5 - 0.02 * i, 0.5 + 0.02 * i] for i in range(8)]
    answer = final_mean(running_sums([6.0, 2.0], groups, 1), 16, 1, 24)
    assert answer.mean.tolist() == pytest.approx([0.51, 0.49], abs=1e-12)
    assert answer.half_width == pytest.approx(0.08 / 3, abs=1e-12)
    assert answer.so_far.tolist() == pytest.approx([9.44 / 16, 6.56 / 16], abs=1e-12)
    assert answer.low[0] == pytest.approx(0.51 - 0.08 / 3)


def test_noise_without_a_line_by_hand():
    """Groups of 10 steps, means .5 +- .1 in the order + - - + - + + -, which no line fits: the slope is 0.

    Residuals: 8 * .01 / 6 for the first two domains, none for the third, to which their interval applies as well. 160
    of 200 steps, so the steps to come are 4 groups, their middle 6 groups after the window's, and the sum of the
    squared places is 42.
    """
    signs = [1, -1, -1, 1, -1, 1, 1, -1]
    groups = [[0.5 + 0.1 * s, 0.3 - 0.1 * s, 0.2] for s in signs]
    answer = final_mean(running_sums([40.0, 24.0, 16.0], groups, 10), 160, 10, 200)
    assert answer.mean.tolist() == pytest.approx([0.5, 0.3, 0.2], abs=1e-12)
    expected = 40 / 200 * T_6 * math.sqrt(0.08 / 6 * (1 / 8 + 1 / 4 + 6**2 / 4 / 42))
    assert answer.half_width == pytest.approx(expected, rel=1e-9)
    # What the steps so far have given the third weight, 32 of 200, no step to come takes away.
    assert answer.low.tolist() == pytest.approx([0.5 - expected, 0.3 - expected, max(0.16, 0.2 - expected)])


def test_a_mean_stays_a_mixture():
    """A steep line would make the weight to come negative: it is taken as 0, and the others are scaled to sum 1."""
    groups = [[max(0.0, 0.7 - 0.1 * i), 1.0 - max(0.0, 0.7 - 0.1 * i)] for i in range(8)]
    answer = final_mean(running_sums([8.0, 0.0], groups, 1), 16, 1, 64)
    assert answer.mean.sum() == pytest.approx(1.0, abs=1e-15)
    assert answer.mean[0] == pytest.approx((8.0 + 2.8) / 64)
    assert answer.low[0] == answer.mean[0]
    assert answer.high[1] <= 1.0


def test_what_is_kept_and_when_it_is_checked():
    assert [sum_interval(steps) for steps in (1, 64, 65, 128, 129, 4096, 4097)] == [1, 1, 2, 2, 4, 64, 128]
    early_stop, checked = EarlyStop(1e-12, 1000, 200), []
    for step in range(1, 1000):
        early_stop.observe(step, torch.tensor([0.25 * step, 0.75 * step], dtype=torch.float64))
        history = early_stop.to_dict("ab")
        assert len(history["steps"]) <= 64
        if early_stop.estimate is not None:
            checked.append(step)
            assert early_stop.estimate.mean.tolist() == pytest.approx([0.25, 0.75], abs=1e-14)
    # A quarter of the steps would be 252; the window, of at most half of the steps, starts after the warmup.
    assert checked[0] == early_stop.first_check()
    window = 8 * early_stop.group_steps(checked[0])
    assert checked[0] - window >= 200
    assert window <= checked[0] / 2
    assert all(step % sum_interval(step) == 0 for step in checked)
    assert EarlyStop(0.1, 1000, 0).first_check() == 252
    # Groups of at least 8 steps.
    assert EarlyStop(0.1, 300, 0).first_check() == 128
    assert EarlyStop(0.1, 1000, 900).first_check() is None
    assert "too few" in EarlyStop(0.1, 128, 0).rule
    assert EarlyStop(0.1, 10**9, 0).first_check() >= 250_000_000


@pytest.mark.parametrize("drift", [0.0, 0.3])
def test_the_interval_covers_the_mean_of_processes_of_which_it_is_known(drift):
    """Autocorrelated noise (e-folding time 20 steps) around weights that stay, or decay to their last ones: the share
    of estimates of which all intervals hold, over 100 runs of 4 domains checked at 40, 60 and 80 % of 1,000 steps."""
    generator, runs, total = np.random.default_rng(5), 100, 1000
    persistence = math.exp(-1 / 20)
    noise = np.zeros((runs, 4))
    weights = np.empty((total, runs, 4))
    base, change = np.array([0.4, 0.3, 0.2, 0.1]), drift * np.array([1.0, -0.5, -0.3, -0.2])
    for step in range(total):
        noise = persistence * noise + math.sqrt(1 - persistence**2) * generator.normal(0, 0.03, (runs, 4))
        weights[step] = base + change * math.exp(-step / 200) + noise - noise.mean(axis=1, keepdims=True)
    sums, held = np.cumsum(weights, axis=0), []
    for steps in (400, 608, 800):
        group = EarlyStop(0.1, total, 0).group_steps(steps)
        assert group is not None
        for run in range(runs):
            answer = final_mean(sums[[steps - 1 - group * i for i in range(8, -1, -1)], run], steps, group, total)
            held.append((np.abs(answer.mean - sums[-1, run] / total) <= answer.half_width).all())
    assert np.mean(held) >= 0.95


NAMES = ["a", "b", "c"]


def controller(drift: float, total: int = 400) -> GroupDRO:
    return GroupDRO(DoReMiConfig(), np.full(3, 1 / 3), EarlyStop(drift, total, 0) if drift else None)


def observe(proxy: GroupDRO, steps: range) -> None:
    for step in steps:
        scores = np.random.default_rng(step).random(3) * 0.1
        ones = torch.ones(3, dtype=torch.float64)
        proxy.observe(DomainStats(torch.from_numpy(scores), ones, ones))


def test_the_history_survives_a_checkpoint_to_the_bit():
    through, first = controller(1e-9), controller(1e-9)
    observe(through, range(350))
    observe(first, range(171))
    entry = GroupDROState.model_validate(json.loads(json.dumps(first.state_dict(NAMES)))).model_dump()
    resumed = controller(1e-9)
    resumed.load_state_dict(entry, NAMES)
    observe(resumed, range(171, 350))
    assert resumed.state_dict(NAMES) == through.state_dict(NAMES)
    # By name: another order of the domains gives each its own history.
    turned = controller(1e-9)
    turned.load_state_dict(entry, ["c", "a", "b"])
    assert turned.state_dict(["c", "a", "b"])["early_stop"] == entry["early_stop"]


def test_a_run_is_settled_by_its_setting_and_says_what_changed():
    ends = {}
    for drift in (0.5, 0.02, 0.0):
        proxy = controller(drift)
        ends[drift] = 400
        for step in range(1, 400):
            observe(proxy, range(step - 1, step))
            answer = proxy.settled()
            if answer is not None:
                ends[drift] = step
                assert answer.half_width <= drift
                assert proxy.result().tolist() == answer.mean.tolist()
                break
    assert ends[0.5] == 128
    assert 128 < ends[0.02] < 400
    assert ends[0.0] == 400
    assert proxy.result().tolist() == (proxy.state.weight_sum / 399).tolist()
    # Without the flag nothing is stored; with it at a resume the history begins there, and is too short at first.
    state = proxy.state_dict(NAMES)
    assert "early_stop" not in state
    late = controller(0.5, total=2000)
    assert late.resume_notes(state) == [
        "--doremi-stop-drift is new: the checkpoint holds no history of the weights, which begins now"
    ]
    late.load_state_dict(state, NAMES)
    observe(late, range(399, 512))
    assert late.settled() is None
    observe(late, range(512, 1024))
    assert late.settled() is not None
    state = late.state_dict(NAMES)
    assert controller(0.25).resume_notes(state) == ["--doremi-stop-drift changed from 0.5 to 0.25"]
    assert controller(0.0).resume_notes(state) == ["without --doremi-stop-drift the run takes all of its steps"]
    assert controller(0.5).resume_notes(state) == []


DAMAGE = {
    "an order": ({"steps": [2, 1]}, "must ascend"),
    "a number less": ({"sums": {"a": [0.5], "b": [0.5, 1.0]}}, "must have 2 numbers"),
    "a wrong sum": ({"sums": {"a": [0.5, 2.0], "b": [0.5, 1.0]}}, "must sum to 2"),
    "a drift": ({"drift": 0.0}, "greater than 0"),
    "a step of text": ({"steps": ["1", 2]}, "valid integer"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_history_is_refused(name):
    entry = {"drift": 0.1, "steps": [1, 2], "sums": {"a": [0.5, 1.0], "b": [0.5, 1.0]}}
    EarlyStopState.model_validate(entry)
    change, text = DAMAGE[name]
    with pytest.raises(ValueError, match=text):
        EarlyStopState.model_validate(entry | change)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"sums": {"c": [0.5], "b": [0.5]}}, "name the domains"),
        ({"steps": [5], "sums": {"a": [2], "b": [3]}}, "end at 4"),
    ],
)
def test_a_history_of_another_run_is_refused(change, text):
    half = {"a": 0.5, "b": 0.5}
    history = {"drift": 0.1, "steps": [1], "sums": {"a": [0.5], "b": [0.5]}}
    state = {"steps": 4, "weights": half, "excess": half, "weight_sum": {"a": 2.0, "b": 2.0}}
    GroupDROState.model_validate(state | {"early_stop": history})
    with pytest.raises(ValueError, match=text):
        GroupDROState.model_validate(state | {"early_stop": history | change})


@pytest.mark.parametrize("value", ["-0.1", "1", "nan", "small"])
def test_wrong_values_are_refused(value):
    argv = shlex.split("--phase proxy --domains d --save s --train-iters 9 --reference-load r --model-size 70m")
    with pytest.raises(ConfigError, match="--doremi-stop-drift"):
        parse_config([*argv, f"--doremi-stop-drift={value}"], 1)
