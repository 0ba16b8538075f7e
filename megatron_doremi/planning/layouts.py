"""The layouts of a run that fit the memory of a device, ranked: what --suggest-layout prints.

The memory (`rank_memory`) leaves out buffers of collectives, what an operation needs while it runs, memory that the
allocator cannot use, and the device's own context (docs/memory.md). A margin stays free for these. The order is that of
the time of a step on the stated machine: arithmetic at the stated utilization, with recomputation and the pipeline's
bubble, and communication that nothing overlaps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_doremi.config import Config
from megatron_doremi.console import command_lines, wrapped_lines
from megatron_doremi.errors import ConfigError, Fault
from megatron_doremi.layout_rules import (
    Split,
    divisors,
    highest_zero_stage,
    no_layout,
    possible_splits,
    remedy_without_sequence,
)
from megatron_doremi.parallel.topology import Topology
from megatron_doremi.plan import RunPlan, make_plan
from megatron_doremi.planning.communication import seconds_to_communicate
from megatron_doremi.planning.compute import flops_per_second, muon_seconds, run_flops_per_token, slowest_stage
from megatron_doremi.planning.describe import table
from megatron_doremi.planning.machine_plan import MARGIN
from megatron_doremi.planning.memory import StageMemory, rank_memory
from megatron_doremi.settings import TRAINING, flag_of
from megatron_doremi.shapes import Shape

# Larger micro-batches make the products of a GPU no faster; they are not suggested.
MAX_MICRO_BATCH_TOKENS = 16_384
# Times that differ by less, as a share, may be told apart by what the plan does not know.
SAME_TIME = 0.03
# Splits listed in the text.
MAX_LISTED = 10
GRANULARITIES = ("none", "selective", "full")


@dataclass(frozen=True)
class Candidate:
    """A layout and what it takes.

    Attributes:
        plan: the run on this layout.
        memory: of the rank that holds most.
        arithmetic: arithmetic and idle time of a step relative to a forward and a backward pass: what is computed
            again, the pipeline's slowest stage and its bubble.
        seconds: of a step, or of scoring a batch, if nothing overlaps.
    """

    plan: RunPlan
    memory: StageMemory
    arithmetic: float
    seconds: float

    @property
    def split(self) -> Split:
        topology = self.plan.topology
        return Split(topology.tensor_size, topology.pipe_size, topology.data_size)

    @property
    def order(self) -> tuple[float, ...]:
        """Smaller is better: the time, as far as the plan knows it, then little tensor parallelism, and so on."""
        parallel = self.plan.config.parallel
        granularity = GRANULARITIES.index(parallel.recompute_granularity)
        micro_batch = self.plan.config.data.micro_batch_size
        zero_stage = parallel.zero_stage
        seconds = round(math.log(self.seconds) / SAME_TIME)
        return (seconds, self.split.tensor, self.split.pipe, zero_stage, granularity, -micro_batch)


@dataclass(frozen=True)
class Suggestion:
    """The ranked layouts of a run.

    Attributes:
        fitting: the best candidate of each split that fits, best first; never empty.
        reasons: for each of them, the variant of the split that would be better but does not fit.
        rejected: lines on splits that do not fit or are not possible.
    """

    fitting: tuple[Candidate, ...]
    reasons: tuple[str, ...]
    rejected: tuple[str, ...]

    @property
    def flags(self) -> tuple[str, ...]:
        """The flags of the best layout."""
        return layout_flags(self.fitting[0].plan.config)


def layout_flags(config: Config) -> tuple[str, ...]:
    """The flags that give a run this layout, those that its phase reads."""
    parallel = config.parallel
    flags = [
        f"--tensor-model-parallel-size {parallel.tensor_model_parallel_size}",
        f"--pipeline-model-parallel-size {parallel.pipeline_model_parallel_size}",
        f"--micro-batch-size {config.data.micro_batch_size}",
    ]
    if config.data.phase in TRAINING:
        flags += [f"--zero-stage {parallel.zero_stage}", f"--recompute-granularity {parallel.recompute_granularity}"]
    if parallel.sequence_parallel:
        flags.append("--sequence-parallel")
    return tuple(flags)


def suggest_layouts(plan: RunPlan, alternating: bool, reference: Shape | None, device_bytes: float) -> Suggestion:
    """Ranks the layouts of the plan's ranks that fit a device.

    Args:
        plan: of any layout of the same number of ranks. Layout settings that the command line gives are kept.
        alternating: all forward passes of a step come before its first backward pass.
        reference: the model that a proxy holds beside its own; None: it holds none.
        device_bytes: memory of the device of each rank.

    Raises:
        ConfigError: nothing fits.
    """
    limit, world_size = (1 - MARGIN) * device_bytes, plan.topology.world_size
    shapes = [plan.shape, *([reference] if reference else [])]
    splits, rejected = possible_splits(plan.config, shapes, world_size)
    if not splits:
        # The model alone has one, or its flags were refused.
        remedy = "give another --global-batch-size, or the recorded losses of the reference: --reference-losses DIR"
        remedy = remedy_without_sequence(plan.config, shapes, world_size) or remedy
        raise ConfigError(no_layout(world_size, rejected, remedy))
    best: list[tuple[Candidate, str]] = []
    smallest: list[Candidate] = []
    for split in splits:
        candidates = sorted(_candidates(plan, split, alternating, reference), key=lambda each: each.order)
        index = next((i for i, each in enumerate(candidates) if each.memory.total <= limit), None)
        if index is not None:
            best.append((candidates[index], _reason(candidates[index], candidates[:index])))
        elif candidates:
            smallest.append(min(candidates, key=lambda each: each.memory.total))
    if not best and not smallest:
        raise ConfigError(_no_stage(plan, rejected))
    if not best:
        raise ConfigError(_nothing_fits(plan, smallest, limit, device_bytes, alternating))
    best.sort(key=lambda pair: pair[0].order)
    too_large = [f"{_sizes(each)}: at least {gib(each)} ({_variant(each)})" for each in smallest]
    fitting, reasons = zip(*best, strict=True)
    return Suggestion(fitting, reasons, (*too_large, *rejected))


def _candidates(plan: RunPlan, split: Split, alternating: bool, reference: Shape | None) -> Iterator[Candidate]:
    """All variants of a split: ZeRO stage, recomputation and micro-batch."""
    config = plan.config
    trains = config.data.phase in TRAINING
    granularity = config.parallel.recompute_granularity
    granularities = GRANULARITIES if trains and "recompute_granularity" not in config.given else (granularity,)
    sequence_parallel = split.tensor > 1 and config.data.seq_length % split.tensor == 0
    topology = Topology(split.pipe, split.data, split.tensor)
    for micro_batch in _micro_batch_sizes(config, split.data):
        for zero_stage in _zero_stages(config, split) if trains else (0,):
            for granularity in granularities:
                parallel = replace(
                    config.parallel,
                    tensor_model_parallel_size=split.tensor,
                    pipeline_model_parallel_size=split.pipe,
                    sequence_parallel=sequence_parallel,
                    zero_stage=zero_stage,
                    recompute_granularity=granularity,
                )
                data = replace(config.data, micro_batch_size=micro_batch)
                resolved = replace(config, parallel=parallel, data=data)
                run = make_plan(resolved, topology, plan.shape, plan.names, plan.window_counts, plan.sampling_weights)
                memory = rank_memory(run, alternating, reference)
                extra = arithmetic(run, alternating)
                # Of the reference nothing is computed again.
                flops = run_flops_per_token(run, reference) + (extra - 1) * run_flops_per_token(run, None)
                computing = run.step_tokens * flops / flops_per_second(run)
                beside = muon_seconds(run) + seconds_to_communicate(run, alternating, reference)
                yield Candidate(run, memory, extra, computing + beside)


def _micro_batch_sizes(config: Config, replicas: int) -> list[int]:
    """The given micro-batch, or without one, those that divide a replica's share of the global batch."""
    data = config.data
    if "micro_batch_size" in config.given or not data.global_batch_size:
        return [data.micro_batch_size]
    share = data.global_batch_size // replicas
    return [size for size in divisors(share) if size == 1 or size * data.seq_length <= MAX_MICRO_BATCH_TOKENS]


