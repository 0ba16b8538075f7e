"""A GPU that runs out of memory, and a compiler that fails, are one message each.

Run alone: python -m pytest tests/phases/test_device_errors.py
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch._dynamo.exc
from engines import make_config, small_gpt
from phases.small import MODEL
from ranks import ROOT, on_ranks, program

from megatron_doremi.errors import RunError
from megatron_doremi.parallel.topology import Topology
from megatron_doremi.phases.device_errors import memory_remedies, readable_device_errors
from megatron_doremi.plan import make_plan
from megatron_doremi.planning.memory import rank_memory

LACK = (
    "CUDA out of memory. Tried to allocate 2.25 GiB. GPU 3 has a total capacity of 79.11 GiB of which 1.10 GiB is "
    "free. Including non-PyTorch memory, this process has 77.99 GiB memory in use."
)


def make(data_size=1, micro_batch_size=8, phase="main", optimizer="adam", **parallel):
    topology = Topology(1, data_size, 1, 0)
    data = {
        "phase": phase,
        "seq_length": 32,
        "micro_batch_size": micro_batch_size,
        "train_iters": 1,
        "global_batch_size": 8 * micro_batch_size,
    }
    config = make_config(topology, data, parallel, optimizer=optimizer)
    return make_plan(config, topology, small_gpt(), ("a",), (100,), np.ones(1))


def message(error, plan=None):
    plan = plan or make()
    with pytest.raises(RunError) as caught, readable_device_errors(plan, False, None, lambda: "in iteration 1"):
        raise error
    assert caught.value.__cause__ is error
    return str(caught.value)


def test_no_memory():
    plan = make()
    text = message(torch.OutOfMemoryError(LACK), plan)
    first, planned, remedy, last = text.splitlines()
    # The same on all GPUs: ranks that fail alike have one message.
    assert first == "out of GPU memory, in iteration 1: Tried to allocate 2.25 GiB, total capacity of 79.11 GiB"
    assert f"{rank_memory(plan, False, None).total / 2**30:.1f} GiB on the fullest rank" in planned
    assert "--micro-batch-size 4 instead of 8" in remedy
    assert "--suggest-layout" in remedy
    assert "checkpoints are as they were" in last


def test_no_memory_in_another_device_or_while_a_kernel_is_compiled():
    assert message(torch.OutOfMemoryError("no such text")).startswith("out of GPU memory, in iteration 1: no such text")
    failed = torch._dynamo.exc.BackendCompilerFailed(lambda: None, torch.OutOfMemoryError(LACK), None)
    assert message(failed).startswith("out of GPU memory, in iteration 1: Tried to allocate 2.25 GiB")


@pytest.mark.parametrize(
    ("plan", "first", "absent"),
    [
        (make(loss_chunk_tokens=0), "--loss-chunk-tokens 1024", "--zero-stage"),
        (make(loss_chunk_tokens=4096), "--loss-chunk-tokens 1024", "--zero-stage"),
        (make(data_size=2), "--zero-stage 1", "--loss-chunk-tokens"),
        (make(micro_batch_size=1), "--recompute-granularity full", "--micro-batch-size"),
        (make(data_size=2, zero_stage=2), "--micro-batch-size 4 instead of 8", "--zero-stage 1"),
        (make(micro_batch_size=1, recompute_granularity="full"), "more ranks to a model", "--recompute"),
        (make(micro_batch_size=9), "--micro-batch-size 3 instead of 9", "--micro-batch-size 4"),
        # What the rules refuse is no remedy.
        (make(data_size=2, zero_stage=1, optimizer="muon"), "--micro-batch-size 4", "--zero-stage"),
        (make(data_size=2, zero_stage=2, compile=True), "--micro-batch-size 4", "--zero-stage"),
        (make(micro_batch_size=2, phase="score"), "--micro-batch-size 1 instead of 2", "--recompute"),
    ],
)
def test_the_remedies_are_those_of_the_run(plan, first, absent):
    found = memory_remedies(plan)
    assert found[0].startswith(first)
    assert not [each for each in found if absent in each]
    assert found[-1].startswith("more ranks to a model")


def test_the_compiler_failed():
    failed = torch._dynamo.exc.BackendCompilerFailed(lambda: None, RuntimeError("no kernel\n\nfor this"), None)
    lines = message(failed).splitlines()
    assert lines[0] == "--compile: torch.compile failed, in iteration 1:"
    assert any("no kernel" in line for line in lines)
    assert "  remedy:  leave --compile out: the same losses to rounding, in longer steps" in lines


@pytest.mark.slow
def test_a_compiler_that_fails_ends_the_run_in_its_first_step(data, tmp_path):
    compiler = tmp_path / "cxx"
    compiler.write_text('#!/bin/sh\ncase "$*" in *--version*) exec g++ "$@";; esac\necho "planted" >&2\nexit 1\n')
    compiler.chmod(0o755)
    argv = ["--phase", "main", "--domains", str(data), "--save", str(tmp_path / "run"), "--train-iters", "4", *MODEL]
    environ = {**os.environ, "CXX": str(compiler), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, str(ROOT / "pretrain_doremi.py"), *argv, "--compile"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 1, done.stderr
    assert "error: --compile: torch.compile failed, in iteration 1:\n" in done.stderr
    assert "  planted\n" in done.stderr
    assert "remedy:  leave --compile out" in done.stderr
    assert "Traceback" not in done.stderr


def test_other_errors_stay_what_they_are():
    for error in (RuntimeError("of another kind"), ValueError("x"), RunError("y")):
        with pytest.raises(type(error)) as caught, readable_device_errors(make(), False, None, str):
            raise error
        assert caught.value is error


def without_memory(launch, argv, where):
    """The program, on a device that lacks memory in its `where`."""
    from megatron_doremi.engine import build
    from megatron_doremi.engine.engines import OneStageEngine

    def fails(*arguments, **named):
        raise torch.OutOfMemoryError(LACK)

    if where == "building":
        build.make_optimizer = fails
    else:
        OneStageEngine._outputs = fails
    program(launch, argv)


@pytest.mark.slow
@pytest.mark.parametrize(("where", "activity"), [("building", "starting"), ("step", "in iteration 1")])
def test_the_first_step_fails_at_once_and_leaves_nothing(data, tmp_path, where, activity):
    argv = ["--phase", "main", "--domains", str(data), "--save", str(tmp_path / "run"), "--train-iters", "4", *MODEL]
    with pytest.raises(AssertionError, match=f"RunError: out of GPU memory, {activity}: Tried to allocate 2.25 GiB"):
        on_ranks(1, without_memory, argv, where)
    assert not list(tmp_path.rglob("iter_*"))
    assert not (tmp_path / "run" / "metrics.jsonl").read_text() if where == "step" else True
