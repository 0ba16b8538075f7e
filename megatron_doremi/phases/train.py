"""The training loop: read a global batch, take a step, log it, evaluate, save."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_doremi.checkpoint.reader import load_training, load_weights
from megatron_doremi.checkpoint.writer import Checkpointer, SaveTimer
from megatron_doremi.cluster.control import RunControl
from megatron_doremi.cluster.preemption import KEEP_RUNNING, REASONS
from megatron_doremi.cluster.replica_check import check_replicas
from megatron_doremi.cluster.run_lock import HeldLock
from megatron_doremi.cluster.step_flags import StepFlags, reduce_flags
from megatron_doremi.data.blend import BlendState
from megatron_doremi.data.loader import DeviceCopies, Step, StepReader, steps
from megatron_doremi.engine.engines import TrainingEngine
from megatron_doremi.engine.optimizer import make_learning_rate
from megatron_doremi.engine.step_clock import DATA, REFERENCE
from megatron_doremi.mixture.non_finite import explain_gradient, explain_loss
from megatron_doremi.mixture.reference import OnlineReference, TrainedModel
from megatron_doremi.parallel.context import ParallelContext
from megatron_doremi.phases.closing import end_lines, weights_table
from megatron_doremi.phases.evaluate import evaluate
from megatron_doremi.phases.garbage import GarbageCollection
from megatron_doremi.phases.identity import Identity
from megatron_doremi.phases.inputs import Inputs, held_reference
from megatron_doremi.phases.learned_weights import LearnedWeights
from megatron_doremi.phases.metrics import (
    Meters,
    StepTimer,
    VanishedWeights,
    domain_entries,
)
from megatron_doremi.phases.resume import ResumePoint
from megatron_doremi.phases.run_data import held_out
from megatron_doremi.phases.sinks import RunLog, open_log
from megatron_doremi.phases.step_profile import StepProfile
from megatron_doremi.planning.compute import run_flops_per_token
from megatron_doremi.progress import stage
from megatron_doremi.settings import PROXY

# Steps; a step leaves little cyclic garbage, and no tensor in it (tests/phases/test_garbage.py).
_COLLECTION_INTERVAL = 100


class Trainer:
    """A training run: the engine, the blend, the controller and the checkpoints."""

    def __init__(
        self,
        inputs: Inputs,
        identity: Identity,
        resume: ResumePoint | None,
        engine: TrainingEngine,
        reference: OnlineReference | None,
        context: ParallelContext,
        control: RunControl,
        lock: HeldLock,
    ):
        """
        Args:
            identity: of the run; part of every checkpoint.
            resume: the checkpoint to resume from; None for a new run.
            reference: scores the batches of a run whose reference losses are not recorded; else None.
            lock: lock of the run's folder.
        """
        self.plan, self.config, self.data = inputs.plan, inputs.plan.config, inputs.data
        self.controller, self.engine, self.reference = inputs.controller, engine, reference
        self.context, self.topology = context, context.topology
        models = [engine.module, *([reference.module] if reference is not None else [])]
        self.reader = StepReader(
            self.plan.blend,
            self.data.train,
            self.plan.batch_shape,
            self.topology,
            inputs.reference_losses,
            any(model.every_stage_reads for model in models),
            self.config.training.drops,
            # The same for both: they have one tokenizer.
            next((model.document_eod for model in models if model.document_eod is not None), None),
        )
        self.stop, self.watchdog, self.lock = control.stop, control.watchdog, lock
        self.identity, self.overrides = identity, list(resume.overrides) if resume else []
        self.checkpoints = Checkpointer(
            Path(self.config.run.save),
            self.config.run.keep_checkpoints,
            self.topology,
            lambda: self.watchdog.mark("waiting for a checkpoint to be written"),
            lock.token,
            lock.lost_to,
        )
        # Only rank 0's clock counts; `reduce_flags` tells the other ranks.
        self.save_timer = SaveTimer(self.config.run.save_interval_in_mins if self.topology.rank == 0 else 0.0)
        self.learning_rate = make_learning_rate(self.config.optimizer, self.config.data.train_iters)
        self.meters = Meters(
            self.plan.step_tokens,
            self.plan.step_tokens * run_flops_per_token(self.plan, held_reference(inputs)),
            self.topology.world_size,
            torch.cuda.get_device_name(context.device) if context.device.type == "cuda" else None,
        )
        self.profile = StepProfile(self.config.run, self.topology.rank, context.device)
        self.blend_state = BlendState.start(len(self.plan.names))
        self.iteration = 0
        self.metrics_bytes: int | None = None
        self.learned_weights = LearnedWeights(inputs, identity, self.overrides, self.topology.rank)
        self.vanished = VanishedWeights(self.controller.vanishing_remedy)
        if resume is not None:
            self._resume(resume)
        elif inputs.initial is not None:
            self._start_from(inputs.initial)

    def _resume(self, resume: ResumePoint) -> None:
        def progress() -> None:
            self.watchdog.mark(f"loading {resume.checkpoint.name}")

        with self._stage(f"loading {resume.checkpoint}"):
            load_training(self.engine, resume.checkpoint, self.engine.context, resume.iteration, progress)
        self.iteration, self.blend_state = resume.iteration, resume.blend
        self.metrics_bytes = resume.metrics_bytes
        if resume.controller_state is not None:
            self.controller.load_state_dict(resume.controller_state, self.plan.names)

    def _start_from(self, model: TrainedModel) -> None:
        with self._stage(f"loading {model.path}"):
            mark = partial(self.watchdog.mark, f"loading {model.path}")
            load_weights(self.engine, model.opened_weights(), self.engine.context, mark)

    def train(self) -> bool:
        """Trains to the last iteration, to the exit interval, or until the controller ends the run.

        Returns:
            whether a signal or a time limit stopped the run early, after saving.
        """
        with GarbageCollection(_COLLECTION_INTERVAL) as garbage:
            return self._train(garbage)

    def _train(self, garbage: GarbageCollection) -> bool:
        config, total = self.config, self.config.data.train_iters
        log = open_log(config, self.iteration, self.metrics_bytes, self.lock.lost_to)
        self.profile.note_past(self.iteration)
        if self.iteration == 0 and self.controller.evaluates_at(0):
            self._evaluate(log, for_controller=True)
        timer, stop, start, began = StepTimer(self.iteration), KEEP_RUNNING, self.iteration, time.monotonic()
        self.engine.clock.enter(DATA)
        for step in () if self._ended() else self._steps():
            self.watchdog.mark(f"in iteration {self.iteration + 1}")
            lr = self.learning_rate.at(self.iteration + 1)
            with self.profile.of_step(self.iteration + 1, timer, self.engine.clock, self.watchdog):
                flags = self._take_step(step, lr)
            stop, ended = flags.stop, self._ended()
            self._log_step(lr, timer, log, ended)
            garbage.collect_at(self.iteration)
            with timer.paused():
                leave = self._due(config.run.exit_interval) or stop != KEEP_RUNNING
                regular = self._due(config.run.save_interval) or leave or ended
                saves = regular or (flags.save_due and not flags.writing)
                # A save checks them itself.
                if self._due(config.run.check_ranks_interval) and not saves:
                    self._check_replicas(self._replicated_state())
                for_controller = self.controller.evaluates_at(self.iteration)
                if for_controller or self._due(config.data.eval_interval) or ended:
                    self._evaluate(log, for_controller)
                if flags.write_failed:
                    self.checkpoints.finish()
                if not flags.writing:
                    self.checkpoints.all_written()
                if saves:
                    self._save(log, ephemeral=not regular)
            if leave or ended:
                break
            self.watchdog.mark(f"reading the data of iteration {self.iteration + 1}")
            self.engine.clock.enter(DATA)
        with self._stage("writing the checkpoint"):
            self.checkpoints.finish()
        if self._ended():
            self._finish(log, self.iteration - start, time.monotonic() - began)
        else:
            why = REASONS.get(stop, "--exit-interval")
            again = " again" if config.run.load == config.run.save else f" with --load {config.run.save}"
            log.say(
                f"stopped and saved after iteration {self.iteration:,} of {total:,}: {why}; to resume, run "
                f"the same command{again}"
            )
        log.close()
        return stop != KEEP_RUNNING and not self._ended()

    def _ended(self) -> bool:
        """Whether the run has taken its last step: the last one planned, or the one after which the controller ended
        it. Equal on all ranks."""
        return self.iteration >= self.config.data.train_iters or self.controller.settled() is not None

    def _finish(self, log: RunLog, steps: int, seconds: float) -> None:
        """Writes the learned weights, and says what was done in `steps` steps and `seconds`; a collective call."""
        settled = self.controller.settled()
        for line in end_lines(self.plan, self.iteration, steps, seconds, log.last_loss, settled):
            log.say(line)
        if self.controller.learns:
            self.learned_weights.finish(self.iteration)
            weights = self.controller.result(), self.data.manifest.natural_weights()
            log.say("\n".join(weights_table(self.plan.names, *weights, str(self.learned_weights.path))))

    def _stage(self, doing: str) -> AbstractContextManager[None]:
        return stage(doing, self.topology.rank == 0)

    def _due(self, interval: int) -> bool:
        return interval > 0 and self.iteration % interval == 0

    def _steps(self) -> Iterator[Step]:
        return steps(
            self.reader,
            self.blend_state,
            self.controller.sampling_weights,
            self.controller.samples_ahead,
            self.config.data.train_iters,
            DeviceCopies(self.context.device) if self.context.device.type == "cuda" else None,
        )

    def _take_step(self, step: Step, lr: float) -> StepFlags:
        """Trains on a global batch; a collective call. Raises NonFinite if a loss or the gradient is NaN or Inf."""
        self.engine.set_learning_rate(lr)
        micro_batches = step.micro_batches
        if self.reference is not None:
            self.engine.clock.enter(REFERENCE)
            micro_batches = self.reference.score(micro_batches, self.plan.micro_batches)
        targets = torch.from_numpy(step.targets).to(self.engine.device, torch.float64, non_blocking=True)
        step_flags: list[StepFlags] = []
        batch = (self.engine.objective, micro_batches, self.plan.names, self.iteration + 1)
        model = "proxy" if self.config.data.phase == PROXY else "model"

        def before_step(norm: Tensor | None) -> float | None:
            state = (self.stop.reason(), *self.checkpoints.progress(), self.save_timer.due())
            flags = reduce_flags(self.engine.objective.current.stats.stack(), norm, *state)
            if flags.loss_non_finite or flags.gradient_non_finite:
                # Earlier checkpoints are good, including one that is still being written.
                self.checkpoints.finish()
                raise explain_loss(*batch, model) if flags.loss_non_finite else explain_gradient(*batch)
            step_flags.append(flags)
            return flags.norm

        self.engine.train_step(micro_batches, targets, before_step)
        if not self.engine.was_step_applied():
            # DeepSpeed's optimizers compute the norm within their step; they have skipped it on every rank.
            self.checkpoints.finish()
            raise explain_gradient(*batch)
        self.blend_state = step.state_after
        self.iteration += 1
        return step_flags[0]

    def _log_step(self, lr: float, timer: StepTimer, log: RunLog, ended: bool) -> None:
        """Logs the last step: at the log interval, or at every step if the mixture is learned; a collective call.

        Args:
            ended: it is the run's last step.
        """
        at_log_interval = self._due(self.config.run.log_interval) or ended
        entry = None
        if at_log_interval or self.controller.learns:
            entry = self._entry(lr)
            steps, seconds = timer.lap(self.iteration)
            parts = {part: each / steps for part, each in self.engine.clock.lap().items()}
            entry |= self.meters.entries(seconds, parts, torch.cuda.max_memory_allocated() if self.meters.gpu else 0)
        log.step(entry)
        if entry is None:
            return
        for warning in self.vanished.warnings(self.iteration, entry.get("domain_weights", {})):
            log.say(warning)
        if at_log_interval:
            log.show(entry)

    def _entry(self, lr: float) -> dict[str, Any]:
        """The metrics line of the last step; a collective call."""
        samples, names = self._consumed_samples(), self.plan.names
        return {
            "iteration": self.iteration,
            "consumed_samples": samples,
            "consumed_tokens": samples * self.config.data.seq_length,
            **domain_entries(self.engine.objective.stats(), names),
            "lr": lr,
            "grad_norm": self.engine.grad_norm(),
            **self.controller.entries(names),
        }

    def _evaluate(self, log: RunLog, for_controller: bool) -> None:
        """Records the held-out losses; a collective call.

        Args:
            for_controller: the controller needs them.
        """
        if not any(dataset is not None for dataset in self.data.valid):
            assert not for_controller, "mixture_faults refuses a method that needs_held_out"
            return
        data = self.config.data
        entries = evaluate(
            self.engine.module,
            held_out(self.data, data.seq_length, data.eval_iters * self.plan.global_batch_size),
            data.micro_batch_size,
            self.context,
            f"iteration {self.iteration}",
            lambda: self.watchdog.mark(f"evaluating after iteration {self.iteration}"),
        )
        log.evaluation({"iteration": self.iteration, **entries})
        if for_controller:
            losses = [entries["eval"][name] for name in self.plan.names]
            self.controller.observe_evaluation(np.array(losses))

    def _consumed_samples(self) -> int:
        """Windows read since the run began, at whatever batch sizes."""
        return int(self.blend_state.cursors.sum())

    def _replicated_state(self) -> dict[str, Any]:
        """The state that every rank computes itself, and that must be equal on all ranks."""
        state: dict[str, Any] = {"blend": self.blend_state.to_dict(self.plan.names)}
        if self.controller.learns:
            state[self.controller.state_name] = self.controller.state_dict(self.plan.names)
        return state

    def _check_replicas(self, replicated_state: dict[str, Any]) -> None:
        """Raises ReplicaMismatch if ranks that must be identical are not; a collective call."""
        check_replicas(self.engine.module, replicated_state, self.topology, self.iteration)

    def _save(self, log: RunLog, ephemeral: bool) -> None:
        """Starts a checkpoint; an ephemeral one is deleted when a newer one is complete."""
        self.save_timer.restart()
        self.watchdog.mark(f"saving iteration {self.iteration}")
        replicated_state = self._replicated_state()
        # A resumed run would take one rank's wrong state for all ranks.
        self._check_replicas(replicated_state)
        state = {
            "identity": self.identity,
            "overrides": self.overrides,
            "consumed_samples": self._consumed_samples(),
            **replicated_state,
            **log.checkpoint_state(),
        }
        if ephemeral:
            state["ephemeral"] = True

        def before_publishing() -> None:
            log.make_durable()
            self.lock.check()

        with self._stage(f"saving iteration {self.iteration:,}"):
            self.checkpoints.start(self.engine, self.iteration, state, before_publishing)
        if self.controller.learns:
            self.learned_weights.update(self.iteration)
