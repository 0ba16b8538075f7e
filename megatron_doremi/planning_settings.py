"""The settings of the machine that a dry run plans for. Part of config.py, which re-exports them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron_doremi.devices import PEAK_TFLOPS
from megatron_doremi.settings import NO_EVALUATION, Bounds, setting

_RATE = Bounds(0.0, 1e6, above_low=True)


@dataclass(frozen=True)
class PlanningConfig:
    """The machine that --dry-run counts time on."""

    default_phases: ClassVar[tuple[str, ...]] = NO_EVALUATION

    dry_run_device: str = setting(
        "H100",
        "GPU of each rank, for the time that --dry-run states: its dense peak, of float32 or with --bf16 bfloat16",
        tuple(PEAK_TFLOPS),
    )
    dry_run_mfu: float = setting(
        0.4,
        "share of that peak: of a plan, what the whole step reaches, bubble and communication included (model FLOPs "
        "utilization); of a suggestion, what arithmetic reaches",
        bounds=Bounds(0.0, 1.0, above_low=True),
    )
    dry_run_gpus_per_node: int = setting(8, "GPUs of a machine that --dry-run plans for", bounds=Bounds(1, 1 << 20))
    dry_run_node_bandwidth: float = setting(
        450.0, "GB/s that a GPU sends to others in its machine, at the same time as it receives", bounds=_RATE
    )
    dry_run_network_bandwidth: float = setting(
        50.0, "GB/s that a GPU sends to other machines, at the same time as it receives", bounds=_RATE
    )
