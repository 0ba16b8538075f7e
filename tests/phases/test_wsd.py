"""WSD (warmup, stable, decay): a branch from the stable phase that decays is the run that decayed from its start.

Run alone: python -m pytest tests/phases/test_wsd.py
"""

from __future__ import annotations

import json

import pytest
import torch
from phases.small import MODEL, full_weights, metrics, train, training_lines

from megatron_doremi.arguments import parse_config
from megatron_doremi.errors import ConfigError
from megatron_doremi.parallel.topology import Topology
from megatron_doremi.phases.inputs import open_inputs, plan_text

pytestmark = pytest.mark.slow
WSD = ["--lr-decay-style", "WSD", "--lr-warmup-iters", "2", "--log-interval", "1"]
PEAK, LOWEST = 5e-3, 1e-3


def by_hand(step, decay, total):
    """The rate of a step: 2 steps up to the peak, the peak, and in the last `decay` steps down in a line."""
    if step <= 2:
        return PEAK * step / 2
    return PEAK - (PEAK - LOWEST) * max(0, step - (total - decay)) / decay


@pytest.fixture(scope="module")
def stable(data, tmp_path_factory):
    """A run of 12 steps that never decays, with checkpoints of steps 3, 6, 9 and 12."""
    folder = tmp_path_factory.mktemp("stable") / "run"
    lines = train(1, "main", data, folder, 12, *WSD, "--lr-wsd-decay-fraction", "0", "--save-interval", "3")
    assert [line["lr"] for line in training_lines(lines)] == [PEAK / 2] + [PEAK] * 11
    return folder


@pytest.mark.parametrize(("start", "total", "decay"), [(6, 9, 3), (3, 10, 4), (9, 14, 5)])
def test_a_branch_that_decays_is_the_run_that_decayed(start, total, decay, stable, data, tmp_path):
    """With the flags of its decay, which the stable run has not used; longer and shorter than that run."""
    flags = [*WSD, "--lr-wsd-decay-iters", str(decay)]
    whole = training_lines(train(1, "main", data, tmp_path / "whole", total, *flags))
    assert [line["lr"] for line in whole] == pytest.approx([by_hand(s, decay, total) for s in range(1, total + 1)])
    branch = tmp_path / "branch"
    said = planned(data, *flags, "--train-iters", str(total), "--load", f"{stable}@{start}")
    assert f"decays after {total - decay}, and all steps taken had the rate that this schedule gives them" in said
    load = ["--load", f"{stable}@{start}"]
    train(1, "main", data, branch, total, *flags, *load, "--exit-interval", str(start + 1))
    lines = training_lines(train(1, "main", data, branch, total, *flags, *load))
    assert lines == whole[start:]
    last = f"iter_{total:07d}"
    weights = [full_weights(tmp_path / run / "checkpoints" / last) for run in ("whole", "branch")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    state = json.loads((branch / "checkpoints" / last / "state.json").read_text())
    changed = {entry["name"]: (entry["before"], entry["now"]) for entry in state["overrides"]}
    assert changed.keys() == {"branch", "train_iters", "lr_wsd_decay_iters", "lr_wsd_decay_fraction"}
    assert changed["lr_wsd_decay_iters"] == (0, decay)
    # The run that it branched from is as it was.
    assert len(training_lines(metrics(stable))) == 12


def planned(data, *flags):
    """What a dry run says of the branch."""
    argv = ["--phase", "main", "--domains", str(data), "--save", "none", *MODEL, *WSD, "--dry-run", *flags]
    return " ".join(plan_text(open_inputs(parse_config(argv, 1), Topology())).split())


def test_what_the_steps_taken_contradict_is_said_or_refused(stable, data, tmp_path):
    late = ["--train-iters", "10", "--lr-wsd-decay-iters", "4", "--load", f"{stable}@9"]
    with pytest.raises(ConfigError, match="lr_wsd_decay_iters was 0, and is 4"):
        planned(data, *late)
    text = planned(data, *late, "--override-resume", "lr_wsd_decay_iters,lr_wsd_decay_fraction")
    assert "its decay would have begun at step 6 (give more --train-iters)" in text
    flags = ["--lr-warmup-iters", "4", "--override-resume", "lr_warmup_iters,lr_wsd_decay_fraction"]
    text = planned(data, "--train-iters", "9", "--load", f"{stable}@6", *flags)
    assert "its warmup took 2 steps (give --lr-warmup-iters 2)" in text
    decayed = tmp_path / "decayed"
    train(1, "main", data, decayed, 6, *WSD, "--lr-wsd-decay-iters", "3", "--save-interval", "5")
    text = planned(data, "--lr-wsd-decay-iters", "3", "--train-iters", "20", "--load", f"{decayed}@5")
    assert "it has decayed since step 3 (branch from that step, or before)" in text
