"""The same proxy run at every layout: losses, gradient norms and domain weights.

Run alone: python -m pytest tests/phases/test_layouts.py
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from phases.small import MODEL, evaluation_figures, full_weights, read_by, train, training_lines, write_data
from ranks import run_program

pytestmark = pytest.mark.slow

STEPS = 20
# Four layers, so that a pipeline of four has one each. Eight windows a step. Adam divides by sqrt(v) + epsilon: with
# the usual 1e-8 a parameter whose gradient is nothing but rounding would move by the whole learning rate, and with 1e-4
# rounding in the embedding of a rare id still grows a hundredfold within 25 steps, on one process too: another
# --loss-chunk-tokens alone moves parameters by 5e-7, with 3e-4 by 1.6e-7.
DEEP = [*MODEL, "--num-layers", "4", "--adam-eps", "3e-4", "--eval-iters", "1"]
UNTIED = [*DEEP, "--untie-embeddings-and-output-weights", "--normalization", "LayerNorm"]
# Model, number of domains, and source of the reference losses. Each task is one run on one process.
TASKS = {
    "tied, 3 domains, online": (DEEP, 3, "online"),
    "untied, 5 domains, online": (UNTIED, 5, "online"),
    "tied, 22 domains, online": (DEEP, 22, "online"),
    "untied, 3 domains, recorded": (UNTIED, 3, "recorded"),
    "tied, 5 domains, recorded": (DEEP, 5, "recorded"),
    "untied, 22 domains, recorded": (UNTIED, 22, "recorded"),
}
TP2, PP2, PP4 = (
    ["--tensor-model-parallel-size", "2"],
    ["--pipeline-model-parallel-size", "2"],
    ["--pipeline-model-parallel-size", "4"],
)
SP, OFFLOAD = ["--sequence-parallel"], ["--cpu-offload"]
SELECTIVE, FULL = ["--recompute-granularity", "selective"], ["--recompute-granularity", "full"]


def zero(stage):
    return ["--zero-stage", str(stage)]


# name: (ranks, micro-batches a rank and step, flags, task); every task runs at every kind of layout.
LAYOUTS = {
    "1": (1, 1, [], "tied, 3 domains, online"),
    "1, full": (1, 2, FULL, "untied, 22 domains, recorded"),
    "TP2": (2, 4, TP2, "tied, 22 domains, online"),
    "TP2 SP": (2, 1, [*TP2, *SP], "untied, 5 domains, online"),
    "TP2 SP ZeRO1, selective": (2, 2, [*TP2, *SP, *zero(1), *SELECTIVE], "untied, 3 domains, recorded"),
    "PP2": (2, 4, PP2, "tied, 3 domains, online"),
    "PP2, one micro-batch": (2, 1, PP2, "untied, 22 domains, recorded"),
    "PP2 ZeRO1, full": (2, 2, [*PP2, *zero(1), *FULL], "tied, 5 domains, recorded"),
    "DP2": (2, 2, [], "untied, 5 domains, online"),
    "DP2 ZeRO1": (2, 4, zero(1), "tied, 22 domains, online"),
    "DP2 ZeRO2": (2, 2, zero(2), "tied, 3 domains, online"),
    "DP2 ZeRO2 offloaded, selective": (2, 4, [*zero(2), *OFFLOAD, *SELECTIVE], "untied, 22 domains, recorded"),
    "DP2 ZeRO3": (2, 2, zero(3), "tied, 22 domains, online"),
    "DP2 ZeRO3 offloaded, full": (2, 2, [*zero(3), *OFFLOAD, *FULL], "untied, 3 domains, recorded"),
    "TP2 x PP2": (4, 2, [*TP2, *PP2], "untied, 5 domains, online"),
    "TP2 x PP2 SP ZeRO1, full": (4, 4, [*TP2, *PP2, *SP, *zero(1), *FULL], "tied, 5 domains, recorded"),
    "PP2 x DP2": (4, 4, PP2, "tied, 22 domains, online"),
    "PP2 x DP2 ZeRO1, selective": (4, 2, [*PP2, *zero(1), *SELECTIVE], "untied, 3 domains, recorded"),
    "TP2 x DP2": (4, 1, TP2, "tied, 3 domains, online"),
    "TP2 x DP2 SP ZeRO1": (4, 2, [*TP2, *SP, *zero(1)], "untied, 22 domains, recorded"),
    "TP2 x DP2 ZeRO2": (4, 2, [*TP2, *zero(2)], "tied, 5 domains, recorded"),
    "TP2 x DP2 SP ZeRO2": (4, 1, [*TP2, *SP, *zero(2)], "untied, 5 domains, online"),
    "TP2 x DP2 ZeRO3": (4, 2, [*TP2, *zero(3)], "tied, 3 domains, online"),
    "TP2 x DP2 SP ZeRO3, full": (4, 1, [*TP2, *SP, *zero(3), *FULL], "untied, 22 domains, recorded"),
    "PP4": (4, 4, PP4, "untied, 5 domains, online"),
    "PP4 ZeRO1, full": (4, 2, [*PP4, *zero(1), *FULL], "tied, 5 domains, recorded"),
}
# More than twice the measured differences: .00057 of the loss, .0001 of a weight.
BOUNDS = {"loss": 1.2e-3, "weight": 3e-4}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """{number of domains: (data set, {source of the reference losses: flags})}."""
    sources = {}
    for domains in sorted({domains for _, domains, _ in TASKS.values()}):
        folder = tmp_path_factory.mktemp(f"{domains}-domains")
        data = write_data(folder, num_domains=domains)
        train(1, "reference", data, folder / "reference", 15, "--micro-batch-size", "8", model=DEEP)
        online = ["--reference-load", str(folder / "reference")]
        argv = ["--phase", "score", "--domains", str(data), "--save", str(folder / "losses"), *online]
        argv += read_by("score", MODEL)
        run_program(1, [*argv, "--train-iters", str(STEPS)])
        sources[domains] = (data, {"online": online, "recorded": ["--reference-losses", str(folder / "losses")]})
    return sources


@pytest.fixture(scope="module")
def data(prepared):
    return prepared[5][0]


@pytest.fixture(scope="module")
def reference(prepared):
    return prepared[5][1]["online"]


def proxy(world, task, prepared, save, *flags):
    """Trains a task's proxy; returns its metrics and its last weights, unsharded, by name."""
    model, domains, source = TASKS[task]
    data, reference = prepared[domains]
    lines = train(world, "proxy", data, save, STEPS, *reference[source], *flags, model=model)
    return lines, full_weights(save / "checkpoints" / f"iter_{STEPS:07d}")


