"""Weights & Biases as a sink. The package wandb is optional and is imported only with --wandb-project."""

from __future__ import annotations

import importlib
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_doremi.config import Config
from megatron_doremi.errors import ConfigError, Fault
from megatron_doremi.phases.charts import scalars
from megatron_doremi.phases.sinks import Sink
from megatron_doremi.storage.files import atomic_write_text


class WeightsAndBiases(Sink):
    """A run of Weights & Biases, named by the groups of charts.py; the step is the iteration.

    A resumed run continues the same W&B run, whose id is kept in SAVE/wandb_run_id. W&B ignores steps that it has
    already seen: a run repeats those after its last checkpoint, with equal numbers.
    """

    subject = "Weights & Biases"

    def __init__(self, config: Config):
        """Starts or continues the W&B run.

        Raises:
            ConfigError: W&B refuses, such as without a login.
            OSError: the id cannot be written.
        """
        wandb: Any = importlib.import_module("wandb")
        self.errors = (OSError, wandb.errors.Error)
        save = Path(config.run.save)
        path = save / "wandb_run_id"
        known = path.read_text().strip() if path.exists() else ""
        run_id = known or secrets.token_hex(4)
        if not known:
            atomic_write_text(path, f"{run_id}\n")
        try:
            self._run = wandb.init(
                project=config.run.wandb_project,
                id=run_id,
                name=save.resolve().name,
                group=config.data.phase,
                config=config.to_dict(),
                dir=str(save),
                resume="allow",
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.errors.Error as error:
            remedy = "run `wandb login`, or set WANDB_MODE=offline and run `wandb sync` later"
            raise ConfigError(Fault("--wandb-project", str(error), "W&B accepts the run", remedy)) from error
        self._next_step = self._run.step

    def write(self, entry: Mapping[str, Any]) -> None:
        if entry["iteration"] >= self._next_step:
            self._run.log(dict(scalars(entry)), step=entry["iteration"])

    def close(self) -> None:
        self._run.finish()