def _zero_stages(config: Config, split: Split) -> tuple[int, ...]:
    """The given ZeRO stage; without one, those that shard anything under this precision, pipeline and offload."""
    if "zero_stage" in config.given:
        stages: tuple[int, ...] = (config.parallel.zero_stage,)
    elif config.parallel.cpu_offload:
        stages = (2, 3)
    else:
        least = 1 if config.optimizer.bf16 else 0
        stages = tuple(range(least, 4)) if split.data > 1 else (least,)
    highest = highest_zero_stage(config, split.pipe)
    return tuple(stage for stage in stages if stage <= highest)


def arithmetic(plan: RunPlan, alternating: bool) -> float:
    """Arithmetic and idle time of a step relative to a forward and a backward pass, shared out evenly.

    A pipeline waits for its slowest stage, and P stages idle for P - 1 of M micro-batches (Narayanan et al. 2021,
    section 2.2).
    """
    idle = (plan.topology.pipe_size - 1) / max(1, plan.micro_batches)
    return slowest_stage(plan, alternating)[1] * (1 + idle)


def _reason(chosen: Candidate, earlier: Sequence[Candidate]) -> str:
    """Why a candidate was not taken with less recomputation, a lower ZeRO stage or a larger micro-batch."""
    taken = chosen.plan.config.parallel
    settings = [each.plan.config.parallel for each in earlier]
    granularity = GRANULARITIES.index(taken.recompute_granularity)
    for name, rejected in (
        ("recomputation", [GRANULARITIES.index(each.recompute_granularity) < granularity for each in settings]),
        ("ZeRO", [each.zero_stage < taken.zero_stage for each in settings]),
        ("micro-batch", [True] * len(earlier)),
    ):
        larger = [each for each, is_rejected in zip(earlier, rejected, strict=True) if is_rejected]
        if larger:
            least = min(larger, key=lambda each: each.memory.total)
            parallel = least.plan.config.parallel
            text = {
                "recomputation": f"{parallel.recompute_granularity} recomputation".replace("none", "no"),
                "ZeRO": f"ZeRO {parallel.zero_stage}",
                "micro-batch": f"micro-batch {least.plan.config.data.micro_batch_size}",
            }[name]
            return f"{text}: {gib(least)}"
    return "fits as it is"


