"""Products with collectives beside them: gradients of the whole product, and the order of what runs in backward.

Run alone: python -m pytest tests/parallel/test_linear.py
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks

from megatron_doremi.parallel.collectives import batch_first, rank_major

BATCH, SEQ, INPUTS, OUTPUTS = 3, 4, 5, 6


def example():
    """The input, weights of a layer by columns and of one by rows, a bias, and the gradient of their result."""
    generator = torch.Generator().manual_seed(0)
    shapes = (BATCH, SEQ, INPUTS), (OUTPUTS, INPUTS), (INPUTS, OUTPUTS), (OUTPUTS,), (BATCH, SEQ, INPUTS)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def test_orders_of_positions():
    x = torch.arange(12).view(2, 6)
    # Two windows of six tokens; three ranks hold two positions of each.
    ordered = [[0, 1], [6, 7], [2, 3], [8, 9], [4, 5], [10, 11]]
    assert rank_major(x, 3).tolist() == ordered
    assert torch.equal(batch_first(rank_major(x, 3), 3), x)
    deeper = torch.stack([x, -x], dim=-1)
    assert torch.equal(batch_first(rank_major(deeper, 3), 3), deeper)
    # Of one window both are views.
    assert rank_major(x[:1], 3).data_ptr() == x.data_ptr()
    assert batch_first(x[:1].view(3, 2), 3).data_ptr() == x.data_ptr()


# Operations of the backward pass, eager and in graphs.
NAMES = {
    "mm": "product",
    "_allgather_base_": "gather",
    "_reduce_scatter_base_": "scatter",
    "allreduce_": "sum",
    "all_gather_into_tensor": "gather",
    "reduce_scatter_tensor": "scatter",
    "all_reduce": "sum",
}


def name_of(operation):
    return NAMES.get(getattr(operation, "__name__", "").split(".")[0])


def two_layers(launch, sequence_parallel, compiled):
    """A product by columns and one by rows: the result, gradients of this rank's parts, and what ran in the backward
    pass, in order."""
    import torch.distributed as dist
    from torch._dynamo.backends.common import aot_autograd
    from torch.utils._python_dispatch import TorchDispatchMode

    from megatron_doremi.cluster.process_group import join
    from megatron_doremi.parallel import linear
    from megatron_doremi.parallel.groups import TensorGroup
    from megatron_doremi.parallel.layers import TensorParallel

    join(launch)
    size, rank, log = launch.world_size, launch.rank, []
    tp = TensorParallel(TensorGroup(dist.group.WORLD, size, rank), sequence_parallel)
    x, first, second, bias, grad = example()
    columns = first.chunk(size)[rank].clone().requires_grad_()
    rows = second.chunk(size, dim=1)[rank].clone().requires_grad_()
    bias = bias.chunk(size)[rank].clone().requires_grad_()
    x, grad = (each.chunk(size, dim=1)[rank].clone() if sequence_parallel else each for each in (x, grad))
    x.requires_grad_()

    def layers(x, columns, bias, rows):
        inner = linear.column_linear(x, columns, bias, tp.group, sequence_parallel)
        inner = batch_first(inner, tp.sequence_shards)
        return tp.leave(linear.rank_major_linear(inner, rows, tp.sequence_shards))

    def read(graph, inputs):
        for node in graph.graph.nodes:
            waits = name_of(node.target) is None and "wait_tensor" in str(node.target)
            log.append(f"{name_of(node.args[0].target)} is there" if waits else name_of(node.target))
        return graph.forward

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            log.append(name_of(func))
            result = func(*args, **(kwargs or {}))
            # By the tensor that a collective fills.
            filled.update({id(each): log[-1] for each in flat(args) if func.namespace == "c10d"})
            return result

    if compiled:
        graphs = aot_autograd(fw_compiler=lambda graph, inputs: graph.forward, bw_compiler=read)
        result = torch.compile(layers, fullgraph=True, backend=graphs)(x, columns, bias, rows)
        result.backward(grad)
    else:
        from torch.utils._pytree import tree_leaves as flat

        result = layers(x, columns, bias, rows)
        filled, finished = {}, linear.finished
        linear.finished = lambda started: log.append(f"{filled[id(started.result)]} is there") or finished(started)
        with Recorded():
            result.backward(grad)
    return result.detach(), x.grad, columns.grad, rows.grad, bias.grad, [each for each in log if each]


BESIDE = {
    True: ["gather", "product", "scatter", "gather is there", "product", "scatter is there"],
    False: ["product", "sum", "product", "sum is there"],
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_collectives_run_beside_products(sequence_parallel, compiled):
    """Those of the layer by columns: its input is gathered beside the product of the input's gradient, which is summed
    over the ranks beside that of the weight's."""
    x, first, second, bias, grad = example()
    for each in (x, first, second, bias):
        each.requires_grad_()
    result = F.linear(F.linear(x, first, bias), second)
    result.backward(grad)
    found = on_ranks(2, two_layers, sequence_parallel, compiled)
    residual = 1 if sequence_parallel else None
    for number, (dimension, expected) in enumerate(
        [(residual, result.detach()), (residual, x.grad), (0, first.grad), (1, second.grad), (0, bias.grad)]
    ):
        ranks = [each[number] for each in found]
        torch.testing.assert_close(ranks[0] if dimension is None else torch.cat(ranks, dim=dimension), expected)
    for *_, log in found:
        # Before them come the products of the layer by rows, which need all of what it gathers.
        assert log[-len(BESIDE[sequence_parallel]) :] == BESIDE[sequence_parallel]


