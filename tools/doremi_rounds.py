"""Iterated DoReMi: the weights that a round learns are the sampling weights of the next round's reference, until they
stop moving.

    python tools/doremi_rounds.py --save runs/rounds --domains data/domains.json --model-size 280m --train-iters 20000

Takes the flags of pretrain_doremi.py for a reference and a proxy (pretrain_doremi.py --help) and gives each to the
phases that read it; --domain-weights are those of the first reference. The same command resumes. Rounds end when no
weight moves by more than --min-change or the noise, whichever is larger: with --seeds 2 or more the spread over seeds,
otherwise what the two halves of the difference to the round before show.

Writes SAVE/rounds.json after each round and SAVE/domain_weights.json at the end. With --judge it trains nothing and
judges the rounds that other jobs have run (examples/slurm/rounds.sh).

Exit codes: 0: done, settled or not. 2: the input is wrong. 3: stopped by a signal or a time limit after saving; run the
same command again to resume.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

if not __package__:
    # Run as a script: the package is beside this folder.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_doremi.arguments import build_parser, read_command_line
from megatron_doremi.cluster.launch import NO_LAUNCHER, launcher_of
from megatron_doremi.cluster.local_launch import launch_ranks
from megatron_doremi.cluster.signals import EXIT_STOPPED, Signals
from megatron_doremi.config import Config, DataConfig
from megatron_doremi.console import print_stdout, say, wrapped_lines
from megatron_doremi.data.domain_names import read_domain_names
from megatron_doremi.data.manifest import Manifest, open_manifest
from megatron_doremi.errors import ConfigError, Fault, raise_if_any, run_or_exit
from megatron_doremi.flag_parser import FlagParser, unknown_faults
from megatron_doremi.mixture.static import names_domains, resolve_weights
from megatron_doremi.reporting.rounds import (
    ROUNDS_FILE,
    RoundsEntry,
    concentration_warning,
    round_table,
    verdict_of_round,
)
from megatron_doremi.reporting.tables import excerpt, format_text
from megatron_doremi.rounds.folder import RoundsFolder, StopRule, judge, recorded_rounds, start
from megatron_doremi.rounds.stages import Stage, changed_settings, fixed_settings, stages, taken_faults
from megatron_doremi.settings import PROXY, REFERENCE, SCORE, flag_of

_ROWS = 12
# The entry of the recorded settings that identifies the data, whose files may move.
_DATA = "data_fingerprint"
# Runs one stage on a number of ranks; returns the exit code.
Launcher = Callable[[Stage, int], int]


def main() -> int:
    """Runs or judges the rounds; returns the exit code."""
    signals = Signals(os.environ)
    signals.install()
    options, given = parse(sys.argv[1:])
    folder = RoundsFolder(Path(options.save))
    rule = StopRule(options.min_change, options.max_rounds, options.seeds)
    if options.judge:
        _show(judge(folder, rule))
        return 0

    # Before a plan is made, which sets variables for a process without a device.
    return run_rounds(folder, rule, options, given, launcher(dict(os.environ), signals))


def launcher(environ: dict[str, str], signals: Signals) -> Launcher:
    """Starts the ranks of a stage on this machine, and passes signals on to them."""

    def launch(stage: Stage, ranks: int) -> int:
        if signals.requested_by:
            # Between two stages, when no rank was there to be told.
            return EXIT_STOPPED
        code = launch_ranks([sys.executable, _program(), *stage.argv], ranks, environ, signals)
        # A request that arrives when the last rank has ended is one as well.
        return EXIT_STOPPED if code == 0 and signals.requested_by else code

    return launch


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The tool's own options, and the flags of pretrain_doremi.py by name. Raises ConfigError with all faults."""
    parser = FlagParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--save", default="", metavar="DIR", help="folder of the rounds")
    add("--max-rounds", type=int, default=10, metavar="N", help="rounds at most (default: 10)")
    change_help = "a change of a weight that never counts (default: 0.001, as in the paper)"
    add("--min-change", type=float, default=1e-3, metavar="X", help=change_help)
    seeds_help = "references and proxies of a round, each pair with a seed of its own, from --seed (default: 1)"
    add("--seeds", type=int, default=1, metavar="N", help=seeds_help)
    losses_help = "score each reference once, in place of running it on each batch of its proxy"
    add("--record-losses", action="store_true", help=losses_help)
    add("--judge", action="store_true", help="train nothing: judge the finished rounds in --save")
    add("--nproc-per-node", type=int, default=1, metavar="N", help="processes of a run (default: 1)")
    add("--dry-run", action="store_true", help="print the plan of the first round's runs and exit; write nothing")
    program, faults = build_parser(), list[Fault]()
    try:
        options, rest = parser.parse_known_args(argv)
        known, unknown = program.parse_known_args(rest)
    except argparse.ArgumentError as error:
        raise ConfigError(Fault("command line", str(error), "each flag with its value", "see --help")) from error
    given = vars(known)
    faults += unknown_faults(unknown, [*parser.flags([]), *program.flags([])])
    if not options.save:
        faults.append(Fault("--save", "not given", "the rounds write to a folder", "give --save"))
    for name, least, most in (("max_rounds", 1, 1000), ("seeds", 1, 100), ("nproc_per_node", 1, 1 << 20)):
        value = getattr(options, name)
        if not least <= value <= most:
            flag = flag_of(name)
            faults.append(Fault(flag, str(value), f"from {least} to {most:,}", f"give {flag} a value in that range"))
    if not 0.0 <= options.min_change <= 1.0:
        faults.append(Fault("--min-change", str(options.min_change), "between 0 and 1", "give for example 0.001"))
    if options.judge and given:
        flags = ", ".join(map(flag_of, given))
        faults.append(Fault(flags, "given with --judge", "nothing is trained", "leave it out, or leave out --judge"))
    if options.judge and options.dry_run:
        faults.append(Fault("--dry-run", "given with --judge", "one of the two", "leave one out"))
    if launcher_of(os.environ) != NO_LAUNCHER:
        rule = "one process, which starts the ranks of each run"
        remedy = "start with plain python and --nproc-per-node; for several machines see examples/slurm/rounds.sh"
        faults.append(Fault("launcher", launcher_of(os.environ), rule, remedy))
    raise_if_any([*faults, *taken_faults(given)])
    return options, given