def _no_stage(plan: RunPlan, rejected: Sequence[str]) -> Fault:
    """The fault where each possible split has a pipeline, and the command line asks for ZeRO 2 or 3."""
    flags = " and ".join(flag_of(name) for name in ("zero_stage", "cpu_offload") if name in plan.config.given)
    value = f"no layout of {plan.topology.world_size:,} ranks with {flags}"
    rule = "; ".join(["one pipeline stage with ZeRO 2 and 3", *rejected])
    return Fault("--suggest-layout", value, rule, f"leave {flags} out, or give another --global-batch-size")


def _nothing_fits(
    plan: RunPlan, smallest: list[Candidate], limit: float, device_bytes: float, alternating: bool
) -> Fault:
    parallel, data = plan.config.parallel, plan.config.data
    ranks = plan.topology.world_size
    where = f"each of {ranks:,} ranks" if ranks > 1 else "one rank"
    rule = f"at most {limit / 2**30:.1f} of {device_bytes / 2**30:.1f} GiB on {where}"
    remedies = ["more ranks", "devices with more memory", "a smaller model or vocabulary"]
    least = min(smallest, key=lambda each: each.memory.total)
    memory = least.memory
    if memory.activations > memory.state:
        remedies.insert(0, "a shorter --seq-length")
        if alternating and data.global_batch_size:
            remedies.insert(0, "a smaller --global-batch-size or --doremi-update simultaneous")
    elif data.phase in TRAINING and not parallel.cpu_offload and plan.topology.data_size > 1:
        remedies.insert(0, "--cpu-offload")
    value = f"nothing fits; the smallest, {_sizes(least)} ({_variant(least)}), takes {gib(least)}"
    return Fault("--suggest-layout", value, rule, "give " + ", or ".join(remedies))


