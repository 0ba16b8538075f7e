"""The trace of one step.

Run alone: python -m pytest tests/phases/test_step_profile.py
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
from collections import Counter

import pytest
from phases.small import MODEL, train, training_lines
from ranks import on_ranks, program

from megatron_doremi.arguments import read_command_line

STEPS = 4


def printing(launch, argv):
    """Runs the program; gives the words that this rank has printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(printed):
        program(launch, argv)
    return " ".join(printed.getvalue().split())


@pytest.fixture(scope="module")
def plain(data, reference, tmp_path_factory):
    """The training lines of a run that records nothing."""
    return training_lines(train(2, "proxy", data, tmp_path_factory.mktemp("plain"), STEPS, *reference))


def test_one_step_of_one_rank_is_recorded(plain, data, reference, tmp_path):
    """Step 3 of rank 1: it updates the parameters once. The run is the same, and says where the trace is."""
    save = tmp_path / "run"
    argv = ["--phase", "proxy", "--domains", str(data), "--save", str(save), "--train-iters", str(STEPS)]
    printed = on_ranks(2, printing, [*argv, *MODEL, *reference, "--profile", "3", "--profile-rank", "1"])
    path = save / "profile" / "step-3-rank-1.json.gz"
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = Counter(event.get("name") for event in events)
    # A step of two micro-batches, on this rank, and the reference's forward passes.
    assert names["aten::_fused_adamw_"] == 2  # matrices and vectors
    assert names["aten::embedding"] == 4
    assert any("backward" in name.lower() for name in names if name)
    assert f"a trace of step 3 is in {path}" in printed[1]
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    assert training_lines(lines) == plain


def test_a_trace_that_cannot_be_written_ends_no_run(plain, data, reference, tmp_path):
    save = tmp_path / "run"
    save.mkdir()
    (save / "profile").write_text("in the way")
    argv = ["--phase", "proxy", "--domains", str(data), "--save", str(save), "--train-iters", str(STEPS)]
    printed = on_ranks(2, printing, [*argv, *MODEL, *reference, "--profile", "3"])
    assert "step-3-rank-0.json.gz cannot be written" in printed[0]
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    assert training_lines(lines) == plain


def test_a_resumed_run_does_not_record_a_step_of_the_past(data, tmp_path):
    """It says so, but of a step that was recorded."""
    save = tmp_path / "run"
    train(1, "main", data, save, STEPS, "--exit-interval", "2", "--profile", "1")
    argv = ["--phase", "main", "--domains", str(data), "--save", str(save), "--train-iters", str(STEPS), *MODEL]
    argv += ["--load", str(save), "--exit-interval", "3"]
    assert "--profile" not in on_ranks(1, printing, [*argv, "--profile", "1"])[0]
    (printed,) = on_ranks(1, printing, [*argv, "--profile", "2"])
    assert "warning: --profile 2: an earlier start took that step, and this one starts after 3" in printed
    assert [each.name for each in (save / "profile").iterdir()] == ["step-1-rank-0.json.gz"]


def test_the_parts_of_a_step_do_not_have_the_start_of_the_profiler(tmp_path):
    """By a clock that only the profiler moves, and one that leaves its start and end out of the step."""
    import torch

    from megatron_doremi.engine.step_clock import DATA, FORWARD, StepClock
    from megatron_doremi.phases.metrics import StepTimer
    from megatron_doremi.phases.step_profile import StepProfile
    from megatron_doremi.run_settings import RunConfig

    class Watched:
        def mark(self, doing):
            pass

    clock, timer = StepClock(), StepTimer(0)
    profile = StepProfile(RunConfig(save=str(tmp_path), profile=1), 0, torch.device("cpu"))
    clock.enter(DATA)
    with profile.of_step(1, timer, clock, Watched()):
        clock.enter(FORWARD)
        clock.stop()
    assert sum(clock.lap().values()) <= timer.lap(1)[1]


@pytest.mark.parametrize(
    ("flags", "rules"),
    [
        ("--profile 5", ["--profile: 5\n      rule:   a step of the run: at most --train-iters 4"]),
        ("--profile 2 --profile-rank 2", ["--profile-rank: 2\n      rule:   a rank of the run: below 2"]),
        ("--profile-rank 1", ["--profile-rank: has no effect"]),
        ("--profile 4 --profile-rank 1", []),
    ],
)
def test_faults(flags, rules):
    argv = ["--phase", "main", "--domains", "domains.json", "--save", "run", "--train-iters", str(STEPS), *MODEL]
    _, faults = read_command_line([*argv, *flags.split()], 2)
    assert len(faults) == len(rules)
    for fault, rule in zip(faults, rules, strict=True):
        assert rule in str(fault)
