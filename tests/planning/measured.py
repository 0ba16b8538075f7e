"""What a step really holds and exchanges: bytes of this rank's allocator, and every collective with its size."""

from __future__ import annotations

import math
import time

import numpy as np
from engines import build_engine, layout, make_config

COLLECTIVES_WITHOUT_WORK = ("send", "recv_", "barrier")


def engine_and_batches(context, gpt, data, parallel, doremi, bf16, training=None, **optimizer):
    """An engine that has taken a step (the first makes the optimizer's state), micro-batches of another, and the
    number of targets by domain."""
    import torch

    config = make_config(context.topology, data, parallel, doremi, training, bf16=bf16, **optimizer)
    engine = build_engine(config, gpt, np.full(3, 1 / 3), context)
    windows = config.data.micro_batch_size
    count = config.data.global_batch_size // windows // context.topology.data_size
    targets = torch.tensor([config.data.global_batch_size * config.data.seq_length, 0, 0], dtype=torch.float64)
    batches = micro_batches(windows, config.data.seq_length, count, config.training.drops)
    engine.train_step(batches, targets)
    return engine, batches, targets


def micro_batches(windows, seq, count, drops=False):
    """Micro-batches of one domain with a reference's losses, and keys of dropout."""
    import torch

    from megatron_doremi.data.loader import MicroBatch

    ids = torch.zeros(windows, seq, dtype=torch.int64)
    losses, keys = torch.zeros(windows, seq), torch.arange(windows) if drops else None
    return [MicroBatch(ids, ids, ids[:, 0], ids[:, 0], losses, keys) for _ in range(count)]


def peak_of_a_run(launch, pipe, tensor, gpt, data, parallel, doremi, bf16, training=None, optimizer="adam"):
    """This rank's peak of allocated bytes in its second step, with all that was allocated since before the model."""
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    context = layout(launch, pipe, tensor, parallel.get("sequence_parallel", False))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded, waits_for_gloo():
        engine, batches, targets = engine_and_batches(
            context, gpt, data, parallel, doremi, bf16, training, optimizer=optimizer
        )
        torch.distributed.barrier()
        with record_function("the second step"):
            engine.train_step(batches, targets)
    events = recorded.profiler.kineto_results.events()
    begin = next(e.start_ns() for e in events if e.name() == "the second step")
    return peak_of(events, begin)


def peak_of(events, begin=0):
    """The highest sum of allocated and freed bytes from `begin` on, in nanoseconds."""
    memory = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    held = np.cumsum([e.nbytes() for e in memory])
    return int(max(total for e, total in zip(memory, held, strict=True) if e.start_ns() >= begin))


def waits_for_gloo():
    """Waits after each collective until gloo's threads, which hold its tensors a moment longer, have let go of them."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Waits(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func.namespace == "c10d" and operation(func) not in COLLECTIVES_WITHOUT_WORK:
                work = result[-1] if isinstance(result, tuple) else result
                torch._C._distributed_c10d.Work.unbox(work).wait()
                numbers = max(each.numel() for each in tree_leaves(args) if isinstance(each, torch.Tensor))
                time.sleep(0.03 if numbers > 1 << 18 else 0.002)
            return result

    return Waits()


def operation(func):
    """Name of an operator of c10d, such as allreduce_."""
    return func.__name__.split(".")[0]


def recorded(run):
    """[(operation, numbers, bytes of a number)] of the collectives that `run` calls: of the largest tensor, which an
    all-gather fills and a reduce-scatter reads; of all tensors that an all-gather fills a list of."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    calls = []

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "c10d" and operation(func) != "barrier":
                largest = max((each for each in tree_leaves(args) if isinstance(each, torch.Tensor)), key=torch.numel)
                filled = tree_leaves(args[0]) if operation(func) == "allgather_" else [largest]
                calls.append((operation(func), sum(map(torch.numel, filled)), largest.element_size()))
            return func(*args, **(kwargs or {}))

    with Recorded():
        run()
    return calls


def collectives_of_a_step(launch, pipe, tensor, gpt, data, parallel, doremi, bf16, optimizer="adam"):
    """See `recorded`; of the second step."""
    context = layout(launch, pipe, tensor, parallel.get("sequence_parallel", False))
    engine, batches, targets = engine_and_batches(context, gpt, data, parallel, doremi, bf16, optimizer=optimizer)
    return recorded(lambda: engine.train_step(batches, targets))


def gathered_by_a_compiled_step(launch, tensor, gpt, data, parallel):
    """[numbers] that each all-gather of the second step fills, with --compile. Graphs are divided into a forward and a
    backward part as by Inductor, which would take minutes."""
    import functools

    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.compile = functools.partial(torch.compile, backend="aot_eager_decomp_partition")
    context = layout(launch, 1, tensor, parallel["sequence_parallel"])
    engine, batches, targets = engine_and_batches(context, gpt, data, {**parallel, "compile": True}, {}, False)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        engine.train_step(batches, targets)
    # In graphs the shape is that of a rank's part.
    ranks = {"c10d::_allgather_base_": 1, "_c10d_functional::all_gather_into_tensor": tensor}
    return [ranks[e.name] * math.prod(e.input_shapes[0]) for e in found.events() if e.name in ranks]


def collectives_of_a_reference(launch, pipe, tensor, gpt, shape, count, sequence_parallel, loss_chunk_tokens):
    """See `recorded`; of the forward passes of `count` micro-batches through a frozen model."""
    from megatron_doremi.execution import Execution
    from megatron_doremi.model.forward import forward_only
    from megatron_doremi.model.unpipelined import make_gpt

    context = layout(launch, pipe, tensor, sequence_parallel)
    module = make_gpt(gpt, context, 0, Execution(loss_chunk_tokens=loss_chunk_tokens))
    batches = micro_batches(*shape, count)
    return recorded(lambda: forward_only(module, batches, count, shape, context))
