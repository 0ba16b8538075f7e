"""What --dry-run prints of the machine: memory by stage, arithmetic, time, communication, files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron_doremi.console import COLUMNS
from megatron_doremi.devices import FLOAT32_TFLOPS
from megatron_doremi.errors import Fault
from megatron_doremi.plan import RunPlan
from megatron_doremi.planning.communication import DATA, PIPELINE, TENSOR, Traffic, link_of, stage_traffic
from megatron_doremi.planning.compute import (
    bubble,
    checkpoint_bytes,
    device_tflops,
    flops_per_second,
    muon_flops,
    muon_seconds,
    planned_tokens,
    run_flops_per_token,
    slowest_stage,
)
from megatron_doremi.planning.memory import (
    StageMemory,
    host_bytes_per_parameter,
    parameter_counts,
    stage_memories,
    stage_parameters,
)
from megatron_doremi.settings import EVALUATE, SCORE, TRAINING
from megatron_doremi.shapes import Shape
from megatron_doremi.text_table import table_lines

# The share of a device's memory that the estimate may not fill.
MARGIN = 0.15
# Tokens a parameter at which a given amount of arithmetic gives the lowest loss (Hoffmann et al. 2022, table 3).
_COMPUTE_OPTIMAL = 20
_MEMORY = ("weights", "gradients", "optimizer", "activations", "reference", "loss", "working", "total")
_STAGES = 16


def machine_lines(plan: RunPlan, alternating: bool, reference: Shape | None) -> list[str]:
    """The tables and lines of a dry run on memory, arithmetic, time, communication and files.

    Args:
        alternating: all forward passes of a step come before its first backward pass.
        reference: the model that a proxy holds beside its own; None: it holds none.
    """
    memories = stage_memories(plan, alternating, reference)
    return [
        *_memory_table(plan, memories),
        *_files(plan),
        *_arithmetic(plan, alternating, reference),
        *_communication(plan, alternating, reference),
    ]


def memory_faults(plan: RunPlan, alternating: bool, reference: Shape | None) -> list[Fault]:
    """A fault if the fullest rank does not fit the stated device."""
    gib = plan.config.run.device_memory_gib
    fullest = max(stage_memories(plan, alternating, reference), key=lambda each: each.total)
    if not gib or fullest.total <= (1 - MARGIN) * gib * 2**30:
        return []
    value = f"{fullest.total / 2**30:.1f} GiB on a rank of stage {fullest.stage}"
    rule = f"at most {(1 - MARGIN) * gib:.1f} GiB of --device-memory-gib {gib:g}; {MARGIN:.0%} is left for what is not "
    rule += "counted"
    remedy = "add --suggest-layout, without layout flags, for the layouts that fit"
    return [Fault("memory", value, rule, remedy)]


def _memory_table(plan: RunPlan, memories: Sequence[StageMemory]) -> list[str]:
    """Bytes of a rank of each stage; columns of zeros and equal stages are left out."""
    unit, name = (2**30, "GiB") if max(each.total for each in memories) >= 2**30 else (2**20, "MiB")
    keys = [key for key in _MEMORY if key == "total" or any(getattr(each, key) >= 0.005 * unit for each in memories)]
    runs = _equal_stages(memories)
    left = len(runs) - _STAGES
    header = ["stage", "layers", "parameters", *keys]
    rows = [
        [
            _range(first, last),
            f"{each.blocks:,}",
            f"{each.parameters:,}",
            *(f"{getattr(each, key) / unit:,.2f}" for key in keys),
        ]
        for first, last, each in runs[:_STAGES]
    ]
    fullest = max(memories, key=lambda each: each.total)
    gib, most = plan.config.run.device_memory_gib, f"fullest: stage {fullest.stage}, {fullest.total / unit:,.2f} {name}"
    if gib:
        most += f", {fullest.total / gib / 2**30:.0%} of {gib:g} GiB"
    elif plan.config.run.dry_run:
        most += ", which no device is compared with (--device-memory-gib)"
    held = f"; activations of {fullest.held:,} micro-batch{'es' if fullest.held > 1 else ''}" if fullest.held else ""
    return [
        f"memory of a rank by stage, {name}:",
        *_indented(table_lines(header, rows, COLUMNS - 2)),
        *([f"  and {left:,} more"] if left > 0 else []),
        f"  {most}{held} (docs/memory.md: what is not counted)",
    ]


def _equal_stages(memories: Sequence[StageMemory]) -> list[tuple[int, int, StageMemory]]:
    """Stages that follow each other with equal figures: (first, last, the first's)."""
    runs: list[tuple[int, int, StageMemory]] = []
    for each in memories:
        figures = [each.blocks, each.parameters, *(getattr(each, key) for key in _MEMORY)]
        if runs and figures == [
            runs[-1][2].blocks,
            runs[-1][2].parameters,
            *(getattr(runs[-1][2], k) for k in _MEMORY),
        ]:
            runs[-1] = (runs[-1][0], each.stage, runs[-1][2])
        else:
            runs.append((each.stage, each.stage, each))
    return runs


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _files(plan: RunPlan) -> list[str]:
    """A checkpoint's size and the memory of the host; none without training."""
    config, topology = plan.config, plan.topology
    if config.data.phase not in TRAINING:
        return []
    parameters = parameter_counts(plan.shape, 1, 1)[0]
    lines = [f"a checkpoint: {checkpoint_bytes(plan, parameters) / 1e9:,.2f} GB on disk"]
    host = host_bytes_per_parameter(config, topology.data_size)
    if host:
        rank = host * stage_parameters(plan.shape, topology.tensor_size, topology.pipe_size)[0]
        on_a_node = min(topology.world_size, config.planning.dry_run_gpus_per_node)
        lines[0] += (
            f"; the host holds {_gib(rank)} for each rank, {_gib(rank * on_a_node)} for {on_a_node} of a machine"
        )
    ratio = planned_tokens(plan) / parameters
    lines.append(
        f"tokens a parameter: {ratio:,.1f} (about {_COMPUTE_OPTIMAL} give the lowest loss of the same arithmetic: "
        "Hoffmann et al. 2022)"
    )
    return lines


def _arithmetic(plan: RunPlan, alternating: bool, reference: Shape | None) -> list[str]:
    """Floating point operations, days and GPU hours, and the bubble; none for an evaluation."""
    config, planning, ranks = plan.config, plan.config.planning, plan.topology.world_size
    phase = config.data.phase
    if phase == EVALUATE:
        return []
    tokens = planned_tokens(plan)
    flops = tokens * run_flops_per_token(plan, reference)
    # Tasks of an array score their shares at the same time.
    tasks = config.doremi.num_shards if phase == SCORE else 1
    seconds = flops / flops_per_second(plan) / tasks
    step = f"{flops / config.data.train_iters:.2e} FLOP a step, " if phase in TRAINING else ""
    a_step = f"{seconds / config.data.train_iters:,.3g} s a step, " if phase in TRAINING else ""
    online = ", the reference's forward pass included" if reference is not None else ""
    peak = f"{device_tflops(plan):,g} TFLOP/s" + ("" if config.optimizer.bf16 else " in float32")
    lines = [
        f"arithmetic: {step}{flops:.2e} FLOP the run{online}; recomputation does not count",
        f"time at {planning.dry_run_mfu:.0%} of {planning.dry_run_device}'s {peak}: "
        f"{a_step}{_duration(seconds)} on {ranks * tasks:,} GPU{'s' if ranks * tasks > 1 else ''}, "
        f"{seconds * ranks * tasks / 3600:,.1f} GPU-hours",
    ]
    if muon_flops(plan):
        where = "each rank of the largest stage" if plan.topology.pipe_size > 1 else "each rank"
        single = f"{planning.dry_run_device}'s {FLOAT32_TFLOPS[planning.dry_run_device]:,g} TFLOP/s"
        lines.append(
            f"beside that, Muon: {muon_flops(plan):.2e} FLOP a step on {where}, in float32, "
            f"{muon_seconds(plan):,.3g} s at all of {single}"
        )
    if plan.topology.pipe_size > 1:
        stages, count = plan.topology.pipe_size, plan.micro_batches
        slowest, share = slowest_stage(plan, alternating)
        lines.append(
            f"pipeline bubble: {bubble(plan):.1%} of a step, {stages - 1:,} of {count + stages - 1:,} turns of "
            f"{stages:,} stages and {count:,} micro-batches; stage {slowest} has {share:.2f} of an even share"
        )
    return lines


def _communication(plan: RunPlan, alternating: bool, reference: Shape | None) -> list[str]:
    """What the busiest rank of each group sends in a step, and for how long."""
    stages = range(plan.topology.pipe_size)
    traffic = [stage_traffic(plan, alternating, reference, stage) for stage in stages]
    rows = []
    for group in (TENSOR, PIPELINE, DATA):
        of_group = [[each for each in of_stage if each.group == group] for of_stage in traffic]
        busiest = max(of_group, key=_sent)
        if not _sent(busiest):
            continue
        link, sizes = link_of(plan, group), {TENSOR: plan.topology.tensor_size, DATA: plan.topology.data_size}
        rows.append(
            [
                group,
                f"{sizes.get(group, plan.topology.pipe_size):,}",
                f"{_sent(busiest) / 1e9:,.3f}",
                link.name,
                f"{link.bandwidth / 1e9:,.0f}",
                f"{sum(each.seconds(link.bandwidth) for each in busiest):,.3f}",
                ", ".join(f"{each.operation} {each.payload / 1e9:,.3f}" for each in busiest),
            ]
        )
    if not rows:
        return []
    what = "a step" if plan.config.data.phase in TRAINING else "a batch"
    header = ["group", "ranks", "GB sent", "link", "GB/s", "seconds", "GB of operations"]
    return [
        f"communication of the busiest rank in {what}, if nothing overlaps:",
        *_indented(table_lines(header, rows, COLUMNS - 2)),
    ]


def _sent(traffic: Iterable[Traffic]) -> float:
    return sum(each.sent for each in traffic)


def _indented(lines: Iterable[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _gib(count: float) -> str:
    return f"{count / 2**30:,.2f} GiB"


def _duration(seconds: float) -> str:
    """Days, hours, minutes or seconds."""
    for unit, name in ((86_400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:,.3f} seconds"
