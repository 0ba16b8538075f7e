"""The same proxy run at every layout: losses, gradient norms and domain weights.

Run alone: python -m pytest tests/training/test_layouts.py
"""

from __future__ import annotations

import json
import math

import pytest
from training.small import MODEL, train, training_lines, write_data

pytestmark = pytest.mark.slow

STEPS = 20
# name: (ranks, flags)
LAYOUTS = {
    "TP2": (2, ["--tensor-model-parallel-size", "2"]),
    "TP2 sequence parallel": (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
    "PP2": (2, ["--pipeline-model-parallel-size", "2"]),
    "DP2": (2, []),
    "DP2 ZeRO1": (2, ["--zero-stage", "1"]),
    "TP2 x PP2": (4, ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]),
    "PP2 x DP2 ZeRO1": (4, ["--pipeline-model-parallel-size", "2", "--zero-stage", "1"]),
    "TP2 x DP2 ZeRO1": (4, ["--tensor-model-parallel-size", "2", "--zero-stage", "1"]),
    "one micro-batch": (1, ["--micro-batch-size", "8"]),
    "eight micro-batches": (1, ["--micro-batch-size", "1"]),
}
# About twice what was measured: .00057 of the loss, .00027 of a weight.
BOUNDS = {"loss": 1.2e-3, "weight": 6e-4}
VARIANTS = {
    "tied": MODEL,
    "untied": [*MODEL, "--untie-embeddings-and-output-weights", "--normalization", "LayerNorm"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), num_domains=5)


@pytest.fixture(scope="module")
def single(data, tmp_path_factory):
    """A reference, and for each variant the proxy on one process."""
    folder = tmp_path_factory.mktemp("single")
    train(1, "reference", data, folder / "reference", 15)
    reference = ["--reference-load", str(folder / "reference")]
    return reference, {
        name: training_lines(train(1, "proxy", data, folder / name, STEPS, *reference, model=model))
        for name, model in VARIANTS.items()
    }


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_twenty_steps_are_the_same(layout, variant, single, data, tmp_path):
    world, flags = LAYOUTS[layout]
    reference, expected = single
    flags = [*flags, "--check-ranks-interval", "5"]
    lines = training_lines(train(world, "proxy", data, tmp_path, STEPS, *reference, *flags, model=VARIANTS[variant]))
    assert len(lines) == STEPS
    for ours, theirs in zip(lines, expected[variant], strict=True):
        assert ours["domain_tokens"] == theirs["domain_tokens"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        assert ours["domain_loss"] == pytest.approx(theirs["domain_loss"], rel=1e-4)
        assert ours["domain_weights"] == pytest.approx(theirs["domain_weights"], abs=1e-6)
    # The comparison means something: the model learned and the weights moved.
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.2
    assert max(lines[-1]["domain_weights"].values()) > 0.25


def test_22_domains_in_batches_of_16(tmp_path_factory, tmp_path):
    """More domains than windows: 200 steps through absences without a jump, finite, summing to one."""
    folder = tmp_path_factory.mktemp("22")
    data = write_data(folder, num_domains=22, tokens=600)
    flags = ["--global-batch-size", "16", "--lr", "2e-3", "--log-interval", "100"]
    train(1, "reference", data, tmp_path / "reference", 20, *flags)
    reference = ["--reference-load", str(tmp_path / "reference")]
    lines = training_lines(train(2, "proxy", data, tmp_path / "proxy", 200, *reference, *flags))
    previous = dict.fromkeys(lines[0]["domain_weights"], 1 / 22)
    last_excess = dict.fromkeys(previous, 0.0)
    for line in lines:
        weights, excess = line["domain_weights"], line["domain_excess"]
        assert sum(weights.values()) == pytest.approx(1.0, abs=1e-12)
        assert min(weights.values()) >= 0.001 / 22
        absent = [n for n, tokens in line["domain_tokens"].items() if tokens == 0]
        assert len(absent) == 6
        assert all(excess[n] == last_excess[n] for n in absent)
        # An update multiplies a weight by at most exp(largest excess) against the others.
        bound = math.exp(max(excess.values()))
        assert all(weights[n] <= 1.001 * previous[n] * bound + 0.001 / 22 for n in weights)
        previous, last_excess = weights, excess
    assert max(weights.values()) < 0.9


def test_weights_follow_from_the_metrics_alone(single, data, tmp_path):
    """alpha_t from alpha_{t-1} and lambda_t by the formula, at every step; the file holds their mean."""
    reference, _ = single
    flags = ["--pipeline-model-parallel-size", "2", "--doremi-step-size", "0.7", "--doremi-smoothing", "0.01"]
    lines = training_lines(train(2, "proxy", data, tmp_path, STEPS, *reference, *flags))
    names = list(lines[0]["domain_weights"])
    alpha = dict.fromkeys(names, 1 / len(names))
    for line in lines:
        raised = {n: alpha[n] * math.exp(0.7 * line["domain_excess"][n]) for n in names}
        total = sum(raised.values())
        alpha = line["domain_weights"]
        for n in names:
            assert alpha[n] == pytest.approx(0.99 * raised[n] / total + 0.01 / len(names), abs=1e-12)
        dro = sum(alpha[n] * loss for n, loss in line["domain_loss"].items())
        assert line["dro_loss"] == pytest.approx(dro, rel=1e-12)
    written = json.loads((tmp_path / "domain_weights.json").read_text())
    for n in names:
        mean = sum(line["domain_weights"][n] for line in lines) / STEPS
        assert written["weights"][n] == pytest.approx(mean, abs=1e-12)
    assert sum(written["weights"].values()) == pytest.approx(1.0, abs=1e-12)
    assert written["provenance"]["steps"] == STEPS


def test_bfloat16_follows_float32(single, data, tmp_path):
    """bfloat16 keeps 8 bits of a number; a batch's mean loss averages the errors of its tokens, but what is left of
    them in lambda adds up over steps, so the bound is one for 20 steps at eta = .2."""
    reference, _ = single
    flags = [*reference, "--doremi-step-size", "0.2", "--pipeline-model-parallel-size", "2"]
    exact = training_lines(train(2, "proxy", data, tmp_path / "float32", STEPS, *flags))
    short = training_lines(train(2, "proxy", data, tmp_path / "bf16", STEPS, *flags, "--bf16", "--zero-stage", "1"))
    loss = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(short, exact, strict=True))
    weight = max(
        abs(a["domain_weights"][n] - b["domain_weights"][n])
        for a, b in zip(short, exact, strict=True)
        for n in b["domain_weights"]
    )
    print("bfloat16 against float32:", {"loss": loss, "weight": weight})
    assert 0 < loss < BOUNDS["loss"]
    assert 0 < weight < BOUNDS["weight"]
