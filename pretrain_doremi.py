"""Trains and evaluates GPTs on a mixture of domains that DoReMi learns.

Phases: reference, score (records the reference's token losses), proxy (learns the domain weights), main, evaluate.

    python pretrain_doremi.py --nproc-per-node 2 --phase proxy --domains data/domains.json ...

Other launchers: torchrun, srun (one task per rank), deepspeed, mpirun. Without a launcher and without --nproc-per-node
the run has one process. `--help` lists the flags.

Exit codes: 0: done. 2: the input is wrong; one message reports all faults. 3: stopped by a signal or a time limit after
saving; run the same command again to resume. 128 + N: terminated by a second signal N. Any other: an error of the
program or of the machine.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_doremi import __version__
from megatron_doremi.cluster.signals import EXIT_STOPPED, Signals
from megatron_doremi.console import say
from megatron_doremi.errors import (
    EXIT_USER_ERROR,
    ConfigError,
    Fault,
    ReportedElsewhere,
    RunError,
    machine_failure,
    run_or_exit,
)
from megatron_doremi.progress import stage

if TYPE_CHECKING:
    import torch

    from megatron_doremi.cluster.control import RunControl
    from megatron_doremi.cluster.launch import Launch
    from megatron_doremi.cluster.rendezvous import Rendezvous
    from megatron_doremi.cluster.run_lock import HeldLock
    from megatron_doremi.cluster.watchdog import Watchdog
    from megatron_doremi.config import Config
    from megatron_doremi.parallel.context import ParallelContext
    from megatron_doremi.parallel.topology import Topology
    from megatron_doremi.phases.inputs import Inputs
    from megatron_doremi.phases.train import Trainer

# DeepSpeed's log of its own start-up does not concern the user.
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
# From the end of the run to the end of the process, even if a library hangs at exit.
_SECONDS_TO_EXIT = 25.0


def main() -> int:
    """Reads the flags, joins the other ranks and runs the phase."""
    # First of all: a signal may arrive at any time.
    signals = Signals(os.environ)
    signals.install()
    signals.seconds_to_exit = _SECONDS_TO_EXIT
    code = start(sys.argv[1:], signals)
    signals.finish(code)
    return code


def start(argv: Sequence[str], signals: Signals) -> int:
    """Reads the flags and runs the phase; returns the exit code. The errors of all ranks become one message."""
    from megatron_doremi.arguments import read_command_line
    from megatron_doremi.cluster.error_report import command_line_error, error_without_peers, merged_error
    from megatron_doremi.cluster.launch import NO_LAUNCHER, Launch, find_launch, launcher_of
    from megatron_doremi.cluster.local_launch import launch_ranks, without_flag
    from megatron_doremi.config import data_parallel_size, planned_world_size
    from megatron_doremi.parallel.topology import Topology
    from megatron_doremi.phases.early_checks import file_faults

    try:
        launch, launch_faults = find_launch(os.environ)
        config, faults = read_command_line(argv, launch.world_size if launch else None)
        run_config = config.run
        if run_config.dry_run:
            # No rank meets another; with --dry-run-world-size the environment counts for nothing.
            known = launch or (Launch() if run_config.dry_run_world_size else None)
            launch, launch_faults = known, [] if known else launch_faults
        elif run_config.nproc_per_node and launcher_of(os.environ) != NO_LAUNCHER:
            value = f"{run_config.nproc_per_node} under {launcher_of(os.environ)}"
            faults.append(Fault("--nproc-per-node", value, "one launcher", "leave it out, or start with plain python"))
        faults = [*launch_faults, *faults]
        if faults:
            faults += file_faults(config)
            if launch is None or launch_faults:
                raise ConfigError(faults)
            if run_config.dry_run and launch.rank:
                raise ReportedElsewhere(EXIT_USER_ERROR)
            raise command_line_error(launch, argv, faults)
        assert launch is not None
        world_size = planned_world_size(run_config, launch.world_size)
        topology = Topology(
            pipe_size=config.parallel.pipeline_model_parallel_size,
            data_size=data_parallel_size(config.parallel, world_size),
            tensor_size=config.parallel.tensor_model_parallel_size,
            rank=launch.rank if launch.rank < world_size else 0,
        )
        if run_config.dry_run:
            dry_run(config, topology)
            return 0
        if run_config.nproc_per_node:
            program = [sys.executable, *sys.orig_argv[1 : len(sys.orig_argv) - len(argv)]]
            command = [*program, *without_flag(argv, "--nproc-per-node")]
            return launch_ranks(command, world_size, os.environ, signals)
        rendezvous = join_rendezvous(config, launch, argv)
    except (ConfigError, RunError) as error:
        raise error_without_peers(error, os.environ) from error
    try:
        return run(config, topology, launch, signals, rendezvous)
    except (ConfigError, RunError, OSError) as error:
        raise merged_error(rendezvous, machine_failure(error) if isinstance(error, OSError) else error) from error


def join_rendezvous(config: Config, launch: Launch, argv: Sequence[str] | None) -> Rendezvous:
    """Meets the other ranks at their store."""
    # Imported after the flags are checked: torch and DeepSpeed take seconds, and a wrong flag is reported immediately.
    warnings.filterwarnings("ignore", category=FutureWarning)
    with stage("importing PyTorch and DeepSpeed", launch.rank == 0):
        import torch

        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        from megatron_doremi.cluster import process_group  # noqa: F401
        from megatron_doremi.cluster.rendezvous import Rendezvous
    with stage(f"waiting for {launch.world_size:,} ranks", launch.rank == 0):
        return Rendezvous(launch, config.run.distributed_timeout_minutes, argv)


def run(
    config: Config,
    topology: Topology,
    launch: Launch,
    signals: Signals | None = None,
    rendezvous: Rendezvous | None = None,
) -> int:
    """Runs the phase: files are checked on every rank before any model is built. Returns the exit code.

    Args:
        signals: created here if None.
        rendezvous: of all ranks; created here if None.
    """
    if signals is None:
        signals = Signals(os.environ)
        signals.install()
    rendezvous = rendezvous or join_rendezvous(config, launch, None)
    import deepspeed.comm
    import torch.distributed as dist

    from megatron_doremi.cluster.watchdog import Watchdog

    with Watchdog(rendezvous, 60.0 * config.run.distributed_timeout_minutes) as watchdog, ExitStack() as held:
        signals.before_exit = watchdog.announce_exit
        stopped = run_phase(config, topology, rendezvous, signals, watchdog, held)
        dist.barrier()
        signals.finish(EXIT_STOPPED if stopped else 0)
    # DeepSpeed forgets the groups too; another run in this process has its own.
    deepspeed.comm.destroy_process_group()
    return EXIT_STOPPED if stopped else 0


def run_phase(
    config: Config, topology: Topology, rendezvous: Rendezvous, signals: Signals, watchdog: Watchdog, held: ExitStack
) -> bool:
    """Opens the files, joins the process group and runs the phase. Returns whether it was stopped early.

    Args:
        held: holds the lock of the run's folder, and releases it when closed.
    """
    from megatron_doremi.cluster.compiler import compiler_faults
    from megatron_doremi.cluster.control import RunControl
    from megatron_doremi.cluster.error_report import raise_faults_of_all_ranks
    from megatron_doremi.cluster.preemption import StopRequest
    from megatron_doremi.cluster.process_group import any_rank, device_faults, join_group
    from megatron_doremi.cluster.run_lock import run_lock
    from megatron_doremi.data.manifest import print_warnings
    from megatron_doremi.parallel.context import make_context
    from megatron_doremi.parallel.exchange import from_rank_0
    from megatron_doremi.phases.evaluate import evaluate_run
    from megatron_doremi.phases.identity import check_ranks_start_alike
    from megatron_doremi.phases.inputs import fitted, least_device_memory, open_inputs, start_text, what_is_read
    from megatron_doremi.phases.output_checks import check_outputs, removed_if_unused
    from megatron_doremi.phases.score import check_reference_losses, model_hash, reference_hash, score
    from megatron_doremi.settings import EVALUATE, SCORE, TRAINING

    phase, minutes = config.data.phase, config.run.distributed_timeout_minutes
    faults, inputs, stop = [*rendezvous.faults, *device_faults(rendezvous.launch)], None, None
    faults += compiler_faults(os.environ) if config.parallel.compile else []
    try:
        stop = StopRequest(config.run, os.environ, signals)
    except ConfigError as error:
        faults += error.faults
    try:
        with stage(f"opening {config.data.source}", topology.rank == 0):
            inputs = open_inputs(config, topology)
    except ConfigError as error:
        faults += error.faults
    raise_faults_of_all_ranks(rendezvous, faults, 60.0 * minutes)
    assert inputs is not None
    assert stop is not None
    data, control = inputs.data, RunControl(stop, watchdog, rendezvous.store)
    if topology.rank == 0:
        print_warnings(data.manifest)
    with stage("joining the process group", topology.rank == 0):
        device = join_group(rendezvous, minutes)
    check_ranks_start_alike(config, what_is_read(inputs))
    inputs = fitted(inputs, least_device_memory(config))
    context = make_context(topology, device, config.parallel.sequence_parallel)
    model_hashes: tuple[str | None, str | None] = (None, None)
    if phase in TRAINING:
        # If sampling depends on what the mixture learns, the windows are not known yet: reading reports a missing one.
        if inputs.reference_losses is not None and inputs.controller.samples_ahead:
            check_reference_losses(inputs.reference_losses, inputs.plan, rendezvous.store, watchdog)
        initial = None if inputs.initial is None else model_hash(inputs.initial, topology, watchdog)
        model_hashes = reference_hash(inputs.loaded, inputs.reference_losses, topology, watchdog), initial
    # Nothing is written before every input has been checked. Some faults of a model's files show only as it is loaded.
    unused = removed_if_unused(from_rank_0(lambda: check_outputs(config, inputs.controller.learns)))
    computes = prepare_device(inputs, device, held, watchdog)
    started = f"{date.today()}, Megatron-DoReMi {__version__}, {start_text(inputs, *computes)}"
    if phase == EVALUATE:
        assert inputs.loaded is not None
        say_on_rank_0(topology, started)
        with unused:
            evaluate_run(inputs.plan, data, inputs.loaded, context, watchdog)
        return False
    kind = f"shard-{config.doremi.shard}" if phase == SCORE else "run"
    waiting = partial(watchdog.mark, "waiting to see whether another run is alive")
    lock = held.enter_context(run_lock(Path(config.run.save), kind, os.environ, waiting))
    held.enter_context(unused)
    if phase == SCORE:
        assert inputs.loaded is not None
        say_on_rank_0(topology, started)
        if any_rank(signals.begin(), device):
            return True
        return score(inputs.plan, data, inputs.loaded, context, control)
    trainer = make_trainer(inputs, model_hashes, context, control, lock, started)
    # Runs before the lock is released: the checkpoint thread may be publishing.
    held.callback(trainer.checkpoints.close)
    # From now on there is something to save. If any rank received a stop request before, all ranks stop here.
    if any_rank(signals.begin(), device):
        return True
    return trainer.train()


def prepare_device(inputs: Inputs, device: torch.device, held: ExitStack, watchdog: Watchdog) -> tuple[str, str]:
    """Sets the order of attention kernels, and until `held` is closed makes messages of what the device lacks; returns
    what `set_kernels` does."""
    from megatron_doremi.phases.device_errors import readable_device_errors
    from megatron_doremi.phases.inputs import held_reference
    from megatron_doremi.phases.kernels import set_kernels

    plan, alternating = inputs.plan, inputs.controller.before_backward
    held.enter_context(readable_device_errors(plan, alternating, held_reference(inputs), lambda: watchdog.activity))
    return set_kernels(inputs, device, held)


def say_on_rank_0(topology: Topology, text: str) -> None:
    """Prints a message of the run once."""
    if topology.rank == 0:
        say(text)


def make_trainer(
    inputs: Inputs,
    model_hashes: tuple[str | None, str | None],
    context: ParallelContext,
    control: RunControl,
    lock: HeldLock,
    started: str,
) -> Trainer:
    """Cleans up the run's folder, finds the checkpoint to resume from, writes config.json and builds the trainer.

    Args:
        model_hashes: of the weights of the reference and of the model of --init-from; None without one.
        started: what to say once nothing stands in the way of the run.
    """
    from megatron_doremi.checkpoint.publishing import clear_leftovers
    from megatron_doremi.engine.build import make_engine
    from megatron_doremi.mixture.controllers import make_objective
    from megatron_doremi.parallel.exchange import from_rank_0
    from megatron_doremi.phases.identity import run_identity, write_run_config
    from megatron_doremi.phases.resume import resume_point
    from megatron_doremi.phases.train import Trainer
    from megatron_doremi.phases.trained_run import make_reference

    plan = inputs.plan
    identity = run_identity(plan, inputs.data, inputs.controller, *model_hashes)
    # Before the search: this may restore the newest checkpoint.
    from_rank_0(lambda: clear_leftovers(Path(plan.config.run.save)))
    with stage("checking the checkpoint to resume from", context.topology.rank == 0):
        resume = resume_point(plan, identity, inputs.controller, lambda: control.watchdog.mark("reading a checkpoint"))
    with stage("loading the reference", context.topology.rank == 0):
        # Before config.json is written: some faults of a model's files show only now.
        reference = make_reference(plan, inputs.loaded, context)
    overrides = resume.overrides if resume else ()
    from_rank_0(lambda: write_run_config(plan, inputs.data, identity, overrides))
    is_rank_0 = context.topology.rank == 0
    say_on_rank_0(context.topology, started)
    for line in resume.statements if resume and is_rank_0 else ():
        say(line)
    with stage("building the model and its optimizer", is_rank_0):
        loads = resume is not None or inputs.initial is not None
        engine = make_engine(plan, make_objective(plan, inputs.controller, context), context, loads)
    return Trainer(inputs, identity, resume, engine, reference, context, control, lock)


def dry_run(config: Config, topology: Topology) -> None:
    """Prints the run as resolved; touches no other process and writes nothing."""
    # No device is used, and DeepSpeed would say on standard output that it found none.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from megatron_doremi.console import print_stdout
    from megatron_doremi.data.manifest import print_warnings
    from megatron_doremi.errors import raise_if_any
    from megatron_doremi.phases.inputs import device_memory, fitted, open_inputs, plan_text, planned_faults

    with stage(f"opening {config.data.source}", topology.rank == 0):
        inputs = open_inputs(config, topology)
        inputs = fitted(inputs, device_memory(config))
    if topology.rank == 0:
        print_warnings(inputs.data.manifest)
        print(plan_text(inputs))
        if inputs.repeated and not config.run.suggest_layout:
            print_stdout(inputs.repeated)
    raise_if_any(planned_faults(inputs))


def command() -> None:
    """Runs `main` as a program."""
    # The trainer has closed the metrics files and `run` has released the lock: do not wait for a thread that hangs.
    run_or_exit(main, skip_cleanup=True)


if __name__ == "__main__":
    command()
