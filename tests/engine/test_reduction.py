"""Gradients are reduced bucket by bucket, beside the backward pass.

Run alone: python -m pytest tests/engine/test_reduction.py
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from engines import build_engine, gather_full, layout, make_config, read_gradient, read_parameters, small_gpt
from ranks import on_ranks

from megatron_doremi.engine.reduction import flat_buckets, loose_buckets

SIZES = (5, 1, 1, 3)


def parameters():
    return [torch.nn.Parameter(torch.zeros(size)) for size in SIZES]


@pytest.mark.parametrize(
    ("elements", "expected"),
    [(1, [[3], [2], [1], [0]]), (4, [[2, 3], [0, 1]]), (5, [[1, 2, 3], [0]]), (100, [[0, 1, 2, 3]])],
)
def test_buckets_go_from_the_last_parameter_to_the_first(elements, expected):
    members, flat = parameters(), torch.arange(12.0)
    place = {id(parameter): number for number, parameter in enumerate(members)}
    loose, contiguous = loose_buckets(members, elements), flat_buckets(members, flat, elements)
    for buckets in (loose, contiguous):
        assert [[place[id(p)] for p in bucket.parameters] for bucket in buckets] == expected
    starts = [0, 5, 6, 7]
    for bucket, numbers in zip(contiguous, expected, strict=True):
        elements_of = sum(SIZES[number] for number in numbers)
        assert bucket.flat.tolist() == list(range(starts[numbers[0]], starts[numbers[0]] + elements_of))
        assert bucket.flat.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()


def test_a_tied_parameter_has_a_bucket_of_its_own():
    members = parameters()
    buckets = flat_buckets(members, torch.arange(12.0), alone={members[1]})
    assert [bucket.parameters for bucket in buckets] == [tuple(members[2:]), (members[1],), (members[0],)]
    assert [bucket.flat.tolist() for bucket in buckets] == [[6, 7, 8, 9], [5], [0, 1, 2, 3, 4]]


def reduced(launch, in_place, micro_batches):
    """Three layers' gradients after the reduction, the mean of those of the ranks, and when buckets were reduced."""
    import torch.distributed as dist

    from megatron_doremi.engine import reduction

    context = layout(launch, 1, 1)
    layers = torch.nn.Sequential(*(torch.nn.Linear(3, 3, bias=False) for _ in range(3)))
    with torch.no_grad():
        for number, layer in enumerate(layers):
            layer.weight.copy_(torch.arange(9.0).view(3, 3) / (number + 1) - 2)
    weights, flat, log = [layer.weight for layer in layers], torch.zeros(27 + 2), []
    if in_place:
        for weight, part in zip(weights, flat[:27].split(9), strict=True):

            def move(parameter, part=part):
                part += parameter.grad.view(-1)
                parameter.grad = None

            weight.register_post_accumulate_grad_hook(move)
    buckets = flat_buckets(weights, flat, 9) if in_place else loose_buckets(weights, 9)
    reduce = reduction.GradientReduction(buckets, context.groups.data, launch.world_size)
    for name, weight in zip("abc", weights, strict=True):
        weight.register_post_accumulate_grad_hook(lambda _, name=name: log.append(name))
    real = dist.all_reduce
    dist.all_reduce = lambda tensor, **options: log.append("reduce") or real(tensor, **options)
    alone = torch.zeros(27)
    for number in range(micro_batches):
        x = torch.full((2, 3), 1.0 + launch.rank + number)
        alone += torch.cat([g.view(-1) for g in torch.autograd.grad(layers(x).square().sum(), weights)])
        if number == micro_batches - 1:
            reduce.start()
        layers(x).square().sum().backward()
    reduce.finish()
    real(alone)
    found = flat[:27] if in_place else torch.cat([weight.grad.view(-1) for weight in weights])
    return found.tolist(), (alone / launch.world_size).tolist(), log, flat[27:].tolist()


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_mean_over_ranks_is_reduced_beside_the_backward_pass(in_place, micro_batches):
    for found, mean, log, padding in on_ranks(2, reduced, in_place, micro_batches):
        assert found == pytest.approx(mean, rel=1e-6)
        assert log == ["c", "b", "a"] * (micro_batches - 1) + ["reduce", "c", "reduce", "b", "reduce", "a"]
        assert padding == [0.0, 0.0]