def run_rounds(
    folder: RoundsFolder, rule: StopRule, options: argparse.Namespace, given: dict[str, Any], launch: Launcher
) -> int:
    """Runs rounds until they end; returns the exit code.

    Args:
        given: flags of pretrain_doremi.py by name, as text.
        launch: runs one stage.
    """
    first = list(_stages_of(1, folder, options, given))
    # Of one seed. Scoring has no plan before the reference exists.
    planned = [stage for stage in first if stage.seed == 1 and stage.phase != SCORE]
    recorded = recorded_rounds(folder, rule)
    settings = check(first, recorded, str(folder.path / ROUNDS_FILE), options.nproc_per_node)
    plans = [plan(stage, options.nproc_per_node) for stage in planned if recorded is None or options.dry_run]
    if options.dry_run:
        for stage, text in zip(planned, plans, strict=False):
            print_stdout(f"\n== {_title(stage, options)}\n{text}")
        return 0
    if recorded is None:
        start(folder, rule, settings)
    number = min(folder.current_round(), rule.max_rounds)
    while True:
        for stage in _stages_of(number, folder, options, given):
            finished = Path(stage.folder) / "finished"
            if not finished.exists():
                say(f"== {_title(stage, options)}")
                code = launch(stage, options.nproc_per_node)
                if code:
                    how = "stopped" if code == EXIT_STOPPED else f"failed with exit code {code}"
                    say(f"== {_title(stage, options)} {how}; the same command of this tool resumes")
                    return code
                finished.touch()
        rounds = judge(folder, rule)
        _show(rounds)
        if rounds.ended:
            break
        number += 1
    say(f"learned weights: --domain-weights {folder.domain_weights}; report: tools/report.py --rounds {folder.path}")
    return 0