FROZEN = {
    # Of both layers and the bias: what needs no gradient, and what runs in the backward pass; with sequence parallelism
    # the result's gradient is gathered first.
    "input": (["x"], ["product", "product", "product"], ["gather", "product", "product", "gather", "product"]),
    "weights": (
        ["columns", "rows", "bias"],
        ["product", "product", "sum"],
        ["gather", "product", "product", "scatter"],
    ),
    "all but the bias": (["x", "columns", "rows"], ["product"], ["gather", "product"]),
}


def operations(launch, frozen, sequence_parallel):
    """What runs in the backward pass of the two layers, in order, and which inputs have a gradient."""
    import torch.distributed as dist
    from torch.utils._python_dispatch import TorchDispatchMode

    from megatron_doremi.cluster.process_group import join
    from megatron_doremi.parallel import linear
    from megatron_doremi.parallel.groups import TensorGroup
    from megatron_doremi.parallel.layers import TensorParallel

    join(launch)
    size, rank, log = launch.world_size, launch.rank, []
    tp = TensorParallel(TensorGroup(dist.group.WORLD, size, rank), sequence_parallel)
    x, first, second, bias, grad = example()
    x, grad = (each.chunk(size, dim=1)[rank].clone() if sequence_parallel else each for each in (x, grad))
    parts = {"x": x, "columns": first.chunk(size)[rank], "rows": second.chunk(size, dim=1)[rank]}
    parts = {name: each.clone() for name, each in {**parts, "bias": bias.chunk(size)[rank]}.items()}
    for name, each in parts.items():
        each.requires_grad_(name not in frozen)

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            log.append(name_of(func))
            return func(*args, **(kwargs or {}))

    inner = linear.column_linear(parts["x"], parts["columns"], parts["bias"], tp.group, sequence_parallel)
    inner = batch_first(inner, tp.sequence_shards)
    result = tp.leave(linear.rank_major_linear(inner, parts["rows"], tp.sequence_shards))
    with Recorded():
        result.backward(grad)
    return [each for each in log if each], sorted(name for name, each in parts.items() if each.grad is None)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("case", FROZEN)
def test_what_needs_no_gradient_has_no_product(case, sequence_parallel):
    frozen, *expected = FROZEN[case]
    for log, without in on_ranks(2, operations, frozen, sequence_parallel):
        assert log == expected[sequence_parallel]
        assert without == sorted(frozen)