@pytest.fixture(scope="module")
def single(prepared, tmp_path_factory):
    """Each task on one process."""
    folder = tmp_path_factory.mktemp("single")
    return {task: proxy(1, task, prepared, folder / str(number)) for number, task in enumerate(TASKS)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_twenty_steps_are_the_same(layout, prepared, single, tmp_path):
    world, micro_batches, flags, task = LAYOUTS[layout]
    model_parallel = math.prod(int(flags[flags.index(name) + 1]) for name in (TP2[0], PP2[0]) if name in flags)
    size = ["--micro-batch-size", str(8 // (world // model_parallel) // micro_batches), "--check-ranks-interval", "5"]
    run, weights = proxy(world, task, prepared, tmp_path, *flags, *size)
    expected, expected_weights = single[task]
    lines = training_lines(run)
    assert len(lines) == STEPS
    for ours, theirs in zip(lines, training_lines(expected), strict=True):
        assert ours["domain_tokens"] == theirs["domain_tokens"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        assert ours["domain_loss"] == pytest.approx(theirs["domain_loss"], rel=1e-4)
        assert ours["domain_weights"] == pytest.approx(theirs["domain_weights"], abs=1e-6)
    assert evaluation_figures(run[-1]) == pytest.approx(evaluation_figures(expected[-1]), rel=1e-5)
    assert weights.keys() == expected_weights.keys()
    difference = max((weights[name] - expected_weights[name]).abs().max().item() for name in weights)
    print(f"{layout}: parameters differ by at most {difference:.1e}")
    assert difference < 1e-6
    # The comparison is not vacuous: the model learned and the weights changed.
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.04
    alpha = list(lines[-1]["domain_weights"].values())
    assert max(alpha) > 1.1 / len(alpha)


def test_22_domains_in_batches_of_16(tmp_path_factory, tmp_path):
    """More domains than windows: over 100 steps with absent domains the weights are finite, smooth and sum to one."""
    folder = tmp_path_factory.mktemp("22")
    data = write_data(folder, num_domains=22, tokens=600)
    flags = ["--global-batch-size", "16", "--micro-batch-size", "8", "--lr", "2e-3", "--eval-iters", "1"]
    train(1, "reference", data, tmp_path / "reference", 20, *flags)
    reference = ["--reference-load", str(tmp_path / "reference")]
    lines = training_lines(train(2, "proxy", data, tmp_path / "proxy", 100, *reference, *flags))
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


def test_weights_follow_from_the_metrics_alone(reference, data, tmp_path):
    """alpha_t follows from alpha_{t-1} and lambda_t by the formula at every step; the file holds the mean alpha_t."""
    flags = [*PP2, "--doremi-step-size", "0.7", "--doremi-smoothing", "0.01", "--eval-iters", "1"]
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


@pytest.mark.parametrize("flags", [[*PP2, *zero(1)], zero(2), zero(3)], ids=["PP2 ZeRO1", "DP2 ZeRO2", "DP2 ZeRO3"])
def test_bfloat16_follows_float32(flags, reference, data, tmp_path):
    """bfloat16 keeps 8 bits of a number; a batch's mean loss averages the errors of its tokens, but what is left of
    them in lambda, .001 to .003 a step, adds up as in a random walk, so the bound is one for 20 steps at eta = .05."""
    flags = [*reference, "--doremi-step-size", "0.05", "--eval-iters", "1", *flags]
    exact = training_lines(train(2, "proxy", data, tmp_path / "float32", STEPS, *flags))
    short = training_lines(train(2, "proxy", data, tmp_path / "bf16", STEPS, *flags, "--bf16"))
    weights = full_weights(tmp_path / "bf16" / "checkpoints" / f"iter_{STEPS:07d}")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    loss = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(short, exact, strict=True))
    weight = max(
        abs(a["domain_weights"][n] - b["domain_weights"][n])
        for a, b in zip(short, exact, strict=True)
        for n in b["domain_weights"]
    )
    print("bfloat16 against float32:", {"loss": loss, "weight": weight})
    assert 0 < loss < BOUNDS["loss"]
    assert 0 < weight < BOUNDS["weight"]
