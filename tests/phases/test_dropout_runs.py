"""Runs with dropout: the same masks at any layout and after a stop; none in evaluation and in a reference.

Run alone: python -m pytest tests/phases/test_dropout_runs.py
"""

from __future__ import annotations

import pytest
from phases.small import MODEL, assert_stopped_and_resumed_equal, train, training_lines

pytestmark = pytest.mark.slow
# See test_layouts.py on the epsilon.
DEEP = [*MODEL, "--num-layers", "3", "--adam-eps", "1e-3", "--log-interval", "1"]
DROPOUT = ["--attention-dropout", "0.1", "--hidden-dropout", "0.2"]
LAYOUTS = {
    "PP3": (3, ["--pipeline-model-parallel-size", "3"]),
    "TP2 sequence parallel": (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
    "DP2 ZeRO3": (2, ["--zero-stage", "3"]),
    "recomputed": (1, ["--recompute-granularity", "full"]),
}


def proxy(world, flags, data, reference, folder):
    lines = train(world, "proxy", data, folder, 4, *reference, *flags, model=DEEP)
    return training_lines(lines), [line["eval"] for line in lines if "eval" in line]


def test_a_proxy_drops_the_same_at_any_layout(data, tmp_path):
    train(1, "reference", data, tmp_path / "reference", 4, model=DEEP)
    reference = ["--reference-load", str(tmp_path / "reference")]
    plain, _ = proxy(1, [], data, reference, tmp_path / "plain")
    single, held_out = proxy(1, DROPOUT, data, reference, tmp_path / "single")
    assert abs(single[0]["loss"] - plain[0]["loss"]) > 1e-3
    for name, (world, layout) in LAYOUTS.items():
        lines, evaluations = proxy(world, [*layout, *DROPOUT], data, reference, tmp_path / name)
        for line, expected in zip(lines, single, strict=True):
            assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5), name
            assert line["domain_excess"] == pytest.approx(expected["domain_excess"], abs=2e-5), name
            assert line["domain_weights"] == pytest.approx(expected["domain_weights"], abs=1e-6), name
        assert evaluations[0] == pytest.approx(held_out[0], rel=1e-5), name


def test_an_evaluation_drops_nothing(data, tmp_path):
    """At a learning rate of nearly 0 the held-out losses are those of the initial weights, with and without dropout."""
    frozen = [*DEEP, "--lr", "1e-12", "--min-lr", "1e-12", "--weight-decay", "0"]
    runs = [train(1, "main", data, tmp_path / str(len(f)), 2, *f, model=frozen) for f in ([], DROPOUT)]
    evaluations = [next(line["eval"] for line in lines if "eval" in line) for lines in runs]
    assert evaluations[0] == pytest.approx(evaluations[1], rel=1e-6)
    assert abs(training_lines(runs[0])[0]["loss"] - training_lines(runs[1])[0]["loss"]) > 1e-3


@pytest.mark.parametrize("layout", ["PP3", "recomputed"])
def test_stopped_half_way_it_drops_the_same(layout, data, tmp_path):
    world, flags = LAYOUTS[layout]
    assert_stopped_and_resumed_equal(world, data, tmp_path, [*flags, *DROPOUT], DEEP)
