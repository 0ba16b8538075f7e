"""Held-out loss is the same at any batch and layout and never NaN; recording it leaves a run's metrics unchanged.

Run alone: python -m pytest tests/phases/test_evaluate.py
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from cluster.test_survival import write_nan
from phases.small import MODEL, metrics, read_by, train, write_data
from ranks import run_program

from megatron_doremi.mixture.statistics import DomainStats
from megatron_doremi.phases.evaluate import evaluation_entries, evaluation_windows

TP2, PP2 = ["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"]


def test_entries_by_hand():
    """2 of 6 windows of domain a are read and 1 of 1 of b; c has no held-out text. A window has 2 targets."""
    stats = DomainStats(torch.zeros(3), torch.tensor([6.0, 6.0, 0.0]), torch.tensor([4.0, 2.0, 0.0]))
    entry = evaluation_entries(stats, ["a", "b", "c"], [6, 1, 0], 2)
    assert entry["eval"] == {"a": 1.5, "b": 3.0}
    assert entry["eval_windows"] == {"a": 2, "b": 1}
    assert entry["eval_uniform_mean"] == 2.25
    assert entry["eval_worst"] == 3.0
    # Windows that --eval-iters skips count too: domain a has 6 of 7, not 2 of 3.
    assert entry["eval_token_mean"] == pytest.approx((6 * 1.5 + 3.0) / 7)


def test_windows_are_spread_evenly():
    batch = evaluation_windows([10, 0, 3], 4)
    assert batch.domains.tolist() == [0, 0, 0, 0, 2, 2, 2]
    assert batch.windows.tolist() == [0, 2, 5, 7, 0, 1, 2]
    assert len(evaluation_windows([10, 0, 3], 0).windows) == 13


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A data set with 37, 37 and 5 held-out windows by domain, and a run on it."""
    data = write_data(tmp_path_factory.mktemp("data"), tokens=1500)
    manifest = json.loads(data.read_text())
    short = write_data(tmp_path_factory.mktemp("short"), tokens=1500, held_out=90)
    manifest["domains"][2]["valid"] = json.loads(short.read_text())["domains"][2]["valid"]
    manifest["domains"][2]["valid"] = str(short.parent / "domain2_valid")
    data.write_text(json.dumps(manifest))
    save = tmp_path_factory.mktemp("run")
    train(2, "main", data, save, 6, *TP2)
    return data, save


def evaluate(world, data, load, save, *flags):
    argv = ["--phase", "evaluate", "--domains", str(data), "--load", str(load), "--save", str(save)]
    run_program(world, [*argv, *read_by("evaluate", MODEL), *flags])
    return [json.loads(line) for line in (save / "evaluations.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_same_at_any_batch_and_layout(trained, tmp_path):
    """At the defaults, with weights of another layout; the results differ only by rounding."""
    data, save = trained
    in_training = metrics(save)[-1]
    assert in_training["eval_windows"] == {"domain 0": 37, "domain 1": 37, "domain 2": 5}
    for world, flags in (
        (1, ["--micro-batch-size", "1"]),
        (1, ["--micro-batch-size", "4"]),
        (2, [*PP2, "--micro-batch-size", "3"]),
        (2, TP2),
        (2, ["--micro-batch-size", "1"]),
    ):
        line = evaluate(world, data, save, tmp_path, *flags)[-1]
        assert line["iteration"] == 6
        assert line["eval_windows"] == in_training["eval_windows"]
        for key in ("eval_uniform_mean", "eval_worst", "eval_token_mean"):
            assert line[key] == pytest.approx(in_training[key], rel=1e-6)
        assert line["eval"] == pytest.approx(in_training["eval"], rel=1e-6)
        assert line["eval_worst"] == max(line["eval"].values())
        assert line["eval_uniform_mean"] == pytest.approx(np.mean(list(line["eval"].values())), rel=1e-12)


@pytest.mark.slow
def test_fewer_windows_are_the_same_at_any_batch_and_layout_too(trained, tmp_path):
    """--eval-iters counts batches of the evaluated run (8 windows), not of the evaluation's layout."""
    data, save = trained
    lines = []
    for world, size in ((1, "1"), (1, "2"), (2, "4")):
        flags = ["--eval-iters", "2", "--micro-batch-size", size]
        lines.append(evaluate(world, data, save, tmp_path / size, *flags)[-1])
    for line in lines:
        assert line["eval_windows"] == {"domain 0": 16, "domain 1": 16, "domain 2": 5}
        assert line["eval"] == pytest.approx(lines[0]["eval"], rel=1e-6)


@pytest.mark.slow
def test_evaluations_of_several_runs_stand_side_by_side(trained, tmp_path):
    """Evaluates into the folder of a run that may still train, and two runs into one folder."""
    data, save = trained
    before = {path: path.read_bytes() for path in save.rglob("*") if path.is_file()}
    other = tmp_path / "other"
    train(1, "main", data, other, 2)
    (save / "evaluations.jsonl").write_bytes(b'{"torn": ')
    evaluate_lines = ["run", "of_this_folder", "checkpoint", "iteration"]
    for load in (save, other):
        argv = ["--phase", "evaluate", "--domains", str(data), "--load", str(load), "--save", str(save)]
        run_program(1, [*argv, *read_by("evaluate", MODEL)])
    torn, *lines = (save / "evaluations.jsonl").read_text().splitlines()
    assert torn == '{"torn": '
    assert [[json.loads(line)[key] for key in evaluate_lines] for line in lines] == [
        [str(save), True, "iter_0000006", 6],
        [str(other), False, "iter_0000002", 2],
    ]
    (save / "evaluations.jsonl").unlink()
    assert before == {path: path.read_bytes() for path in save.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_model_with_nan_is_not_recorded(tmp_path):
    data = write_data(tmp_path, tokens=1500, apart=True)
    save, out = tmp_path / "run", tmp_path / "out"
    train(1, "main", data, save, 2, "--untie-embeddings-and-output-weights")
    write_nan(save, row=25)
    with pytest.raises(
        AssertionError,
        match=r"NonFinite: the held-out loss of \S+iter_0000002 is NaN or Inf in "
        r"'domain 1' \(windows \d+(, \d+)*(, \.\.\.)?\)\n",
    ):
        evaluate(2, data, save, out)
    assert (out / "evaluations.jsonl").read_bytes() == b""
