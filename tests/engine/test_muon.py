"""Muon: its step against SVD and torch's own, the matrices that fused projections hold, and the same run at any layout.

Run alone: python -m pytest tests/engine/test_muon.py
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from engines import small_gpt
from phases.small import MODEL, full_weights, train, training_lines

from megatron_doremi.arguments import parse_config
from megatron_doremi.config import OptimizerConfig
from megatron_doremi.engine.muon import make_muon, orthogonalized, parts_of, update_of
from megatron_doremi.errors import ConfigError
from megatron_doremi.parallel.groups import TensorGroup
from megatron_doremi.parallel.parameters import ParameterSpec, make_parameter

GPT = small_gpt()
PROJ, QKV, FC1 = (f"layers.0.{name}.weight" for name in ("attention.proj", "attention.qkv", "mlp.fc1"))


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(24, 24), (40, 24), (24, 80)])
def test_singular_vectors_stay_and_singular_values_become_about_one(shape):
    matrix = randn(*shape)
    u, values, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    inner = u.T @ orthogonalized(matrix).double() @ v.T
    large = values > 0.05 * values.max()
    assert (inner - inner.diag().diag()).abs().max() < 1e-4
    assert inner.diag()[large].min() > 0.6
    assert inner.diag().max() < 1.3


def test_steps_of_a_matrix_against_torch():
    """torch iterates in bfloat16."""
    ours, theirs = make_parameter(ParameterSpec((24, 32)), TensorGroup()), torch.nn.Parameter(randn(24, 32))
    with torch.no_grad():
        ours.copy_(theirs)
    settings = OptimizerConfig(optimizer="muon", lr=0.1, weight_decay=0.1)
    optimizer = make_muon([(PROJ, ours)], settings, GPT, TensorGroup())
    expected = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    start = theirs.detach().clone()
    for step in range(3):
        ours.grad = randn(24, 32, seed=step + 1)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        expected.step()
    error = (ours - theirs).norm() / (theirs - start).norm()
    assert error < 0.02


def test_fused_projections_are_matrices_of_their_own():
    """2 groups of 2 queries, a key and a value, each 8 wide; gate above up."""
    rows = torch.arange(64.0).view(64, 1).expand(64, 24).contiguous()
    q, k, v = (part.reshape(-1, 24)[:, 0].tolist() for part in parts_of(QKV, rows, GPT))
    assert q == [*range(16), *range(32, 48)]
    assert (k, v) == ([*range(16, 24), *range(48, 56)], [*range(24, 32), *range(56, 64)])
    momentum = randn(80, 24)
    update = update_of(FC1, momentum, GPT)
    for half in (slice(0, 40), slice(40, 80)):
        assert torch.allclose(update[half], orthogonalized(momentum[half]) * 0.2 * math.sqrt(40))
    assert parts_of(PROJ, momentum, GPT)[0] is momentum


def test_muon_has_the_matrices_of_the_blocks_only():
    shapes = {
        PROJ: (24, 24),
        "embedding.weight": (53, 24),
        "layers.0.mlp_norm.weight": (24,),
        "output.weight": (53, 24),
    }
    parameters = {name: make_parameter(ParameterSpec(shape), TensorGroup()) for name, shape in shapes.items()}
    groups = make_muon(parameters.items(), OptimizerConfig(optimizer="muon"), GPT, TensorGroup()).param_groups
    names = {id(parameter): name for name, parameter in parameters.items()}
    found = [([names[id(each)] for each in group["params"]], group["weight_decay"]) for group in groups]
    assert found == [([PROJ], 0.01), (["embedding.weight", "output.weight"], 0.01), (["layers.0.mlp_norm.weight"], 0.0)]


LAYOUTS = {
    "TP2 sequence parallel": (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
    "TP2 x PP2": (4, ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]),
    "DP2": (2, []),
    "DP2 ZeRO1": (2, ["--zero-stage", "1"]),
    "TP2 x DP2 ZeRO1": (4, ["--tensor-model-parallel-size", "2", "--zero-stage", "1"]),
    "PP2 x DP2 ZeRO1": (4, ["--pipeline-model-parallel-size", "2", "--zero-stage", "1"]),
}
STABLE = [*MODEL, "--optimizer", "muon", "--adam-eps", "1e-3", "--log-interval", "1"]


@pytest.fixture(scope="module")
def single(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("muon") / "run"
    return folder, training_lines(train(1, "main", data, folder, 8, "--save-interval", "4", model=STABLE))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_at_another_layout_and_one_that_changes_to_it(layout, single, data, tmp_path):
    folder, expected = single
    world, flags = LAYOUTS[layout]
    load = ["--load", f"{folder}@4"]
    whole = training_lines(train(world, "main", data, tmp_path / "whole", 8, *flags, model=STABLE))
    changed = training_lines(train(world, "main", data, tmp_path / "changed", 8, *flags, *load, model=STABLE))
    for lines, like in ((whole, expected), (changed, expected[4:])):
        assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in like], rel=2e-5)
        assert [line["grad_norm"] for line in lines] == pytest.approx([line["grad_norm"] for line in like], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["DP2 ZeRO1", "PP2 x DP2 ZeRO1", "TP2 x DP2 ZeRO1"])
def test_bfloat16_with_float32_master_weights(layout, single, data, tmp_path):
    """The losses of float32 within bfloat16's precision, and a stop that leaves no trace."""
    world, flags = LAYOUTS[layout]
    flags = [*flags, "--bf16"]
    whole = training_lines(train(world, "main", data, tmp_path / "whole", 8, *flags, model=STABLE))
    assert [line["loss"] for line in whole] == pytest.approx([line["loss"] for line in single[1]], rel=5e-3)
    again = [*flags, "--load", str(tmp_path / "broken")]
    train(world, "main", data, tmp_path / "broken", 8, *again, "--exit-interval", "4", model=STABLE)
    lines = training_lines(train(world, "main", data, tmp_path / "broken", 8, *again, model=STABLE))
    assert lines == whole


@pytest.mark.slow
def test_a_branch_of_the_same_layout_is_equal_bit_for_bit(single, data, tmp_path):
    folder, expected = single
    lines = train(1, "main", data, tmp_path / "again", 8, "--load", f"{folder}@4", model=STABLE)
    assert training_lines(lines) == expected[4:]
    last = "checkpoints/iter_0000008"
    weights = full_weights(folder / last), full_weights(tmp_path / "again" / last)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert json.loads((folder / "config.json").read_text())["identity"]["optimizer"] == "muon"
    adam = training_lines(train(1, "main", data, tmp_path / "adam", 8, model=[*STABLE, "--optimizer", "adam"]))
    assert adam[0]["loss"] == expected[0]["loss"]
    assert adam[-1]["loss"] != pytest.approx(expected[-1]["loss"], rel=1e-4)
    flags = ["--load", f"{folder}@4", "--optimizer", "adam"]
    with pytest.raises(AssertionError, match="optimizer was muon, and is adam"):
        train(1, "main", data, tmp_path / "other", 8, *flags, model=STABLE)


@pytest.mark.parametrize("flags", [["--zero-stage", "3"], ["--zero-stage", "2"]])
def test_zero_is_refused(flags):
    argv = ["--phase", "main", "--domains", "d", "--save", "s", "--train-iters", "4", *STABLE, *flags]
    with pytest.raises(ConfigError, match="Muon moves whole matrices"):
        parse_config(argv, 2)