def _sizes(candidate: Candidate) -> str:
    split = candidate.split
    return f"tensor {split.tensor} x pipeline {split.pipe} x data {split.data}"


def _variant(candidate: Candidate) -> str:
    config = candidate.plan.config
    text = f"micro-batch {config.data.micro_batch_size}"
    if config.data.phase in TRAINING:
        granularity = config.parallel.recompute_granularity
        return f"ZeRO {config.parallel.zero_stage}, {granularity} recomputation, {text}".replace("none", "no")
    return text


def gib(candidate: Candidate) -> str:
    """A candidate's memory as text."""
    return f"{candidate.memory.total / 2**30:.1f} GiB"


def suggestion_text(suggestion: Suggestion, device_bytes: float) -> str:
    """What --suggest-layout prints. It ends with the flags of the best layout, on lines that a shell continues."""
    shown, limit = suggestion.fitting[:MAX_LISTED], (1 - MARGIN) * device_bytes / 2**30
    plans = [candidate.plan for candidate in shown]
    world_size, planning = plans[0].topology.world_size, plans[0].config.planning
    muon = ", and Muon's at the float32 peak" if muon_seconds(plans[0]) else ""
    columns = {
        "layout": [_sizes(candidate) for candidate in shown],
        "micro-batch": [str(plan.config.data.micro_batch_size) for plan in plans],
        "GiB": [f"{candidate.memory.total / 2**30:.1f}" for candidate in shown],
        "seconds": [f"{candidate.seconds:,.3g}" for candidate in shown],
        "arithmetic": [f"{candidate.arithmetic:.2f}" for candidate in shown],
    }
    if plans[0].config.data.phase in TRAINING:
        parallel = [plan.config.parallel for plan in plans]
        columns["ZeRO"] = [str(each.zero_stage) for each in parallel]
        columns["recompute"] = [each.recompute_granularity for each in parallel]
    reasons = ["  instead of", *(f"  {reason}" for reason in suggestion.reasons)]
    left = len(suggestion.fitting) - len(shown)
    return wrapped_lines(
        "\n".join(
            [
                f"layouts of {world_size:,} rank{'s' if world_size > 1 else ''}, best first; at most {limit:.1f} of "
                f"{device_bytes / 2**30:.1f} GiB per rank are planned, {MARGIN:.0%} is left for what is not estimated",
                "(buffers of collectives, operations at work, what the allocator cannot use, the device's context).",
                f"Seconds: a step's arithmetic at {planning.dry_run_mfu:.0%} of {planning.dry_run_device}'s peak and "
                f"communication that nothing overlaps{muon} (docs/planning.md).",
                "Arithmetic: recomputation, the slowest stage and the bubble, relative to none. Within 3 % of the "
                "seconds the simplest layout comes first. GiB: logits by chunks of 1,024 tokens unless "
                "--loss-chunk-tokens is given; a run with room holds more of them.",
                *(row + reason for row, reason in zip(table(columns), reasons, strict=False)),
                *([f"  and {left:,} more that fit"] if left else []),
                *(["rejected:", *(f"  {line}" for line in suggestion.rejected)] if suggestion.rejected else []),
                f"flags of the best layout ({_sizes(shown[0])}):",
                *command_lines(suggestion.flags),
            ]
        )
    )
