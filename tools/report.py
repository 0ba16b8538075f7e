"""Compares groups of runs, or shows runs side by side: prints a table and a verdict, and writes report.html, its charts
as PNG, and results.json to a folder.

  python tools/report.py --group NAME=DIR... [--group NAME=DIR...]... [--domains domains.json] [--output-dir DIR]
  python tools/report.py RUN... [--domains domains.json] [--output-dir DIR]
  python tools/report.py --rounds DIR [RUN... or groups]

A group is one configuration trained with several seeds. The first group is compared with each other one, paired by
seed; groups named proxy and reference are not compared: a proxy's weights are shown, and those of the first group are
checked against them. --proxy, --main, --baseline and --reference DIR... are short for --group proxy=DIR... and so on.
--rounds adds the weights over the rounds of tools/doremi_rounds.py; alone, it shows their proxies.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:
    # Run as a script: the package is beside this folder.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_doremi import __version__
from megatron_doremi.console import print_stdout
from megatron_doremi.data.manifest import load_manifest
from megatron_doremi.errors import ConfigError, Fault, raise_if_any, run_or_exit
from megatron_doremi.flag_parser import FlagParser
from megatron_doremi.progress import stage
from megatron_doremi.reporting.charts.render import png
from megatron_doremi.reporting.comparison import Study, compare, list_runs, with_controls
from megatron_doremi.reporting.console import console_text
from megatron_doremi.reporting.groups import PROXY, REFERENCE, Group
from megatron_doremi.reporting.rounds import RoundsEntry, read_rounds
from megatron_doremi.reporting.runs import Run, read_all, read_run, read_runs
from megatron_doremi.reporting.sections import Report, make_report, unique_labels
from megatron_doremi.rounds.folder import RoundsFolder
from megatron_doremi.storage.files import atomic_write_bytes, atomic_write_text, temporary_beside

SHORT_FLAGS = (PROXY, "main", "baseline", REFERENCE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the runs, prints the table and writes the report; returns the exit code."""
    options = parse(arguments)
    folder: Path = options.output_dir
    named: list[tuple[str, list[Path]]] = options.groups
    with stage("reading the runs"):
        rounds = _rounds(options.rounds)
        paths: dict[str, Path] | list[Path] = options.runs
        if rounds is not None and not named and not paths:
            paths = _proxies(options.rounds, rounds)
        groups, tokens = _read(named, paths, options.domains, _unwritable(folder))
        groups = with_controls(groups, options.control_domains)
        study = compare(groups, tokens) if named else list_runs(groups, tokens)
        if rounds is not None and paths and not options.runs:
            study = _of_last_round(study, options.rounds, rounds)
    _make_writable(folder)
    print(console_text(study, rounds), flush=True)
    with stage("drawing the charts"):
        report = make_report(study, __version__, rounds)
        write_report(report, folder)
    pictures = f"{len(report.charts)} PNG file{'s' if len(report.charts) != 1 else ''}"
    print_stdout(f"\nwrote {folder / 'report.html'}, results.json and {pictures} in the same folder")
    return 0


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line; `groups` are (name, folders), in order. Raises ConfigError for what does not fit."""
    parser = FlagParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS,
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="--save folders of runs to show side by side")
    group_help = "--save folders of the runs of a group, one for each seed; give it once for each group"
    parser.add_argument("--group", nargs="+", action=_Group, metavar="NAME=DIR", dest="groups", help=group_help)
    for name in SHORT_FLAGS:
        short_help = f"short for --group {name}=DIR..."
        parser.add_argument(f"--{name}", nargs="+", action=_Group, metavar="DIR", dest="groups", help=short_help)
    rounds_help = "--save folder of tools/doremi_rounds.py: adds the weights over its rounds"
    parser.add_argument("--rounds", type=Path, metavar="DIR", help=rounds_help)
    domains_help = "manifest (domains.json) of the runs: adds natural weights and epochs"
    parser.add_argument("--domains", type=Path, metavar="FILE", help=domains_help)
    control_help = "domains that are shown but left out of mean and worst domain, such as one that cannot be learned"
    parser.add_argument("--control-domains", nargs="+", default=[], metavar="NAME", help=control_help)
    output_help = "folder for the report (default: report/ in the first folder given)"
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help=output_help)
    options = parser.parse_args(arguments)
    options.groups = options.groups or []
    raise_if_any(_faults(options))
    if options.output_dir is None:
        folders = [*(path for _, paths in options.groups for path in paths), *options.runs]
        options.output_dir = (options.rounds or folders[0]) / "report"
    return options


class _Group(argparse.Action):
    """Collects (name, folders) of --group NAME=DIR... and of the flags that are short for it."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        name, folders = (option_string or "").removeprefix("--"), list(values)
        if name == "group":
            name, _, first = folders[0].partition("=")
            folders[0] = first
        collected = getattr(namespace, self.dest) or []
        setattr(namespace, self.dest, [*collected, (name, [Path(each) for each in folders if each])])


def write_report(report: Report, folder: Path) -> None:
    """Writes the PNGs, report.html and results.json to `folder`, each atomically."""
    results = json.dumps(report.results, indent=2, allow_nan=False) + "\n"
    try:
        for chart in report.charts:
            atomic_write_bytes(folder / f"{chart.name}.png", png(chart))
        atomic_write_bytes(folder / "report.html", report.html.encode("utf-8", errors="replace"))
        atomic_write_text(folder / "results.json", results)
    except OSError as error:
        raise ConfigError(_output_fault(_reason(folder, error))) from error


