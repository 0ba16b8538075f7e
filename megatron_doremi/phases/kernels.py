"""The attention kernel of a run's models, set and told at its start."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from megatron_doremi.cluster.process_group import device_name
from megatron_doremi.console import warn
from megatron_doremi.model.attention import (
    CHECKS,
    FLASH,
    AttentionShape,
    Check,
    choose_kernel,
    in_order,
    kernel_order,
    takes_documents,
)
from megatron_doremi.phases.inputs import Inputs, held_reference
from megatron_doremi.plan import RunPlan
from megatron_doremi.settings import TRAINING
from megatron_doremi.shapes import GPTConfig, Shape


class KernelReport(NamedTuple):
    """What a run says of its attention: a line, "" if there is none to tell, and warnings."""

    line: str
    warnings: tuple[str, ...]


def attention_shape(plan: RunPlan, gpt: GPTConfig, trains: bool) -> AttentionShape:
    """The attention of a model on a rank of the run."""
    batch, seq = plan.batch_shape
    heads, groups = (count // plan.topology.tensor_size for count in (gpt.num_attention_heads, gpt.num_query_groups))
    return AttentionShape(batch, seq, heads, groups, gpt.kv_channels, plan.dtype, gpt.reset_attention_mask, trains)


def kernel_report(
    plan: RunPlan,
    reference: Shape | None,
    order: Sequence[str],
    device: torch.device,
    checks: Mapping[str, Check] = CHECKS,
) -> KernelReport:
    """The kernels that torch will take for the run's models, of those that this program computes.

    Args:
        reference: the model that a proxy holds beside its own.
        order: of preference.
        checks: torch's, by kernel.
    """
    parts, warnings = [], list[str]()
    trains = plan.config.data.phase in TRAINING
    for subject, shape, trained in (("", plan.shape, trains), ("the reference's ", reference, False)):
        if not isinstance(shape, GPTConfig):
            continue
        attention = attention_shape(plan, shape, trained)
        # A reference drops nothing.
        drops = trained and plan.config.training.attention_dropout > 0.0
        if attention.masked and not drops and takes_documents(attention, device, checks):
            parts.append(f"{subject}{FLASH}, document by document")
            continue
        choice = choose_kernel(attention, order, device, checks)
        parts.append(f"{subject}{choice.name}")
        if choice.warning:
            warnings.append(subject + choice.warning)
    if not parts:
        return KernelReport("", ())
    line = f"attention kernel: {', '.join(parts)}"
    if trains and plan.config.training.attention_dropout:
        line += "; plain operations in training, for --attention-dropout"
    return KernelReport(line, tuple(dict.fromkeys(warnings)))


def set_kernels(inputs: Inputs, device: torch.device, held: contextlib.ExitStack) -> tuple[str, str]:
    """Sets the order of preference until `held` is closed, and prints warnings on rank 0.

    Returns:
        for the run's start what a rank computes on, and a line on its kernels; "" on a CPU, where torch has one fast
        kernel and nothing is set.
    """
    if device.type != "cuda":
        return device_name(device), ""
    order = kernel_order(torch.cuda.get_device_capability(device), torch.backends.cudnn.version())
    held.enter_context(in_order(order))
    line, warnings = kernel_report(inputs.plan, held_reference(inputs), order, device)
    for warning in warnings if inputs.plan.topology.rank == 0 else ():
        warn(warning)
    return device_name(device), line
