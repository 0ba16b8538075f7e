"""What decides a mixture: the weights under which domains are sampled and under which their losses count.

A `MixtureController` is one method: a static mixture, Group DRO, an online bandit, a fit of loss curves. The training
loop, resuming, metrics and checkpoints go through this protocol and know no method by name; controllers.py chooses
one. A step goes like this, on every rank alike:

    sampling_weights(step)        the loader, before the step's global batch is drawn
    [forward passes]              token_scores(loss, reference) for each micro-batch, on the last pipeline stage only
    observe(stats)                where `before_backward`: all forward passes come before the first backward pass
    loss_weights()                the weights of the domains' mean losses in this step's gradient
    [backward passes, optimizer's step]
    observe(stats)                otherwise
    entries(names)                for the step's metrics line
    evaluates_at(step)            also before the first step, as step 0
    observe_evaluation(losses)    where it does
    state_dict(names), result()   where a checkpoint is due

What a controller is given is equal on all ranks to the last bit, and every rank computes the next weights for itself;
ranks are compared before each checkpoint. A controller may communicate in `observe` and `observe_evaluation`, which
all ranks call in the same order: a fit that differs from machine to machine is made on one rank and broadcast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatron_doremi.storage.formats import Count, Schema

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from megatron_doremi.mixture.statistics import DomainStats


class ControllerState(Schema):
    """A controller's entry of a checkpoint's state.json. Every mapping in it is keyed by domain name.

    Attributes:
        steps: `observe` calls so far: the iteration of the checkpoint.
    """

    steps: Count


class MixtureController:
    """A method that decides the mixture; see above for who calls what. The defaults are those of a mixture that moves
    nothing: a method overrides what it needs.

    Attributes:
        method: for the provenance of what it learns.
        learns: the mixture depends on what training measures. Then `observe` is called at every step, every step has
            a metrics line, `result` is written at every checkpoint and at the end, and the state is kept.
        needs_reference: `token_scores` reads a reference's losses.
        before_backward: the weights of a step's gradient depend on the losses of the same step.
        samples_ahead: the sampling weights of a step depend on its number alone. The loader then asks for them a step
            early, on its own thread.
        state_name: key of the state in state.json, unique to the method.
        state_schema: what that entry holds.
        vanishing_remedy: which flags keep a domain's weight from vanishing.
    """

    method: str = ""
    learns: bool = False
    needs_reference: bool = False
    before_backward: bool = False
    samples_ahead: bool = True
    state_name: str = ""
    state_schema: type[ControllerState] = ControllerState
    vanishing_remedy: str = ""

    def to(self, device: torch.device) -> None:
        """Moves the state to the device on which `observe` finds its statistics; called once, before training."""

    def token_scores(self, loss: Tensor, reference: Tensor | None) -> Tensor | None:
        """What each token adds to its domain's `score`; None: nothing.

        Args:
            loss: [batch, seq] the model's losses in nats, float64.
            reference: [batch, seq] the reference's, where `needs_reference`.
        """
        return None

    def observe(self, stats: DomainStats) -> None:
        """Takes the global batch's statistics and moves the weights."""

    def loss_weights(self) -> Tensor | None:
        """[k] float64 weights of the domains' mean losses; None: the plain mean over the batch's tokens."""
        return None

    def sampling_weights(self, step: int) -> NDArray[np.float64]:
        """[k] sampling weights of a step, sum 1; the first step is 1."""
        raise NotImplementedError

    def evaluates_at(self, step: int) -> bool:
        """Whether the held-out losses after this step are asked for; 0: before the first step."""
        return False

    def observe_evaluation(self, losses: NDArray[np.float64]) -> None:
        """Takes the [k] held-out losses, in nats a token, that `evaluates_at` asked for; NaN where a domain has no
        held-out text."""

    def result(self) -> NDArray[np.float64]:
        """[k] weights that the method has learned so far, sum 1; asked for where it `learns`."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """The method's own settings, for the provenance of its result."""
        return {}

    def identity(self) -> dict[str, Any]:
        """Settings of the method that a run must keep when it resumes, by the names of their flags."""
        return {}

    def entries(self, names: Sequence[str]) -> dict[str, Any]:
        """What the method adds to the metrics line of the step just taken."""
        return {}

    def state_dict(self, names: Sequence[str]) -> dict[str, Any]:
        """The state as JSON, keyed by domain name, `steps` included; asked for where it `learns`."""
        raise NotImplementedError

    def load_state_dict(self, entry: Mapping[str, Any], names: Sequence[str]) -> None:
        """Takes up the state that `state_dict` gave, checked by `state_schema`, for the same domains in any order."""
        raise NotImplementedError
