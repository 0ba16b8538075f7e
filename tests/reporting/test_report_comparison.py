"""The table and the statements, against numbers computed by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_doremi.data.manifest import Domain
from megatron_doremi.errors import ConfigError
from megatron_doremi.reporting.comparison import Pair, compare, running_mean, smoothing_floor
from megatron_doremi.reporting.runs import read_run
from megatron_doremi.reporting.statements import describe, describe_domains, describe_planted, verdict
from megatron_doremi.reporting.tables import (
    Table,
    comparison_table,
    format_difference,
    format_text,
    format_weight,
    run_table,
)


def domain(name: str, tokens: int) -> Domain:
    return Domain(name, Path(name), None, tokens, 1, tokens)


MANIFEST = (domain("code", 600), domain("noise", 300), domain("boilerplate", 100))


@pytest.fixture
def runs(three_runs):
    return {name: read_run(path) for name, path in three_runs.items()}


@pytest.fixture
def comparison(runs):
    return compare(MANIFEST, runs["proxy"], runs["main"], runs["baseline"])


def test_the_table_by_hand(comparison):
    table = comparison_table(comparison)
    assert table.rows == (
        ("code", "600", "0.6000", "0.7000", "0.9000", "2.750", "2.500", "-0.250"),
        ("noise", "300", "0.3000", "0.1400", "0.0200", "5.500", "5.750", "+0.250"),
        ("boilerplate", "100", "0.1000", "0.1600", "0.0800", "0.250", "0.250", "0.000"),
    )
    # (2.75 + 5.5 + 0.25) / 3 = 2.8333, and main's sum is the same.
    assert table.summary == (
        ("uniform mean", "", "", "", "", "2.833", "2.833", "0.000"),
        ("worst domain (noise)", "", "", "", "", "5.500", "5.750", "+0.250"),
        ("token mean", "", "", "", "", "2.800", "2.600", "-0.200"),
    )


def test_the_statements_say_better_worse_and_equal(comparison):
    words = describe(comparison)
    assert "main is better than the baseline on 1 of 3 domains (nats per token): code (-0.250)." in words
    assert "main is worse than the baseline on 1 of 3 domains (nats per token): noise (+0.250)." in words
    assert "main is equal to the baseline on 1 of 3 domains (nats per token): boilerplate." in words
    assert "Uniform mean: main 2.833 against 2.833 nats per token (0.000, equal)." in words
    assert any(w.startswith("Uniform mean without the planted noise and boilerplate: main 2.500") for w in words)
    assert "Worst domain (noise for both): main 5.750 against 5.500 nats per token (+0.250, worse)." in words
    assert "Token mean: main 2.600 against 2.800 nats per token (-0.200, better)." in words


def test_no_improvement_is_reported_too(comparison):
    worse = [replace(each, loss=Pair(1.0, 1.5)) for each in comparison.domains]
    assert describe_domains(worse)[0] == "main is better than the baseline on 0 of 3 domains."


def test_planted_domains_are_reported_either_way(comparison):
    noise, boilerplate = describe_planted(comparison)
    assert "noise lost weight in the mean over all steps (0.1400) and lost weight at the end (0.0200)" in noise
    gained = replace(comparison.domains[2], doremi_weight=0.5, last_weight=1 / 3)
    _, boilerplate = describe_planted(replace(comparison, domains=(*comparison.domains[:2], gained)))
    assert "boilerplate gained weight in the mean over all steps (0.5000)" in boilerplate
    assert "kept its weight at the end (0.3333), against uniform 1/3 = 0.3333." in boilerplate


def test_without_planted_domains_none_are_mentioned(runs, comparison):
    domains = tuple(replace(each, name=f"real-{n}") for n, each in enumerate(comparison.domains))
    assert not any("lanted" in sentence for sentence in describe(replace(comparison, domains=domains)))


def test_statements_and_table_agree_on_a_difference_that_rounds_to_zero():
    assert (verdict(-0.0004), format_difference(-0.0004)) == ("equal", "0.000")
    assert (verdict(-0.0006), format_difference(-0.0006)) == ("better", "-0.001")
    assert verdict(None) == ""
    assert format_difference(None) == "-"


def test_the_weights_file_is_preferred_and_a_gap_to_the_trajectory_is_reported(runs):
    recorded = {"code": 0.6, "noise": 0.2, "boilerplate": 0.2}
    proxy = replace(runs["proxy"], recorded_weights=recorded)
    comparison = compare(MANIFEST, proxy, runs["main"], runs["baseline"])
    assert [each.doremi_weight for each in comparison.domains] == [0.6, 0.2, 0.2]
    assert any("differs from the mean of the trajectory" in note and "0.1:" in note for note in comparison.notes)


def test_unequal_budgets_are_reported(runs):
    shorter = replace(runs["baseline"], evaluations=runs["baseline"].evaluations[:1])
    notes = compare(MANIFEST, runs["proxy"], runs["main"], shorter).notes
    assert notes[0] == "The budgets differ: the baseline was evaluated at step 1, main at step 2."


def test_a_domain_without_held_out_text_is_excluded_and_reported(runs):
    newest = runs["main"].evaluations[-1]
    partial = replace(newest, losses={"code": 2.5, "noise": 5.75})
    comparison = compare(MANIFEST, runs["proxy"], replace(runs["main"], evaluations=(partial,)), runs["baseline"])
    assert comparison.uniform_mean == Pair((2.75 + 5.5) / 2, (2.5 + 5.75) / 2)
    assert comparison_table(comparison).rows[2][-3:] == ("0.250", "-", "-")
    assert any("boilerplate" in note and "excluded" in note for note in comparison.notes)


def test_everything_that_prevents_a_comparison_is_reported_at_once(runs):
    empty = replace(runs["main"], evaluations=())
    with pytest.raises(ConfigError) as caught:
        compare((*MANIFEST[:2], domain("other", 5)), runs["main"], empty, runs["baseline"])
    message = str(caught.value)
    assert "--proxy" in message
    assert "needs at least one evaluation line" in message
    assert "not in the manifest: boilerplate" in message


def test_a_diverged_run_is_a_fault(runs):
    newest = replace(runs["main"].evaluations[-1], losses={"code": float("nan"), "noise": 1.0})
    with pytest.raises(ConfigError, match="diverged"):
        compare(MANIFEST, runs["proxy"], replace(runs["main"], evaluations=(newest,)), runs["baseline"])


def test_running_mean_by_hand():
    values = np.array([[1.0, np.nan], [3.0, 4.0], [8.0, np.nan]])
    np.testing.assert_array_equal(running_mean(values), [[1, np.nan], [2, 4], [4, 4]])


def test_floor_is_smoothing_over_domains(write_run, rows):
    path = write_run("p", [rows[0](1, {"a": 0.5, "b": 0.5})], "proxy", weights={"a": 0.5, "b": 0.5})
    assert smoothing_floor(read_run(path), 2) == pytest.approx(0.0005)
    config = {"phase": "proxy", "doremi": {"doremi_smoothing": 0.01}}
    path = write_run("q", [rows[0](1, {"a": 0.5, "b": 0.5})], config=config)
    assert smoothing_floor(read_run(path), 2) == pytest.approx(0.005)


def test_run_table_of_a_proxy(runs):
    table = run_table(runs["proxy"])
    assert table.header == ("domain", "mean weight", "last weight", "training loss")
    assert table.rows[0] == ("code", "0.7000", "0.9000", "3.000")


def test_run_table_of_an_evaluated_run(runs):
    table = run_table(runs["main"])
    assert table.header == ("domain", "held-out loss", "since step 1")
    assert table.rows[1] == ("noise", "5.750", "+0.150")
    assert table.summary[2] == ("token mean", "2.600", "-0.400")


def test_format_text_aligns_numbers_to_the_right():
    text = format_text(Table(("domain", "loss"), (("a", "1.000"), ("long name", "10.000")), caption="c"))
    assert text.split("\n")[0] == "c"
    assert text.split("\n")[3:] == ["a           1.000", "long name  10.000"]


def test_a_small_weight_is_not_printed_as_zero():
    assert format_weight(0.000045) == "4.5e-05"
    assert format_weight(0.25) == "0.2500"
