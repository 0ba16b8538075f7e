"""SAVE/domain_weights.json: the weights that a run's controller has learned so far, with their provenance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_doremi import __version__
from megatron_doremi.console import BestEffortWriter
from megatron_doremi.data.weights_file import save_weights
from megatron_doremi.errors import RunError, machine_failure
from megatron_doremi.parallel.exchange import broadcast_json
from megatron_doremi.phases.identity import Identity, identity_hash
from megatron_doremi.phases.inputs import Inputs


class LearnedWeights:
    """The weights file of a run whose controller learns; rank 0 writes it.

    Attributes:
        path: of the file.
    """

    def __init__(self, inputs: Inputs, identity: Identity, overrides: Sequence[Mapping[str, Any]], rank: int):
        """
        Args:
            identity: of the run.
            overrides: entries of the identity that were changed on purpose, and at which iteration.
        """
        self._plan, self._data, self._controller = inputs.plan, inputs.data, inputs.controller
        self._identity, self._overrides, self._rank = identity, list(overrides), rank
        self.path = Path(inputs.plan.config.run.save) / "domain_weights.json"
        self._guard = BestEffortWriter(str(self.path))

    def update(self, iteration: int) -> None:
        """Rewrites the file after `iteration` steps; a failure is a warning, printed once."""
        if self._rank == 0:
            self._guard(lambda: self._write(iteration))

    def finish(self, iteration: int) -> None:
        """Writes the file at the end of the run; a collective call.

        Raises:
            RunError: on every rank, if the file cannot be written. The last checkpoint is complete by then.
        """
        failure = None
        if self._rank == 0:
            try:
                self._write(iteration)
            except OSError as error:
                failure = str(machine_failure(error))
        failure = broadcast_json(failure)
        if failure is not None:
            raise RunError(
                f"the learned domain weights cannot be written: {failure}; the checkpoint of iteration {iteration} "
                "holds them: make room and run the same command again, which writes them"
            )

    def _write(self, iteration: int) -> None:
        config = self._plan.config
        provenance = {
            "method": self._controller.method,
            "steps": iteration,
            "train_iters": config.data.train_iters,
            **self._controller.settings(),
            "seed": config.data.seed,
            "reference": config.doremi.reference_load if config.doremi.online else config.doremi.reference_losses,
            "identity_sha256": identity_hash(self._identity),
            "overrides": self._overrides,
            "code_version": __version__,
        }
        settled = self._controller.settled()
        if settled is not None:
            provenance["early_stop"] = settled.to_dict(self._plan.names)
        weights = dict(zip(self._plan.names, self._controller.result().tolist(), strict=True))
        save_weights(self.path, weights, self._data.tokenizer_sha256, provenance)
