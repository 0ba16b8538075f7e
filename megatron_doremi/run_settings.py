"""The settings of a run's results, stops and plan. Part of config.py, which re-exports them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import ClassVar

from megatron_doremi.settings import (
    EVALUATE,
    MINUTES,
    NO_EVALUATION,
    PHASES,
    RANKS_OR_NONE,
    STEPS,
    TRAINING,
    Bounds,
    setting,
)


@dataclass(frozen=True)
class RunConfig:
    """Where results go, and when the run saves, reports and stops."""

    default_phases: ClassVar[tuple[str, ...]] = TRAINING

    save: str = setting("", "folder for the results: config, metrics, checkpoints, domain weights", phases=PHASES)
    load: str = setting(
        "",
        "resume from this folder's newest complete checkpoint, or start if it has none; evaluate: the run, or "
        "Hugging Face folder, to load. DIR@STEP: branch from the checkpoint of this step into another --save; "
        "evaluate: load this step",
        phases=(*TRAINING, EVALUATE),
    )
    init_from: str = setting(
        "",
        "start a new run from the weights of another model, with a fresh optimizer: a run (DIR, or DIR@STEP), a model "
        "folder or a Hugging Face folder. The model flags may be left out",
    )
    override_resume: tuple[str, ...] = setting(
        (),
        "resume although these entries of the run's identity changed, such as lr or data_content; the change is "
        "printed and recorded in every later checkpoint",
        identifiers=True,
    )
    allow_unfinished: bool = setting(
        False,
        "accept a reference, or learned domain weights, of a run that has not finished all of its steps",
        phases=NO_EVALUATION,
    )
    save_interval: int = setting(
        0, "steps between checkpoints, in addition to those by time and at the end; 0: none", bounds=STEPS
    )
    save_interval_in_mins: float = setting(
        10.0,
        "minutes between checkpoints, in addition to those of --save-interval; such a checkpoint is deleted when a "
        "newer one is complete; 0: none",
        bounds=MINUTES,
    )
    keep_checkpoints: int = setting(0, "number of newest complete checkpoints to keep; 0: all", bounds=STEPS)
    exit_interval: int = setting(
        0, "save and exit (code 0) at every step that is a multiple of this; 0: never", bounds=STEPS
    )
    exit_duration_in_mins: float = setting(
        0.0,
        "save and exit (code 3) this many minutes after the start; 0: never",
        phases=NO_EVALUATION,
        bounds=MINUTES,
    )
    exit_margin_in_mins: float = setting(
        5.0,
        "save and exit (code 3) this many minutes before SLURM_JOB_END_TIME, at most 10 % of the remaining allocation; "
        "0: never",
        phases=NO_EVALUATION,
        bounds=MINUTES,
    )
    distributed_timeout_minutes: float = setting(
        8.0,
        "abort the run when a rank makes no progress for this many minutes, and name the rank",
        phases=PHASES,
        bounds=Bounds(0.0, MINUTES.high, above_low=True),
    )
    check_ranks_interval: int = setting(
        1000,
        "steps between checks that replicated state is equal on all ranks; a difference stops the run; 0: only before "
        "saves",
        bounds=STEPS,
    )
    log_interval: int = setting(
        10,
        "steps between metrics lines on the console (a proxy's metrics.jsonl has every step)",
        bounds=Bounds(1, STEPS.high),
    )
    profile: int = setting(
        0,
        "record this step by torch.profiler, into SAVE/profile/ (Chrome's trace format, gzip); 0: none",
        bounds=STEPS,
    )
    profile_rank: int = setting(0, "the rank whose step --profile records", bounds=RANKS_OR_NONE)
    nproc_per_node: int = setting(
        0,
        "start this many processes on this machine, a rank each, in place of torchrun; 0: this process is a rank",
        phases=PHASES,
        bounds=RANKS_OR_NONE,
    )
    tensorboard_dir: str = setting("", "folder for TensorBoard events (default: SAVE/tensorboard)")
    wandb_project: str = setting(
        "",
        "project of Weights & Biases to log to; needs the package wandb; WANDB_MODE=offline logs without a network",
    )
    dry_run: bool = setting(
        False,
        "print the run as resolved (settings, model, layout, memory by stage, arithmetic, communication, domains) and "
        "exit; nothing is written. Inputs that an earlier stage has yet to write get stand-ins (score, evaluate: give "
        "the model flags), and so do missing data, with --vocab-size",
        phases=PHASES,
    )
    dry_run_world_size: int = setting(
        0,
        "ranks that --dry-run plans for (default: those of --nproc-per-node or of the launcher)",
        phases=PHASES,
        bounds=RANKS_OR_NONE,
    )
    suggest_layout: bool = setting(
        False,
        "with --dry-run: rank the layouts (tensor x pipeline x data, ZeRO, recomputation, micro-batch) that fit a "
        "device, and print the flags of the best one at the end; layout flags that are given are kept",
        phases=NO_EVALUATION,
    )
    device_memory_gib: float = setting(
        0.0,
        "memory of a device in GiB: --dry-run refuses a run that does not fit, --suggest-layout ranks layouts that do "
        "(default: that of the GPU in this machine, unless --dry-run-device names another)",
        phases=NO_EVALUATION,
        bounds=Bounds(0.0, 1e6),
    )

    @property
    def init_folder(self) -> str:
        """The folder of --init-from, without @STEP."""
        return folder_and_step(self.init_from)[0]

    @property
    def init_step(self) -> int | None:
        """STEP of --init-from DIR@STEP; None without it."""
        return folder_and_step(self.init_from)[1]

    @property
    def load_folder(self) -> str:
        """The folder of --load, without @STEP."""
        return folder_and_step(self.load)[0]

    @property
    def load_step(self) -> int | None:
        """STEP of --load DIR@STEP; None without it."""
        return folder_and_step(self.load)[1]


def folder_and_step(target: str) -> tuple[str, int | None]:
    """The folder and the step of DIR@STEP; of a folder alone, or one whose name ends like that, the step is None."""
    match = re.fullmatch(r"(.+)@([0-9]{1,12})", target)
    if match is None or os.path.isdir(target):
        return target, None
    return match.group(1), int(match.group(2))