def a_step(launch, pipe, zero_stage, bf16, tied, phase, by_deepspeed):
    """The gradients that the optimizer is given, the step's order of events, and the parameters after two steps."""
    import torch.distributed as dist
    from deepspeed.runtime.pipe.schedule import BackwardPass, ReduceTiedGrads

    from megatron_doremi.data.loader import MicroBatch
    from megatron_doremi.engine import engines

    context = layout(launch, pipe, 1)
    topology = context.topology
    for name in ("flat_buckets", "loose_buckets"):
        setattr(engines, name, partial(getattr(engines, name), elements=500))
    if by_deepspeed:
        engines.TrainingEngine._make_reduction = lambda engine: None
        engines.TrainingEngine.reduces_gradients = lambda engine: True
    data = {"phase": phase, "seq_length": 16, "micro_batch_size": 1, "global_batch_size": 6, "seed": 3}
    config = make_config(topology, data, {"zero_stage": zero_stage}, clip_grad=1.0, bf16=bf16, lr=1e-2)
    engine = build_engine(config, small_gpt(tied_embeddings=tied), np.full(3, 1 / 3), context)
    ids = torch.randint(0, 53, (6, 17), generator=torch.Generator().manual_seed(5))
    domains = torch.arange(6) % 3
    batches = [
        MicroBatch(ids[i : i + 1, :-1], ids[i : i + 1, 1:], domains[i : i + 1], domains[:1], torch.ones(1, 16))
        for i in range(topology.data_rank, 6, topology.data_size)
    ]
    targets = torch.full((3,), 2.0 * 16, dtype=torch.float64)
    engine.train_step(batches, targets)
    log, gradients, groups = [], {}, {context.groups.data: "reduce"}
    if pipe > 1:
        groups |= {group: "tied" for _, group in engine.module.get_tied_weights_and_groups()}
    real = dist.all_reduce

    def all_reduce(tensor, *arguments, group=None, **options):
        if tensor.numel() > 20:
            log.append(groups.get(group, "other"))
        return real(tensor, *arguments, group=group, **options)

    def before_step(norm):
        gradients.update(read_parameters(engine, read_gradient(engine)))

    def before_instruction(engine, kind, real=engines.PipelinedEngine.before_instruction):
        real(engine, kind)
        if kind in (BackwardPass, ReduceTiedGrads):
            log.append(kind.__name__)

    for _, parameter in engine.module.model_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: log.append("gradient"))
    engines.PipelinedEngine.before_instruction = before_instruction
    dist.all_reduce = all_reduce
    engine.train_step(batches, targets, before_step)
    dist.all_reduce = real
    return gather_full(topology, gradients), log, gather_full(topology, read_parameters(engine))


STEPS = {
    # ranks, stages, ZeRO, bfloat16, tied embeddings, phase
    "DP2": (2, 1, 0, False, True, "main"),
    "DP2, ZeRO 1, bf16": (2, 1, 1, True, True, "main"),
    "DP2, ZeRO 1": (2, 1, 1, False, True, "proxy"),
    "PP2 x DP2, ZeRO 1": (4, 2, 1, False, True, "main"),
    "PP2 x DP2": (4, 2, 0, False, True, "main"),
    "PP2 x DP2, untied, alternating": (4, 2, 0, False, False, "proxy"),
    "PP2 x DP2, ZeRO 1, bf16": (4, 2, 1, True, True, "proxy"),
    "PP2 x DP2, ZeRO 1, bf16, untied": (4, 2, 1, True, False, "main"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_reduction_beside_the_last_backward_pass(name):
    """It begins before that pass ends, with a pipeline too; tied copies are summed before replicas are. Gradients and
    parameters are those of DeepSpeed's own reduction, bit for bit: of two replicas a sum has but one order."""
    world, *settings = STEPS[name]
    ours, theirs = (on_ranks(world, a_step, *settings, by_deepspeed) for by_deepspeed in (False, True))
    for (gradients, log, parameters), (expected, _, expected_parameters) in zip(ours, theirs, strict=True):
        assert gradients.keys() == expected.keys()
        assert all(torch.equal(gradients[each], expected[each]) for each in expected)
        assert all(torch.equal(parameters[each], expected_parameters[each]) for each in expected)
        first, last = log.index("reduce"), max(i for i, event in enumerate(log) if event == "gradient")
        count = log.count("gradient") // 3
        # All gradients of the first two micro-batches, and not all of the last.
        assert 2 * count <= log[:first].count("gradient") < 3 * count, log
        beside = log[first:last].count("reduce")
        assert beside >= 2
        if "tied" in log:
            # The reduction of the tied embedding follows their sum.
            assert log[log.index("tied") :] == ["tied", "reduce"]
