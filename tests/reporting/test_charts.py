"""The arithmetic under the charts, and that every specification compiles in both layouts.

Run alone: python -m pytest tests/reporting/test_charts.py
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron_doremi.reporting.charts.chart import extremes, smooth, thinned
from megatron_doremi.reporting.charts.theme import DARK, LIGHT, dash_scale, series_scale
from megatron_doremi.reporting.mixture import entropy, learned_weights, running_mean, smoothing_floor, weights_file_note
from megatron_doremi.reporting.runs import read_run
from megatron_doremi.reporting.study_tables import training_seconds
from megatron_doremi.reporting.tables import (
    Column,
    Table,
    excerpt,
    fitted,
    format_difference,
    format_seconds,
    format_text,
    format_weight,
)


def test_running_mean_and_entropy_by_hand():
    values = np.array([[1.0, np.nan], [3.0, 4.0], [8.0, np.nan]])
    np.testing.assert_array_equal(running_mean(values), [[1, np.nan], [2, 4], [4, 4]])
    weights = np.array([[0.5, 0.5], [1.0, 0.0], [0.0, 0.0], [1.0, np.nan]])
    np.testing.assert_allclose(np.exp(entropy(weights)), [2, 1, np.nan, np.nan])


def test_smoothing_keeps_the_first_value_and_skips_gaps():
    values = np.ones((600, 2))
    values[0] = 100.0
    values[50:60, 1] = np.nan
    smoothed = smooth(values)
    assert smoothed[0].tolist() == [100.0, 100.0]
    assert smoothed[40:].min() == smoothed[40:].max() == 1.0


def test_points_and_domains_to_draw():
    assert thinned(5, 3).tolist() == [0, 2, 4]
    assert thinned(3, 9).tolist() == [0, 1, 2]
    values = {name: float(place) for place, name in enumerate("dcbae")}
    assert extremes("abcde", values, 4) == ["d", "c", "a", "e"]
    assert extremes("abx", values, 4) == ["b", "a"]


def test_looks_are_the_same_in_every_chart_and_differ_for_32_names():
    assert LIGHT.keys() == DARK.keys()
    order = [str(number) for number in range(32)]
    looks = zip(series_scale(order)["range"], map(str, dash_scale(order)["range"]), strict=True)
    assert len(set(looks)) == 32
    assert series_scale(["2", "1"], order)["range"] == ["var(--s3)", "var(--s2)"]


def test_learned_weights_are_the_files_and_a_gap_to_the_trajectory_is_reported(write_run, rows):
    weights = {"a": 0.5, "b": 0.5}
    recorded = {"a": 0.6, "b": 0.4}
    run = read_run(write_run("p", [rows[0](1, weights)], "proxy", weights=recorded))
    assert learned_weights(run) == recorded
    assert "by up to 0.1:" in (weights_file_note(run, "proxy") or "")
    assert smoothing_floor(run, 2) == pytest.approx(0.0005)
    provenance = {"steps": 1200, "train_iters": 2400, "early_stop": {"half_width": 0.0123}}
    note = weights_file_note(replace(run, weights_provenance=provenance), "proxy")
    assert note is not None
    assert note.startswith("proxy stopped early, after 1,200 of 2,400 steps: ")
    assert "within 0.0123 (95 %)" in note
    config = {"phase": "proxy", "doremi": {"doremi_smoothing": 0.01}}
    run = read_run(write_run("q", [rows[0](1, weights)], config=config))
    assert learned_weights(run) == weights
    assert weights_file_note(run, "q") is None
    assert smoothing_floor(run, 2) == pytest.approx(0.005)


def test_training_time_counts_the_steps_between_lines(write_run):
    """10 steps of 20 ms, 10 of 30 ms."""
    lines = [{"iteration": step, "loss": 1.0, "elapsed_ms": ms} for step, ms in ((10, 20.0), (20, 30.0))]
    assert training_seconds(read_run(write_run("r", lines))) == pytest.approx(0.5)
    assert training_seconds(read_run(write_run("s", [{"iteration": 1, "loss": 1.0}]))) is None


def test_numbers_as_text():
    assert (format_difference(-0.0004), format_difference(-0.0006)) == ("0.000", "-0.001")
    assert (format_weight(0.000045), format_weight(0.25)) == ("4.5e-05", "0.2500")
    assert [format_seconds(each) for each in (7.44, 83, 3723)] == ["7.4 s", "1:23 min", "1:02:03 h"]


def test_a_table_as_text_and_csv():
    columns = (Column("domain"), Column("loss", lambda value: f"{value:.3f}"))
    table = Table("t", columns, (("a", 1.0), ("b, c", float("nan")), ("long name", 10.0)), caption="c")
    lines = ["c", "domain       loss", "---------  ------", "a           1.000", "b, c            -"]
    assert format_text(table).split("\n") == [*lines, "long name  10.000"]
    assert table.csv() == 'domain,loss\r\na,1.0\r\n"b, c",\r\nlong name,10.0\r\n'
    assert [row[0] for row in excerpt(table, 2).rows] == ["a", "... 2 more"]
    wide, dropped = fitted(Table("t", (*columns, Column("x" * 99)), (("a", 1.0, ""),)), 50)
    assert (len(wide.columns), dropped) == (2, 1)
