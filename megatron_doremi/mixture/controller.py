"""Controllers decide the mixture: the weights by which domains are sampled and by which their losses are weighted.

A `MixtureController` is one method: a static mixture, Group DRO, an online bandit, a fit of loss curves. The training
loop, resuming, metrics and checkpoints use this protocol and know no method by name; controllers.py selects the
method. The calls of one step, the same on every rank:

    sampling_weights(step)        by the loader, before it draws the step's global batch
    [forward passes]              token_scores(loss, reference) for each micro-batch, on the last pipeline stage only
    observe(stats)                if `before_backward`: all forward passes precede the first backward pass
    loss_weights()                the weights of the domains' mean losses in this step's gradient
    [backward passes, optimizer step]
    observe(stats)                if not `before_backward`
    entries(names)                for the step's metrics line
    evaluates_at(step)            also before the first step, as step 0
    observe_evaluation(losses)    if `evaluates_at` is true
    settled()                     whether the run ends after this step
    state_dict(names), result()   when a checkpoint is saved

A controller's inputs are bit-identical on all ranks, and every rank computes the next weights itself; the ranks are
compared before each checkpoint. A controller may communicate in `observe` and `observe_evaluation`, which all ranks
call in the same order: a fit that may differ between machines is computed on one rank and broadcast.
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

    from megatron_doremi.mixture.early_stop import FinalMean
    from megatron_doremi.mixture.statistics import DomainStats


class ControllerState(Schema):
    """A controller's entry of a checkpoint's state.json. Every mapping in it is keyed by domain name.

    Attributes:
        steps: number of `observe` calls, which is the iteration of the checkpoint.
    """

    steps: Count


class MixtureController:
    """A method that decides the mixture; the module's docstring lists the calls. The defaults are those of a mixture
    that never changes; a method overrides what it needs.

    Attributes:
        method: name of the method, for the provenance of the learned weights.
        learns: the mixture depends on losses measured in training. `observe` is then called at every step, every step
            has a metrics line, `result` is written at every checkpoint and at the end of the run, and checkpoints hold
            the state.
        needs_reference: `token_scores` reads a reference's losses.
        needs_held_out: `observe_evaluation` reads the held-out loss of every domain; a run is refused if one has none.
        before_backward: the weights of a step's gradient depend on the losses of the same step.
        samples_ahead: the sampling weights of a step depend on its number alone. The loader then calls
            `sampling_weights` a step early, on its own thread.
        state_name: key of the state in state.json, unique to the method.
        state_schema: schema of the state in state.json.
        stop_rule: when the method ends a run before its last step, as a line for people; "": never.
        vanishing_remedy: which flags keep a domain's weight from vanishing, for a warning.
    """

    method: str = ""
    learns: bool = False
    needs_reference: bool = False
    needs_held_out: bool = False
    before_backward: bool = False
    samples_ahead: bool = True
    state_name: str = ""
    state_schema: type[ControllerState] = ControllerState
    stop_rule: str = ""
    vanishing_remedy: str = ""

    def to(self, device: torch.device) -> None:
        """Moves the state to the device of the statistics passed to `observe`; called once, before training."""

    def token_scores(self, loss: Tensor, reference: Tensor | None) -> Tensor | None:
        """[batch, seq] scores of the tokens, summed into `DomainStats.score`; None: all scores are 0.

        Args:
            loss: [batch, seq] the model's token losses in nats, float64.
            reference: [batch, seq] the reference's token losses in nats, if `needs_reference`.
        """
        return None

    def observe(self, stats: DomainStats) -> None:
        """Updates the weights from the statistics of the global batch."""

    def loss_weights(self) -> Tensor | None:
        """[k] float64 weights of the domains' mean losses; None: the loss is the mean over the batch's tokens."""
        return None

    def sampling_weights(self, step: int) -> NDArray[np.float64]:
        """[k] float64 sampling weights of a step, sum 1; the first step is 1."""
        raise NotImplementedError

    def evaluates_at(self, step: int) -> bool:
        """Whether the method, which `needs_held_out`, reads the losses after this step; 0: before the first step."""
        return False

    def observe_evaluation(self, losses: NDArray[np.float64]) -> None:
        """Updates the method from the held-out losses that `evaluates_at` asked for.

        Args:
            losses: [k] nats per token.
        """

    def result(self) -> NDArray[np.float64]:
        """[k] weights that the method has learned so far, sum 1; called only if it `learns`."""
        raise NotImplementedError

    def settled(self) -> FinalMean | None:
        """The result of all planned steps, if it is known well enough after the last step to end the run there; equal
        on all ranks. `result` then returns its mean."""
        return None

    def settings(self) -> dict[str, Any]:
        """The method's settings, for the provenance of the learned weights."""
        return {}

    def identity(self) -> dict[str, Any]:
        """Settings of the method that must not change when a run resumes, by the names of their flags."""
        return {}

    def entries(self, names: Sequence[str]) -> dict[str, Any]:
        """The method's entries in the metrics line of the last step."""
        return {}

    def state_dict(self, names: Sequence[str]) -> dict[str, Any]:
        """The state as JSON, keyed by domain name, including `steps`; called only if it `learns`."""
        raise NotImplementedError

    def load_state_dict(self, state: Mapping[str, Any], names: Sequence[str]) -> None:
        """Restores the state that `state_dict` returned, checked by `state_schema`; `names` may be in another order."""
        raise NotImplementedError

    def resume_notes(self, state: Mapping[str, Any]) -> list[str]:
        """What the user is told when a run resumes from `state`: settings that may change, and have."""
        return []
