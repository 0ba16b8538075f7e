"""The settings of the optimizer and its learning rate. Part of config.py, which re-exports them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from megatron_doremi.settings import DECAY, PHASES, POSITIVE_RATE, RATE, SHARE, STEPS, TRAINING, setting


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and the learning rate schedule."""

    default_phases: ClassVar[tuple[str, ...]] = TRAINING

    optimizer: str = setting(
        "adam",
        "AdamW; or Muon for the matrices of the blocks and AdamW for all else, with ZeRO 0 or 1",
        ("adam", "muon"),
    )
    muon_momentum: float = setting(0.95, "decay rate of Muon's momentum", bounds=DECAY)
    lr: float = setting(1e-3, "peak learning rate", bounds=POSITIVE_RATE)
    min_lr: float = setting(1e-4, "learning rate at the end of the decay; a constant rate has none", bounds=RATE)
    lr_decay_style: str = setting(
        "exponential", "shape of the learning rate's decay", ("constant", "linear", "cosine", "exponential", "WSD")
    )
    lr_warmup_fraction: float = setting(0.06, "fraction of the run with linear warmup", bounds=SHARE)
    lr_warmup_iters: int = setting(
        0, "steps of linear warmup; overrides --lr-warmup-fraction (0: not given)", bounds=STEPS
    )
    lr_wsd_decay_fraction: float = setting(
        0.1,
        "WSD (warmup, stable, decay): fraction of the run, at its end, in which the learning rate decays",
        bounds=SHARE,
    )
    lr_wsd_decay_iters: int = setting(
        0, "WSD: steps of that decay; overrides --lr-wsd-decay-fraction (0: not given)", bounds=STEPS
    )
    weight_decay: float = setting(
        0.01, "decoupled weight decay of matrices (biases and norms do not decay)", bounds=RATE
    )
    adam_beta1: float = setting(0.9, "decay rate of the first moment", bounds=DECAY)
    adam_beta2: float = setting(0.95, "decay rate of the second moment", bounds=DECAY)
    adam_eps: float = setting(1e-8, "added to the square root of the second moment", bounds=POSITIVE_RATE)
    clip_grad: float = setting(1.0, "clip the global gradient norm to this; 0: never", bounds=RATE)
    bf16: bool = setting(False, "bfloat16 weights and activations, float32 master weights and gradients", phases=PHASES)

    def warmup_steps(self, train_iters: int) -> int:
        """Steps of linear warmup of a run of `train_iters` steps."""
        return self.lr_warmup_iters or round(self.lr_warmup_fraction * train_iters)


# The settings that, with the number of steps, decide what the optimizer does. bf16 is the run's precision.
OPTIMIZER_NAMES = tuple(field.name for field in dataclasses.fields(OptimizerConfig) if field.name != "bf16")
