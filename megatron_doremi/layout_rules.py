"""What a layout has to divide: the model's sizes, the global batch and the number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from megatron_doremi.config import Config, ParallelConfig, data_parallel_size
from megatron_doremi.errors import Fault
from megatron_doremi.settings import TRAINING, flag_of
from megatron_doremi.shapes import GPTConfig, Shape, TransformersShape

# Tensor parallel ranks exchange activations in every block, so they should share a machine.
MAX_SUGGESTED_TENSOR = 8


@dataclass(frozen=True)
class Split:
    """Ranks divided into tensor parallel, pipeline and data parallel sizes."""

    tensor: int
    pipe: int
    data: int


def divisors(number: int) -> list[int]:
    """All divisors, in ascending order."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def misfits(shape: Shape, parallel: ParallelConfig) -> list[tuple[str, int, str]]:
    """Sizes of a model that a layout cannot shard: (field of the shape, its value, the rule that it breaks)."""
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    if isinstance(shape, TransformersShape):
        rule = f"1: each rank holds all of {shape.class_name}, which Transformers runs"
        return [("tensor x pipeline parallel size", tensor * stages, rule)] if tensor * stages > 1 else []
    gpt = shape
    rule = f"must be a multiple of --tensor-model-parallel-size {tensor}"
    # Without grouped queries there are as many groups as heads, and nobody gave their number.
    heads = "num_query_groups" if gpt.num_query_groups != gpt.num_attention_heads else "num_attention_heads"
    broken = [
        (name, getattr(gpt, name), rule)
        for name in (heads, "ffn_hidden_size")
        if tensor > 0 and getattr(gpt, name) % tensor
    ]
    if stages > gpt.num_layers:
        broken.append(("num_layers", gpt.num_layers, f"at least --pipeline-model-parallel-size {stages}"))
    return broken


