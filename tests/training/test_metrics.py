"""Metrics: lines by hand, full precision, resumption of the file.

Run alone: python -m pytest tests/training/test_metrics.py
"""

from __future__ import annotations

import json

import pytest

from megatron_doremi.config import GPTConfig
from megatron_doremi.training.metrics import MetricsFile, domain_entries, evaluation_entries, flops_per_token

SUMS = [[1.0, 0.0, 0.0], [6.0, 3.0, 0.0], [4.0, 1.0, 0.0]]


def test_domain_entries_by_hand():
    entry = domain_entries(SUMS, ["a", "b", "c"])
    assert entry["loss"] == pytest.approx(9.0 / 5.0)
    assert entry["domain_loss"] == {"a": 1.5, "b": 3.0}
    assert entry["domain_tokens"] == {"a": 4, "b": 1, "c": 0}


def test_evaluation_entries_by_hand():
    entry = evaluation_entries(SUMS, ["a", "b", "c"])
    assert entry["eval"] == {"a": 1.5, "b": 3.0}
    assert entry["eval_uniform_mean"] == 2.25
    assert entry["eval_worst"] == 3.0
    assert entry["eval_token_mean"] == pytest.approx(1.8)


def test_a_resumed_file_has_no_iteration_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    for iteration in range(1, 6):
        file.write({"iteration": iteration, "x": 0.1 + 0.2})
    file.close()
    path.write_text(path.read_text() + '{"iteration": 6, "x"')
    file = MetricsFile(path, 3)
    file.write({"iteration": 4, "x": 1 / 3})
    file.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4]
    assert lines[0]["x"] == 0.1 + 0.2
    assert lines[3]["x"] == 1 / 3


def test_an_evaluation_repeated_gives_one_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for value in (1.0, 2.0):
        file = MetricsFile(path, 3, evaluates=True)
        file.write({"iteration": 3, "eval": {"a": value}})
        file.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"iteration": 3, "eval": {"a": 2.0}}]


def test_flops_of_a_token_by_hand():
    """One layer of width 4, 2 heads of 2, GELU of 8, vocabulary 10, windows of 6."""
    gpt = GPTConfig(1, 4, 8, 2, 2, 2, "RMSNorm", 1e-5, False, "rope", 1e4, True, False, 10, 1, 6, 0.02)
    # qkv 4 x 12, projection 4 x 4, feed-forward 2 x 4 x 8, output 4 x 10; scores and mixing 2 x 4 x 6 / 2.
    assert flops_per_token(gpt, 6) == 6 * (48 + 16 + 64 + 40 + 24)
