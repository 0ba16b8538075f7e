"""Trains and evaluates GPTs on domains whose mixture DoReMi learns.

Phases: reference, score (its token losses, recorded), proxy, main, evaluate.

    torchrun --nproc-per-node 2 pretrain_doremi.py --phase proxy --domains data/domains.json ...

Also started by srun (one task a rank), deepspeed, or plain python for one process. `--help` lists the flags.
Exit codes: 0 done; 2 the input is wrong, said in one message; 3 stopped by a signal or a time limit, saved, run again
to go on; any other: a fault of ours or of the machine.
"""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megatron_doremi.arguments import parse_config
from megatron_doremi.config import Config, data_parallel_size
from megatron_doremi.console import say
from megatron_doremi.errors import run_or_exit
from megatron_doremi.parallel.topology import Topology
from megatron_doremi.settings import EVALUATE, SCORE, TRAINING
from megatron_doremi.training.launch import Launch, read_launch
from megatron_doremi.training.stopping import EXIT_STOPPED, StopRequest

# What DeepSpeed notes about itself is not about this program's input.
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")


def main() -> int:
    """Reads the flags, joins the other ranks and runs the phase."""
    launch = read_launch(os.environ)
    config = parse_config(sys.argv[1:], launch.world_size)
    topology = Topology(
        pipe_size=config.parallel.pipeline_model_parallel_size,
        data_size=data_parallel_size(config.parallel, launch.world_size),
        tensor_size=config.parallel.tensor_model_parallel_size,
        rank=launch.rank,
    )
    if config.run.dry_run:
        dry_run(config, topology)
        return 0
    return run(config, topology, launch)


def run(config: Config, topology: Topology, launch: Launch) -> int:
    """Runs the phase: files are checked on every rank before any model is built. Returns the exit code."""
    stop = StopRequest(config.run, os.environ)
    if config.data.phase != EVALUATE:
        stop.install()
    # Imported here, after the flags: torch and DeepSpeed take seconds, and a wrong flag should be said at once.
    warnings.filterwarnings("ignore", category=FutureWarning)
    import torch
    import torch.distributed as dist

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")

    from megatron_doremi.data.manifest import print_warnings
    from megatron_doremi.parallel.exchange import from_rank_0
    from megatron_doremi.parallel.groups import make_groups
    from megatron_doremi.training import setup
    from megatron_doremi.training.build import make_engine
    from megatron_doremi.training.distributed import join
    from megatron_doremi.training.identity import check_ranks_start_alike, run_identity
    from megatron_doremi.training.loop import Trainer
    from megatron_doremi.training.output_checks import check_outputs
    from megatron_doremi.training.repetition import check_repetition
    from megatron_doremi.training.resume import resume_point
    from megatron_doremi.training.run_lock import run_lock
    from megatron_doremi.training.score import check_recorded, open_recorded, reference_hash, score
    from megatron_doremi.training.standalone import evaluate_run
    from megatron_doremi.training.watchdog import Watchdog

    phase = config.data.phase
    data = setup.open_data(config, training=phase != EVALUATE)
    if launch.rank == 0:
        print_warnings(data.manifest)
    repeated = check_repetition(config, data, topology.world_size)
    reference_run = setup.read_reference(config, data) if setup.needs_reference(config) else None
    recorded = None
    if setup.reads_recorded_losses(config):
        recorded = open_recorded(config, data)
    minutes, stopped = config.run.distributed_timeout_minutes, False
    device, signs = join(launch, minutes)
    with Watchdog(signs, launch.rank, launch.world_size, 60.0 * minutes) as watchdog, ExitStack() as held:
        check_ranks_start_alike(config, setup.what_is_read(data, reference_run, recorded))
        groups = make_groups(topology)
        from_rank_0(lambda: check_outputs(config))
        save, waiting = Path(config.run.save), lambda: watchdog.mark("waiting to see whether another run is alive")
        if phase == EVALUATE:
            evaluate_run(config, data, topology, groups, device, watchdog)
        elif phase == SCORE:
            assert reference_run is not None
            held.enter_context(run_lock(save, f"shard-{config.doremi.shard}", os.environ, waiting))
            stopped = score(config, data, reference_run, topology, groups, stop, watchdog, signs)
        else:
            if recorded is not None:
                check_recorded(recorded, config, data, topology, signs, watchdog)
            lock = held.enter_context(run_lock(save, "run", os.environ, waiting))
            gpt = setup.resolve_gpt(config, data)
            reference_sha256 = reference_hash(reference_run, recorded, topology, watchdog)
            identity = run_identity(config, gpt, data, topology.world_size, reference_sha256)
            resume = resume_point(config, identity, data.names, topology)
            own: dict[str, Any] = {"identity": identity, "overrides": list(resume.overrides) if resume else []}
            from_rank_0(lambda: setup.write_run_config(config, gpt, data, topology, **own))
            if topology.rank == 0 and repeated:
                say(repeated)
            engine = make_engine(config, gpt, data.weights, topology, groups, device)
            reference = setup.make_reference(config, reference_run, topology, groups)
            trainer = Trainer(
                config, gpt, data, engine, reference, recorded, own, resume, topology, groups, stop, watchdog, lock
            )
            stopped = trainer.train()
        dist.barrier()
    dist.destroy_process_group()
    return EXIT_STOPPED if stopped else 0


def dry_run(config: Config, topology: Topology) -> None:
    """Prints the resolved configuration and what a rank gets; touches no other process."""
    from megatron_doremi.data.manifest import print_warnings
    from megatron_doremi.training import setup
    from megatron_doremi.training.repetition import check_repetition
    from megatron_doremi.training.score import open_recorded
    from megatron_doremi.training.sizes import describe_run

    data = setup.open_data(config, training=config.data.phase != EVALUATE)
    if topology.rank == 0:
        print_warnings(data.manifest)
    repeated = check_repetition(config, data, topology.world_size)
    loaded = setup.read_reference(config, data) if setup.needs_reference(config) else None
    if config.data.phase == EVALUATE:
        loaded = setup.read_trained(Path(config.run.load), "--load", data, config)
    if setup.reads_recorded_losses(config):
        open_recorded(config, data)
    if topology.rank == 0:
        gpt = setup.resolve_gpt(config, data) if config.data.phase in TRAINING or loaded is None else loaded.gpt
        print(describe_run(config, gpt, topology))
        if repeated:
            say(repeated)


if __name__ == "__main__":
    run_or_exit(main)
