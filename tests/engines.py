"""Engines for tests, built from a few settings; gathers the parameters of all ranks into full tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any


def layout(launch, pipe, tensor, sequence_parallel=False):
    """Joins the other ranks; returns this rank's ParallelContext."""
    from megatron_doremi.cluster.process_group import join
    from megatron_doremi.parallel.context import make_context
    from megatron_doremi.parallel.topology import Topology

    topology = Topology(pipe, launch.world_size // pipe // tensor, tensor, launch.rank)
    device, _ = join(launch)
    return make_context(topology, device, sequence_parallel)


def make_config(
    topology, data: dict, parallel: dict | None = None, doremi: dict | None = None, training=None, **optimizer: Any
):
    """A configuration for this layout; other settings keep their defaults."""
    from megatron_doremi.config import (
        Config,
        DataConfig,
        DoReMiConfig,
        ModelConfig,
        OptimizerConfig,
        ParallelConfig,
        RunConfig,
        TrainingConfig,
    )

    return Config(
        DataConfig(**data),
        ModelConfig(),
        ParallelConfig(topology.tensor_size, topology.pipe_size, **(parallel or {})),
        DoReMiConfig(**(doremi or {})),
        OptimizerConfig(**optimizer),
        RunConfig(),
        training=TrainingConfig(**(training or {})),
    )


def small_gpt(**changes: Any):
    """A model shape small enough to train in a test; `changes` are fields of GPTConfig."""
    from megatron_doremi.config import GPTConfig

    shape = {
        "num_layers": 2,
        "hidden_size": 24,
        "ffn_hidden_size": 40,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 8,
        "swiglu": True,
        "bias_linear": False,
        "vocab_size": 53,
        "make_vocab_size_divisible_by": 8,
        "max_positions": 32,
        "init_method_std": 0.2,
    }
    return GPTConfig(**{**shape, **changes})


def build_engine(config, gpt, weights, context):
    """The engine of a run that samples domains by [k] `weights`, under the controller that its flags choose."""
    from megatron_doremi.engine.build import make_engine
    from megatron_doremi.mixture.controllers import make_controller, make_objective
    from megatron_doremi.plan import make_plan

    names = tuple(f"domain {number}" for number in range(len(weights)))
    plan = make_plan(config, context.topology, gpt, names, (1,) * len(weights), weights)
    return make_engine(plan, make_objective(plan, make_controller(plan), context), context)


def read_parameters(engine, read=lambda parameter: parameter.detach()):
    """{name: (this rank's shard, spec)} of the engine's parameters; `read` maps a parameter to a tensor."""
    from megatron_doremi.parallel.deepspeed_internals import gathered
    from megatron_doremi.parallel.parameters import spec_of

    values = {}
    for name, parameter in engine.module.model_parameters():
        with gathered([parameter]):
            values[name] = (read(parameter).clone(), spec_of(parameter))
    return values


def read_gradient(engine):
    """A function that gives a parameter's gradient as the optimizer is given it; a collective call."""
    import deepspeed
    import torch
    import torch.distributed as dist

    from megatron_doremi.parallel.sharded_optimizer import ShardedOptimizer

    optimizer = engine.optimizer

    def read(parameter):
        if isinstance(optimizer, ShardedOptimizer):
            full, piece = torch.zeros(parameter.numel()), optimizer.piece_of(parameter)
            if piece is not None:
                full[piece.start : piece.start + piece.count] = piece.of(optimizer.gradients()[piece.bucket])
            if engine.context.topology.data_size > 1:
                dist.all_reduce(full, group=engine.context.groups.data)
            return full.view(parameter.shape)
        if engine.zero_optimization_stage() >= 2:
            return deepspeed.utils.safe_get_full_grad(parameter)
        return parameter._hp_grad.view(parameter.shape) if hasattr(parameter, "_hp_grad") else parameter.grad

    return read


def gather_full(topology, local_parameters):
    """{name: full parameter} from every rank's `read_parameters`; fails if replicas or tied copies differ."""
    import torch
    import torch.distributed as dist

    from megatron_doremi.parallel.parameters import unshard

    everyone: list[Any] = [None] * topology.world_size
    dist.all_gather_object(everyone, (topology, local_parameters))
    full: dict[str, Any] = {}
    for stage in range(topology.pipe_size):
        parts = [values for place, values in everyone if place.pipe_rank == stage and place.data_rank == 0]
        for name, (_, spec) in parts[0].items():
            value = unshard([part[name][0] for part in parts], spec)
            assert name not in full or torch.equal(value, full[name]), f"{name}: the tied copies differ"
            full[name] = value
    by_rank = {place.rank: values for place, values in everyone}
    for place, values in everyone:
        twin = by_rank[replace(place, rank=place.rank_at(place.pipe_rank, 0, place.tensor_rank)).rank]
        for name, (value, _) in values.items():
            assert torch.equal(value, twin[name][0]), f"{name}: replicas differ"
    return full
