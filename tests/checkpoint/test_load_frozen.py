"""A frozen model is loaded without drawing the initial values that its weights replace.

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

    parameters.initial_values = fail
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