def possible_splits(config: Config, shapes: Sequence[Shape], world_size: int) -> tuple[list[Split], list[str]]:
    """The splits of `world_size` ranks that model and batch can be divided by, and why others are none of them.

    A tensor or pipeline parallel size that the command line gives is kept.

    Args:
        shapes: of the models that a rank holds parts of.
    """
    parallel, data = config.parallel, config.data
    only_tensor = parallel.tensor_model_parallel_size if "tensor_model_parallel_size" in config.given else None
    only_pipe = parallel.pipeline_model_parallel_size if "pipeline_model_parallel_size" in config.given else None
    splits, excluded = list[Split](), list[str]()
    for tensor in divisors(world_size):
        if only_tensor not in (None, tensor) or (tensor > MAX_SUGGESTED_TENSOR and only_tensor is None):
            continue
        sized = replace(parallel, tensor_model_parallel_size=tensor, pipeline_model_parallel_size=1)
        broken = [f"{name} {value} {rule}" for shape in shapes for name, value, rule in misfits(shape, sized)]
        if parallel.sequence_parallel and tensor == 1:
            broken.append("--sequence-parallel needs a tensor parallel group of two ranks or more")
        if parallel.sequence_parallel and data.seq_length % tensor:
            broken.append(f"--seq-length {data.seq_length} {sequence_rule(tensor)}")
        if broken:
            excluded.append(f"tensor {tensor}: {'; '.join(broken)}")
            continue
        for pipe in divisors(world_size // tensor):
            split = Split(tensor, pipe, world_size // tensor // pipe)
            staged = replace(sized, pipeline_model_parallel_size=pipe)
            if only_pipe not in (None, pipe) or any(misfits(shape, staged) for shape in shapes):
                continue
            windows = data.micro_batch_size * split.data
            if data.global_batch_size % windows:
                rule = f"--global-batch-size {data.global_batch_size} is not a multiple of {windows}"
                excluded.append(f"tensor {tensor} x pipeline {pipe} x data {split.data}: {rule}")
            else:
                splits.append(split)
    return splits, excluded


def remedy_without_sequence(config: Config, shapes: Sequence[Shape], world_size: int) -> str:
    """The remedy where `possible_splits` finds none with --sequence-parallel and one without; else ""."""
    without = replace(config, parallel=replace(config.parallel, sequence_parallel=False))
    if not config.parallel.sequence_parallel or not possible_splits(without, shapes, world_size)[0]:
        return ""
    return "leave --sequence-parallel out, or give ranks for a tensor parallel group whose size divides --seq-length"


def sequence_rule(tensor: int) -> str:
    """The rule that --seq-length has to follow with --sequence-parallel."""
    return f"with --sequence-parallel a multiple of --tensor-model-parallel-size {tensor}"


def layout_faults(config: Config, world_size: int) -> list[Fault]:
    """Faults of the layout flags on `world_size` ranks. Sizes of 0 or less are reported elsewhere."""
    data, parallel = config.data, config.parallel
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    if tensor < 1 or stages < 1:
        return []
    faults: list[Fault] = []
    if world_size % (tensor * stages):
        faults.append(
            Fault(
                "world size",
                str(world_size),
                f"a multiple of tensor x pipeline parallel = {tensor} x {stages} = {tensor * stages}",
                f"start {_multiples_near(world_size, tensor * stages)} processes, or give two sizes whose product is "
                + _listed(divisors(world_size)),
            )
        )
    elif data.global_batch_size > 0 and data.micro_batch_size > 0:
        faults += _batch_faults(data.global_batch_size, data.micro_batch_size, data_parallel_size(parallel, world_size))
    if parallel.sequence_parallel and tensor == 1:
        faults.append(
            Fault(
                "--sequence-parallel",
                "with --tensor-model-parallel-size 1",
                "a tensor parallel group of two ranks or more, over which it shards norms and residual stream",
                "leave it out, or give a --tensor-model-parallel-size above 1",
            )
        )
    if parallel.sequence_parallel and data.seq_length % tensor:
        faults.append(
            Fault(
                "--seq-length",
                str(data.seq_length),
                sequence_rule(tensor),
                f"give --seq-length {_multiples_near(data.seq_length, tensor)}, or change the other size",
            )
        )
    return faults


def highest_zero_stage(config: Config, stages: int) -> int:
    """The highest ZeRO stage that the optimizer, --compile and a number of pipeline stages allow; see `zero_faults`."""
    if stages > 1 or config.optimizer.optimizer == "muon":
        return 1
    return 2 if config.parallel.compile else 3


def zero_faults(config: Config) -> list[Fault]:
    """Faults of the ZeRO stage with pipeline, precision and offload.

    --suggest-layout chooses a stage where none is given.
    """
    parallel, chosen = config.parallel, config.run.suggest_layout and "zero_stage" not in config.given
    faults: list[Fault] = []
    if parallel.zero_stage >= 2 and parallel.pipeline_model_parallel_size > 1:
        faults.append(
            Fault(
                "--zero-stage",
                str(parallel.zero_stage),
                "DeepSpeed's pipeline supports ZeRO 0 and 1 only (2 and 3 shard what its stages accumulate)",
                "give --zero-stage 1, or --pipeline-model-parallel-size 1",
            )
        )
    if config.optimizer.optimizer == "muon" and parallel.zero_stage >= 2:
        faults.append(
            Fault(
                "--optimizer",
                f"muon with --zero-stage {parallel.zero_stage}",
                "Muon moves whole matrices, which are joined under ZeRO 0 and 1 only",
                "give --zero-stage 0 or 1, or --optimizer adam",
            )
        )
    if parallel.zero_stage == 3 and parallel.compile:
        faults.append(
            Fault(
                "--compile",
                "with --zero-stage 3",
                "ZeRO 3 gathers weights in hooks, which a compiled block does not run",
                "give --zero-stage 2 or lower, or leave it out",
            )
        )
    stages = parallel.pipeline_model_parallel_size
    offloads = parallel.cpu_offload and highest_zero_stage(config, stages) >= 2
    if parallel.cpu_offload and not offloads:
        muon = config.optimizer.optimizer == "muon"
        faults.append(
            Fault(
                "--cpu-offload",
                "with --optimizer muon" if muon else f"with --pipeline-model-parallel-size {stages}",
                "DeepSpeed offloads only what ZeRO 2 and 3 shard, and here ZeRO 1 is the highest",
                f"leave it out, or give {'--optimizer adam' if muon else '--pipeline-model-parallel-size 1'}",
            )
        )
    if chosen:
        return faults
    if offloads and parallel.zero_stage < 2:
        faults.append(
            Fault(
                "--cpu-offload",
                f"with --zero-stage {parallel.zero_stage}",
                "DeepSpeed offloads only what ZeRO 2 and 3 shard",
                "give --zero-stage 2 or 3, or leave it out",
            )
        )
    if config.optimizer.bf16 and parallel.zero_stage == 0 and config.data.phase in TRAINING:
        faults.append(
            Fault(
                "--bf16",
                "with --zero-stage 0",
                "DeepSpeed would accumulate gradients in bfloat16",
                "give --zero-stage 1, which accumulates in float32 (with one replica it shards nothing)",
            )
        )
    return faults


def dry_run_faults(config: Config) -> list[Fault]:
    """Faults of the flags of a dry run and of a suggestion by themselves."""
    run = config.run
    if run.dry_run:
        return []
    if run.suggest_layout:
        return [Fault("--suggest-layout", "without --dry-run", "a dry run suggests a layout", "add --dry-run")]
    flags = [flag_of(field.name) for field in fields(config.planning) if field.name in config.given]
    flags += ["--dry-run-world-size"] if run.dry_run_world_size else []
    flags += ["--device-memory-gib"] if run.device_memory_gib else []
    return [Fault(flag, "has no effect", "--dry-run reads it", "add --dry-run, or leave it out") for flag in flags]


def split_faults(config: Config, gpt: GPTConfig, world_size: int) -> list[Fault]:
    """A fault if no layout divides model, batch and ranks."""
    splits, excluded = possible_splits(config, [gpt], world_size)
    if splits:
        return []
    tensor, stages = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    if world_size % (tensor * stages):
        return [fault for fault in layout_faults(config, world_size) if fault.subject == "world size"]
    remedy = remedy_without_sequence(config, [gpt], world_size)
    any_batch = replace(config, data=replace(config.data, global_batch_size=0))
    if not remedy and possible_splits(any_batch, [gpt], world_size)[0]:
        replicas = world_size // (tensor * stages)
        remedy = f"give --global-batch-size {_multiples_near(config.data.global_batch_size, replicas)}"
        remedy += f", or start {_listed(divisors(config.data.global_batch_size))} processes"
    remedy = remedy or "change one of these sizes, or start another number of processes"
    return [no_layout(world_size, excluded, remedy)]


def no_layout(world_size: int, excluded: Sequence[str], remedy: str) -> Fault:
    """The fault of --suggest-layout where no layout divides models, batch and ranks."""
    ranks = f"{world_size:,} rank{'s' if world_size > 1 else ''}"
    return Fault("--suggest-layout", f"no layout of {ranks}", "; ".join(excluded), remedy)


def _batch_faults(global_batch: int, micro_batch: int, replicas: int) -> list[Fault]:
    """A fault if micro-batches on all replicas do not add up to the global batch, with the values that do."""
    windows = micro_batch * replicas
    if global_batch % windows == 0:
        return []
    remedies = [f"give --global-batch-size {_multiples_near(global_batch, windows)}"]
    share, rest = divmod(global_batch, replicas)
    if not rest:
        fitting = max(size for size in divisors(share) if size <= micro_batch)
        remedies.append(f"or --micro-batch-size {fitting}")
    elif global_batch % micro_batch == 0:
        sizes = divisors(global_batch // micro_batch)
        remedies.append(f"or start as many processes as give a data parallel size of {_listed(sizes)}")
    if global_batch < replicas:
        remedies.append(f"(a step has fewer windows than the {replicas} replicas)")
    rule = f"a multiple of --micro-batch-size x data parallel = {micro_batch} x {replicas}"
    return [Fault("--global-batch-size", str(global_batch), rule, " ".join([", ".join(remedies[:2]), *remedies[2:]]))]


def _multiples_near(value: int, step: int) -> str:
    """The multiples of `step` below and above a value that is none: '4 or 8'."""
    below = value // step * step
    return f"{below} or {below + step}" if below else str(step)


def _listed(numbers: list[int]) -> str:
    """'1, 2, 4 or 8'; of many numbers the ends."""
    shown = [str(number) for number in numbers]
    if len(shown) > 8:
        shown = [*shown[:4], "...", *shown[-3:]]
    return " or ".join([", ".join(shown[:-1]), shown[-1]]) if len(shown) > 1 else shown[0]


def field_faults(gpt: GPTConfig, parallel: ParallelConfig) -> list[Fault]:
    """A fault for each size of a model that the layout cannot shard."""
    return [
        Fault(flag_of(name), str(value), rule, "change one of the two") for name, value, rule in misfits(gpt, parallel)
    ]
