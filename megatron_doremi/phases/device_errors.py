"""Errors of the device and of torch.compile as messages to the user."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator

import torch

from megatron_doremi.config import ParallelConfig
from megatron_doremi.errors import RunError
from megatron_doremi.layout_rules import highest_zero_stage
from megatron_doremi.plan import RunPlan
from megatron_doremi.planning.memory import rank_memory
from megatron_doremi.settings import TRAINING
from megatron_doremi.shapes import Shape

# Lines of a compiler's error that say what is wrong.
_LINES = 12


@contextlib.contextmanager
def readable_device_errors(
    plan: RunPlan, alternating: bool, reference: Shape | None, activity: Callable[[], str]
) -> Iterator[None]:
    """Makes a RunError of a GPU's lack of memory, and of what torch.compile raises.

    Args:
        alternating, reference: see `rank_memory`.
        activity: what the rank does, such as "in iteration 1".
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(out_of_memory_text(error, plan, alternating, reference, activity())) from error
    except RuntimeError as error:
        if isinstance(getattr(error, "inner_exception", None), torch.OutOfMemoryError):
            raise RunError(out_of_memory_text(error, plan, alternating, reference, activity())) from error
        if not _is_of_the_compiler(error):
            raise
        raise RunError(compile_text(error, activity())) from error


def _is_of_the_compiler(error: RuntimeError) -> bool:
    # Imported by torch.compile at its first call only, since that takes a second.
    module = sys.modules.get("torch._dynamo.exc")
    return module is not None and isinstance(error, module.TorchDynamoException)


def out_of_memory_text(
    error: RuntimeError, plan: RunPlan, alternating: bool, reference: Shape | None, activity: str
) -> str:
    """What lacked memory, what was planned, and which flags need less."""
    planned = rank_memory(plan, alternating, reference)
    # Without the number of the GPU: ranks that fail alike have one message.
    matches = [
        re.search(pattern, str(error)) for pattern in (r"Tried to allocate [\d.]+ \w+", r"total capacity of [\d.]+ \w+")
    ]
    request = ", ".join(each.group(0) for each in matches if each) or str(error)[:200]
    return (
        f"out of GPU memory, {activity}: {request}\n"
        f"  planned: {planned.total / 2**30:.1f} GiB on the fullest rank (docs/memory.md: what is not counted)\n"
        f"  remedy:  {', or '.join(memory_remedies(plan))}; --dry-run --device-memory-gib N --suggest-layout ranks "
        "layouts that fit\n"
        "  The run's checkpoints are as they were."
    )


def memory_remedies(plan: RunPlan) -> list[str]:
    """Flags of this run that can take less memory, those that cost least first."""
    parallel, windows = plan.config.parallel, plan.batch_shape[0]
    trains = plan.config.data.phase in TRAINING
    remedies = []
    few = ParallelConfig().loss_chunk_tokens
    if not parallel.loss_chunk_tokens or parallel.loss_chunk_tokens > few:
        remedies.append(f"--loss-chunk-tokens {few}")
    if trains and not parallel.zero_stage and plan.topology.data_size > 1:
        remedies.append("--zero-stage 1")
    if windows > 1:
        # A divisor: the global batch remains a multiple of it.
        smaller = max(size for size in range(1, windows) if windows % size == 0)
        remedies.append(f"--micro-batch-size {smaller} instead of {windows}")
    if trains and parallel.recompute_granularity != "full":
        remedies.append("--recompute-granularity full")
    highest = highest_zero_stage(plan.config, plan.topology.pipe_size)
    if trains and 1 <= parallel.zero_stage < highest and plan.topology.data_size > 1:
        remedies.append(f"--zero-stage {parallel.zero_stage + 1}")
    return [*remedies, "more ranks to a model (--tensor-model-parallel-size, --pipeline-model-parallel-size)"]


def compile_text(error: RuntimeError, activity: str) -> str:
    """What torch.compile said, and the remedy."""
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("Set TORCHDYNAMO")]
    return "\n".join(
        [
            f"--compile: torch.compile failed, {activity}:",
            *(f"  {line}" for line in lines[:_LINES]),
            "  remedy:  leave --compile out: the same losses to rounding, in longer steps",
            "  TORCHDYNAMO_VERBOSE=1 shows where it failed",
        ]
    )
