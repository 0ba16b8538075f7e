"""Gradients are reduced bucket by bucket, beside the backward pass.

Run alone: python -m pytest tests/engine/test_reduction.py
"""

from __future__ import annotations

import pytest
import torch
from engines import layout
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
