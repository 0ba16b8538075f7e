"""Reading run folders: torn lines, repeated iterations, missing files, phases."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from megatron_doremi.errors import ConfigError
from megatron_doremi.reporting.charts.mixture import driving_losses
from megatron_doremi.reporting.runs import find_phase, read_all, read_run


def test_columns_hold_nan_where_a_domain_is_absent(write_run, rows):
    proxy_row, _ = rows
    path = write_run("p", [proxy_row(n, {"a": 0.25, "b": 0.75}, loss=float(n)) for n in (1, 2, 3)], "proxy")
    run = read_run(path)
    assert run.phase == "proxy"
    assert run.iterations.tolist() == [1, 2, 3]
    np.testing.assert_array_equal(run.loss.ordered(["b", "a"]), [[1, 1], [np.nan, 2], [3, 3]])
    np.testing.assert_array_equal(run.weights.ordered(["a", "b", "c"])[0], [0.25, 0.75, np.nan])


def test_a_domain_that_appears_late_keeps_its_line(write_run):
    lines = [{"iteration": n, "loss": 1.0, "domain_loss": {"late": 9.0} if n == 3 else {"a": 1.0}} for n in (1, 2, 3)]
    series = read_run(write_run("r", lines)).loss
    np.testing.assert_array_equal(series.ordered(["a", "late"]), [[1, np.nan], [1, np.nan], [np.nan, 9]])


@pytest.mark.parametrize("torn", ['{"iteration": 2, "loss": 1', "{", '{"iteration": 2, "domain_loss": {"a', "7\n"])
def test_a_torn_last_line_is_ignored(write_run, torn):
    run = read_run(write_run("r", [{"iteration": 1, "loss": 2.0}], tail=torn))
    assert run.iterations.tolist() == [1]


def test_a_torn_line_with_more_after_it_is_an_error_with_its_number(write_run):
    path = write_run("r", [{"iteration": 1, "loss": 2.0}], tail='{"iter\n{"iteration": 2, "loss": 1.0}\n')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl, line 2"):
        read_run(path)


@pytest.mark.parametrize("line", ['{"loss": 1.0}', '{"iteration": 2, "loss": "high"}', '{"iteration": 2, "eval": [1]}'])
def test_a_line_that_is_not_a_metrics_line_is_an_error_with_its_number(write_run, line):
    with pytest.raises(ConfigError, match="line 2"):
        read_run(write_run("r", [{"iteration": 1, "loss": 2.0}], tail=line + "\n"))


def test_of_a_repeated_iteration_the_later_line_counts(write_run):
    lines = [{"iteration": n, "loss": value} for n, value in ((1, 1.0), (2, 2.0), (2, 20.0), (3, 3.0))]
    run = read_run(write_run("r", lines))
    assert run.scalars["loss"].tolist() == [1.0, 20.0, 3.0]


def test_numbers_that_are_not_finite_become_nan(write_run):
    run = read_run(write_run("r", [{"iteration": 1, "loss": float("inf"), "grad_norm": None}]))
    assert np.isnan(run.scalars["loss"][0])
    assert np.isnan(run.scalars["grad_norm"][0])


def test_a_run_with_evaluations_only(write_run, rows):
    run = read_run(write_run("e", [rows[1](7, {"a": 1.0, "b": 2.0}, 1.2)], "evaluate"))
    assert not run.has_weights
    assert run.evaluations[0].nats.uniform_mean == 1.5
    assert run.evaluations[0].nats.worst == ("b", 2.0)


@pytest.mark.parametrize(
    ("config", "phase"),
    [
        ({"phase": "main"}, "main"),
        ({"run": {"phase": "proxy"}}, "proxy"),
        ({"run": {"lr": {"phase": "warmup"}}, "job": {"phase": "reference"}}, "reference"),
        ({}, "unknown"),
    ],
)
def test_the_phase_is_found_wherever_config_has_it(config, phase):
    assert find_phase(config) == phase


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_a_missing_file_is_named_with_a_remedy(write_run, name):
    path = write_run("r", [{"iteration": 1, "loss": 2.0}])
    (path / name).unlink()
    with pytest.raises(ConfigError, match=name) as caught:
        read_run(path)
    assert "--save" in caught.value.faults[0].remedy


def test_all_missing_folders_are_reported_at_once(tmp_path: Path):
    with pytest.raises(ConfigError) as caught:
        read_all([partial(read_run, tmp_path / name) for name in ("one", "two")])
    assert len(caught.value.faults) == 2


def test_an_empty_metrics_file_is_a_fault(write_run):
    with pytest.raises(ConfigError, match="at least one training or evaluation line"):
        read_run(write_run("r", []))


def test_what_drives_the_weights_is_read_under_either_name(write_run, rows):
    proxy_row, _ = rows
    excess = proxy_row(2, {"a": 0.25, "b": 0.75})
    score = {"domain_score" if key == "domain_excess" else key: value for key, value in excess.items()}
    run, other = read_run(write_run("excess", [excess], "proxy")), read_run(write_run("score", [score], "proxy"))
    assert run.excess.values.tolist() == other.score.values.tolist() == [[0.25, 0.25]]
    assert run.score.values.size == other.excess.values.size == 0
    assert [driving_losses("x", "p", each).title for each in (run, other)] == [
        *("Excess loss over the steps (p)", "Score over the steps (p)")
    ]