def check(first: Sequence[Stage], recorded: RoundsEntry | None, path: str, ranks: int) -> dict[str, Any]:
    """Checks the flags of the first round's runs; returns the settings that must not change.

    Args:
        recorded, path: the rounds so far, if there are any, and their file.

    Raises:
        ConfigError: with the faults of the flags, or with settings that differ from those of the rounds so far.
    """
    faults: dict[Fault, None] = {}
    configs: dict[str, Config] = {}
    for stage in first:
        configs[stage.phase], found = read_command_line(stage.argv, ranks)
        faults.update(dict.fromkeys(found))
    raise_if_any(list(faults))
    manifest = _manifest(configs[PROXY])
    settings = {**fixed_settings(configs[REFERENCE], configs[PROXY]), _DATA: manifest.fingerprint()}
    if recorded is None:
        # Before a reference is trained against which no proxy can learn.
        left_out = _without_weight(configs[REFERENCE], manifest)
        rule = "a weight above 0 for each domain: proxies sample all of them"
        remedy = "give --exclude-domains for those that no run should read"
        raise_if_any([Fault("--domain-weights", f"{name!r} is 0", rule, remedy) for name in left_out])
        return settings
    changed = changed_settings(recorded.settings, {**settings, _DATA: recorded.settings.get(_DATA)}, path)
    if recorded.settings.get(_DATA) not in (None, settings[_DATA]):
        rule = f"the data set of {path}, in every round: names and sizes of its domains, tokenizer"
        changed.append(Fault("--domains", "another data set", rule, "give that one, or another --save for new rounds"))
    raise_if_any(changed)
    return settings


def _manifest(config: Config) -> Manifest:
    """The data of a run, without excluded domains. Raises ConfigError."""
    data = config.data
    return open_manifest(data.domains, data.data_path, data.split_shares, data.exclude_domains)


def _without_weight(config: Config, manifest: Manifest) -> list[str]:
    """The domains that a run does not read because their weight is 0. Raises ConfigError."""
    data = config.data
    if not names_domains(data.domain_weights):
        return []
    renames = read_domain_names(Path(data.domain_names)) if data.domain_names else {}
    allowed = (data.allow_tokenizer_mismatch, config.run.allow_unfinished)
    weights = resolve_weights(data.domain_weights, manifest, *allowed, renames=renames)
    return [name for name, weight in zip(manifest.names, weights, strict=True) if weight == 0.0]


def plan(stage: Stage, ranks: int) -> str:
    """The plan of a run, as --dry-run prints it. Raises ConfigError if the run could not start."""
    import pretrain_doremi

    text = io.StringIO()
    argv = [*stage.argv, "--dry-run", "--dry-run-world-size", str(ranks)]
    with contextlib.redirect_stdout(text):
        pretrain_doremi.start(argv, Signals(os.environ))
    return text.getvalue().rstrip()


def _stages_of(
    number: int, folder: RoundsFolder, options: argparse.Namespace, given: dict[str, Any]
) -> Iterator[Stage]:
    seed = int(given["seed"]) if given.get("seed", "").isdecimal() else DataConfig().seed
    return stages(given, folder, number, options.seeds, seed, options.record_losses)


def _title(stage: Stage, options: argparse.Namespace) -> str:
    seed = f", seed {stage.seed} of {options.seeds}" if options.seeds > 1 else ""
    return f"round {stage.number}{seed}: {stage.phase}"


def _program() -> str:
    """The path of pretrain_doremi.py, in this folder's parent or installed."""
    found = importlib.util.find_spec("pretrain_doremi")
    assert found is not None
    assert found.origin is not None
    return found.origin


def _show(rounds: RoundsEntry) -> None:
    """Prints the table of the last round and the verdict."""
    if rounds.rounds:
        print_stdout(format_text(excerpt(round_table(rounds.rounds[-1]), _ROWS)))
        print_stdout(wrapped_lines(verdict_of_round(rounds)))
        warning = concentration_warning(rounds)
        if warning:
            print_stdout(wrapped_lines(warning))


def command() -> None:
    """Runs `main` as a program."""
    run_or_exit(main)


if __name__ == "__main__":
    command()