def _unwritable(folder: Path) -> list[Fault]:
    """A fault if `folder` cannot be made or written, as far as that shows without writing."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        return [_output_fault(f"{existing}: not a folder")]
    return [] if os.access(existing, os.W_OK | os.X_OK) else [_output_fault(f"{existing}: no permission to write")]


def _make_writable(folder: Path) -> None:
    """Makes `folder` and writes a file to it, before the charts are drawn. Raises ConfigError if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = temporary_beside(folder / "report.html")
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ConfigError(_output_fault(_reason(folder, error))) from error


def _reason(folder: Path, error: OSError) -> str:
    return f"{error.filename or folder}: {error.strerror or error}"


def _output_fault(value: str) -> Fault:
    remedy = "give another --output-dir, free disk space, or change its permissions"
    return Fault("--output-dir", value, "a folder that can be written", remedy)


def _rounds(path: Path | None) -> RoundsEntry | None:
    """The rounds of a folder. Raises ConfigError, also if none has ended."""
    if path is None:
        return None
    rounds = read_rounds(path, "--rounds")
    if not rounds.rounds:
        raise ConfigError(Fault("--rounds", str(path), "a folder with a finished round", "wait for the first one"))
    return rounds


def _proxies(path: Path, rounds: RoundsEntry) -> dict[str, Path]:
    """The folders of the proxies of all rounds, by label."""
    folder, seeds = RoundsFolder(path), range(1, rounds.seeds + 1)
    return {
        f"round {each.round}" + (f" seed {seed}" if rounds.seeds > 1 else ""): folder.run(each.round, seed, PROXY)
        for each in rounds.rounds
        for seed in seeds
    }


def _of_last_round(study: Study, path: Path, rounds: RoundsEntry) -> Study:
    """The study of the proxies of all rounds: what the last round learned is the result."""
    last = _proxies(path, rounds.model_copy(update={"rounds": rounds.rounds[-1:]}))
    return replace(study, last_round=frozenset(last), round_name=f"round {rounds.rounds[-1].round}")


def _read(
    named: Sequence[tuple[str, Sequence[Path]]],
    runs: Mapping[str, Path] | Sequence[Path],
    domains: Path | None,
    faults: list[Fault],
) -> tuple[list[Group], dict[str, int]]:
    """Reads the runs, and the tokens by domain. Raises ConfigError with `faults` and every fault of the files."""
    tokens: dict[str, int] = {}
    groups: list[Group] = []
    try:
        if domains is not None:
            tokens = {domain.name: domain.tokens for domain in load_manifest(domains).domains}
    except ConfigError as error:
        faults += error.faults
    try:
        groups = _read_groups(named) if named else _read_list(runs)
    except ConfigError as error:
        faults += error.faults
    raise_if_any(faults)
    return groups, tokens


def _read_groups(named: Sequence[tuple[str, Sequence[Path]]]) -> list[Group]:
    flat = [(name, path) for name, paths in named for path in paths]
    runs = read_all([partial(read_run, path, f"--group {name}") for name, path in flat])
    by_name: dict[str, list[Run]] = {}
    for (name, _), run in zip(flat, runs, strict=True):
        by_name.setdefault(name, []).append(run)
    return [Group(name, tuple(members)) for name, members in by_name.items()]


def _read_list(paths: Mapping[str, Path] | Sequence[Path]) -> list[Group]:
    """A group for each run, named by its folder unless `paths` names it."""
    if isinstance(paths, Mapping):
        named = read_all([partial(read_run, path, "--rounds") for path in paths.values()])
        return [Group(label, (run,)) for label, run in zip(paths, named, strict=True)]
    runs = [run for evaluations in read_all([partial(read_runs, path) for path in paths]) for run in evaluations]
    labels = unique_labels([run.path.resolve().name for run in runs])
    return [Group(label, (run,)) for label, run in zip(labels, runs, strict=True)]


def _faults(options: argparse.Namespace) -> list[Fault]:
    names = [name for name, _ in options.groups]
    if options.runs and names:
        value = f"{len(options.runs)} given in addition to the groups {', '.join(names)}"
        return [Fault("RUN", value, "either RUN... or groups", "put every folder into a group, or give folders alone")]
    if not options.runs and not names and options.rounds is None:
        remedy = "give run folders, or --group NAME=DIR... for each group; --help shows both forms"
        return [Fault("RUN", "missing", "at least one run or group", remedy)]
    faults = []
    for name, folders in options.groups:
        if not name or not folders:
            value = f"{name}={' '.join(map(str, folders))}".strip("=")
            faults.append(Fault("--group", value, "NAME=DIR..., such as main=runs/main-1 runs/main-2", "correct it"))
    repeated = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if repeated:
        remedy = "list every folder of a group after one --group"
        faults.append(Fault("--group", f"{', '.join(repeated)} given more than once", "each name once", remedy))
    return faults


def command() -> None:
    """Runs `main` as a program."""
    run_or_exit(main)


if __name__ == "__main__":
    command()
