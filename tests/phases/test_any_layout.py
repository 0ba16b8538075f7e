"""A checkpoint of any layout resumes at any other layout with equal bits, and a run may change its layout.

Run alone: python -m pytest tests/phases/test_any_layout.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from engines import build_engine, layout, make_config
from phases.small import MODEL, full_weights, train, training_lines
from ranks import on_ranks

from megatron_doremi.checkpoint.folder import checkpoints, newest_checkpoint, read_state
from megatron_doremi.checkpoint.optimizer_state import OptimizerFolder
from megatron_doremi.checkpoint.weights import WeightsFolder
from megatron_doremi.config import GPTConfig
from megatron_doremi.parallel.topology import Topology

pytestmark = pytest.mark.slow

# See test_layouts.py on the epsilon.
STABLE = [*MODEL, "--num-layers", "4", "--adam-eps", "1e-3", "--log-interval", "1"]
TP2_PP2 = (4, ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"])
DP2_ZERO1 = (2, ["--zero-stage", "1"])
ZERO3 = (2, ["--zero-stage", "3"])
TP2_DP2_ZERO2 = (4, ["--tensor-model-parallel-size", "2", "--zero-stage", "2", "--cpu-offload"])
SINGLE = (1, [])
OTHER = ["--untie-embeddings-and-output-weights", "--position-embedding-type", "learned_absolute"]


def full_state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Weights, moments and master weights of a checkpoint, unsharded, by name."""
    weights, states = WeightsFolder(checkpoint / "weights"), OptimizerFolder(checkpoint / "optimizer")
    state = full_weights(checkpoint)
    for name, tensor in list(state.items()):
        for key in states.keys:
            values = states.local_range(name, key, weights.spec(name), Topology(), 0, tensor.numel())
            state[f"{name}/{key}"] = values
    return state


def test_a_run_that_changes_its_layout_is_the_same_run(data, reference, tmp_path):
    """Uses a tied embedding, whose copies are on two stages."""
    flags = reference
    undisturbed = train(1, "proxy", data, tmp_path / "undisturbed", 25, *flags, model=STABLE)
    resumed = tmp_path / "broken"
    for number, (world, layout_flags) in enumerate((TP2_PP2, DP2_ZERO1, TP2_PP2, ZERO3, TP2_DP2_ZERO2), 1):
        size = ["--micro-batch-size", "4" if world == 4 else "2"]
        stop = ["--load", str(resumed), "--exit-interval", str(5 * number)]
        lines = train(world, "proxy", data, resumed, 25, *flags, *layout_flags, *size, *stop, model=STABLE)
        assert training_lines(lines)[-1]["iteration"] == 5 * number
    changed, single = training_lines(lines), training_lines(undisturbed)
    assert len(changed) == len(single) == 25
    for line, expected in zip(changed, single, strict=True):
        assert line["domain_tokens"] == expected["domain_tokens"]
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert line["domain_weights"] == pytest.approx(expected["domain_weights"], abs=1e-6)
    written = [json.loads((tmp_path / run / "domain_weights.json").read_text()) for run in ("undisturbed", "broken")]
    assert written[0]["weights"] == pytest.approx(written[1]["weights"], abs=1e-6)
    states = [full_state(newest_checkpoint(tmp_path / run)) for run in ("undisturbed", "broken")]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.allclose(tensor, states[1][name], rtol=0, atol=1e-6), name


def carry(launch, sizes, parallel, gpt, optimizer, source, target):
    """Loads a checkpoint into an engine of this layout and saves it without a step."""
    import numpy as np

    from megatron_doremi.checkpoint.reader import load_training
    from megatron_doremi.checkpoint.writer import Checkpointer

    context = layout(launch, *sizes)
    topology = context.topology
    batch = 8 // topology.data_size
    data = {"micro_batch_size": batch, "global_batch_size": 8, "seq_length": 16, "train_iters": 5}
    config = make_config(topology, data, parallel, **optimizer)
    engine = build_engine(config, GPTConfig(**gpt), np.ones(3) / 3, context)
    load_training(engine, source, context, 5)
    checkpointer = Checkpointer(target, 0, topology)
    checkpointer.start(engine, 5, {})
    checkpointer.finish()


# name: (ranks, (pipe, tensor), parallel settings)
PLACES = {
    "TP2 x PP2": (4, (2, 2), {}),
    "DP2 ZeRO1": (2, (1, 1), {"zero_stage": 1}),
    "PP2 x DP2 ZeRO1": (4, (2, 1), {"zero_stage": 1}),
    "TP2 x DP2 ZeRO2": (4, (1, 2), {"zero_stage": 2}),
    "DP2 ZeRO3 offloaded": (2, (1, 1), {"zero_stage": 3, "cpu_offload": True}),
    "DP4 ZeRO3": (4, (1, 1), {"zero_stage": 3}),
    "single": (1, (1, 1), {}),
}


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_carried_from_layout_to_layout_without_a_step_it_keeps_every_bit(precision, data, tmp_path):
    flags = ["--zero-stage", "1", "--bf16"] if precision == "bf16" else OTHER
    train(2, "main", data, tmp_path / "start", 5, *flags, model=[*STABLE, "--pipeline-model-parallel-size", "2"])
    first = newest_checkpoint(tmp_path / "start")
    gpt, optimizer, checkpoint = read_state(first).recorded_identity()["gpt"], {"bf16": precision == "bf16"}, first
    expected = full_state(first)
    assert any(name.endswith("/master") for name in expected) == (precision == "bf16")
    assert all(tensor.abs().max() > 0 for tensor in expected.values())
    for place, (world, sizes, parallel) in PLACES.items():
        if precision == "bf16" and not parallel:
            continue
        target = tmp_path / place.replace(" ", "-")
        on_ranks(world, carry, sizes, parallel, gpt, optimizer, checkpoint, target)
        checkpoint = checkpoints(target)[-1][1]
        state = full_state(checkpoint)
        assert state.keys() == expected.keys(), place
        for name, tensor in expected.items():
            assert torch.equal(tensor, state[name]), f"{place}: {name}"


def test_nothing_in_a_checkpoint_is_a_pickle(data, tmp_path):
    train(2, "main", data, tmp_path, 2, "--zero-stage", "1")
    checkpoint = newest_checkpoint(tmp_path)
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    assert len(files) == 1 + 2 + 2
