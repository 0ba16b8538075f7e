"""Weights are loaded without drawing the initial values that they replace, by a frozen model and by a run.

Run alone: python -m pytest tests/checkpoint/test_load_frozen.py
"""

from __future__ import annotations

from pathlib import Path

import pytest
from model.test_against_plain_model import VARIANTS
from ranks import on_ranks


def load(launch, gpt, folder):
    """Writes a model's weights and loads them at this layout; returns the names whose bits differ."""
    import torch

    from megatron_doremi.checkpoint.reader import load_frozen
    from megatron_doremi.checkpoint.weights import WeightsFolder, weights_file
    from megatron_doremi.cluster.process_group import join
    from megatron_doremi.model.pipeline import GPTPipeline
    from megatron_doremi.parallel import parameters
    from megatron_doremi.parallel.context import make_context
    from megatron_doremi.parallel.topology import Topology

    device, _ = join(launch)
    topology = Topology(tensor_size=launch.world_size, rank=launch.rank)
    context = make_context(topology, device)
    trained = GPTPipeline(gpt, context, seed=3)
    weights_file(trained, topology).write(folder)
    torch.distributed.barrier()

    def fail(*arguments):
        raise AssertionError("initial values were drawn")

    parameters.fill_initial_shard = fail
    frozen = load_frozen(gpt, WeightsFolder(folder), context, torch.float32)
    loaded = dict(frozen.model_parameters())
    return [name for name, parameter in trained.model_parameters() if not torch.equal(parameter, loaded[name])]


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_initial_value_is_drawn(variant, tmp_path):
    """With 53 ids padded to 56 rows, so that the padding is filled, too."""
    for world in (1, 2):
        folder = Path(tmp_path / str(world))
        folder.mkdir()
        assert on_ranks(world, load, VARIANTS[variant], folder) == [[]] * world


def load_to_train(launch, gpt, zero_stage, bf16, folder):
    """The same for an engine that continues with the weights; master weights included."""
    import numpy as np
    import torch
    from engines import layout, make_config

    from megatron_doremi.checkpoint.optimizer_state import MASTER, owned_state
    from megatron_doremi.checkpoint.reader import load_weights
    from megatron_doremi.checkpoint.weights import WeightsFolder, weights_file
    from megatron_doremi.engine.build import make_engine
    from megatron_doremi.mixture.controllers import make_controller, make_objective
    from megatron_doremi.model.unpipelined import GPTModel
    from megatron_doremi.parallel import parameters
    from megatron_doremi.parallel.deepspeed_internals import gathered
    from megatron_doremi.plan import make_plan

    context = layout(launch, 1, 1)
    trained = GPTModel(gpt, context, 3)
    if launch.rank == 0:
        weights_file(trained, context.topology).write(folder)
    torch.distributed.barrier()

    def fail(*arguments):
        raise AssertionError("initial values were drawn")

    parameters.fill_initial_shard = fail
    data = {"phase": "main", "seq_length": 8, "micro_batch_size": 1}
    config = make_config(context.topology, data, {"zero_stage": zero_stage}, bf16=bf16)
    plan = make_plan(config, context.topology, gpt, ("a",), (1,), np.ones(1))
    objective = make_objective(plan, make_controller(plan), context)
    engine = make_engine(plan, objective, context, to_be_loaded=True)
    load_weights(engine, WeightsFolder(folder), context)
    expected, different = dict(trained.model_parameters()), []
    for name, parameter in engine.module.model_parameters():
        with gathered([parameter]):
            if not torch.equal(parameter, expected[name].to(plan.dtype)):
                different.append(name)
    for owned in owned_state(engine, context.topology.data_rank):
        if MASTER in owned.tensors:
            part = expected[owned.name].reshape(-1)[owned.start : owned.start + owned.count]
            if not torch.equal(owned.tensors[MASTER], part):
                different.append(f"{owned.name}, master")
    return different


@pytest.mark.parametrize(("zero_stage", "bf16"), [(0, False), (1, False), (1, True), (3, True)])
def test_no_initial_value_is_drawn_where_a_run_continues(zero_stage, bf16, tmp_path):
    gpt = next(iter(VARIANTS.values()))
    assert on_ranks(2, load_to_train, gpt, zero_stage, bf16, tmp_path) == [[]] * 2
