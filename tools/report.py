"""Reports on runs: prints a table, and writes plots, report.html and results.json to a folder.

  python tools/report.py RUN... [--output-dir DIR]
  python tools/report.py --proxy DIR --main DIR --baseline DIR [--reference DIR] --domains domains.json \\
      --output-dir DIR

The first form reports on any runs; the second compares a main model trained on DoReMi's weights with a baseline.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

if not __package__:
    # Run as a script: the package is beside this folder.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_doremi.data.manifest import load_manifest
from megatron_doremi.errors import ConfigError, Fault, raise_if_any, run_or_exit
from megatron_doremi.reporting.assemble import Report, comparison_report, runs_report
from megatron_doremi.reporting.comparison import compare
from megatron_doremi.reporting.runs import Run, read_all, read_run, read_runs
from megatron_doremi.settings import flag_of
from megatron_doremi.storage.files import atomic_write_bytes

NEEDED = ("proxy", "main", "baseline", "domains", "output_dir")


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the runs, prints the table and writes the report; returns the exit code."""
    options = parse(arguments)
    if options.runs:
        folders = read_all([partial(read_runs, path) for path in options.runs])
        report = runs_report([run for folder_runs in folders for run in folder_runs])
        folder = options.output_dir or options.runs[0] / "report"
    else:
        report = _comparison(options)
        folder = options.output_dir
    print(report.console)
    write_report(report, folder)
    print(f"\nwrote {folder / 'report.html'}, results.json and {len(report.images)} PNG files in the same folder")
    return 0


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line. Raises ConfigError for a combination of flags that is not allowed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="--save folders of the runs to report on")
    for name in ("proxy", "main", "baseline", "reference"):
        parser.add_argument(f"--{name}", type=Path, metavar="DIR", help=f"--save folder of the {name} run")
    parser.add_argument("--domains", type=Path, metavar="FILE", help="manifest (domains.json) of the runs")
    output_help = "folder for the report (default: report/ in the first RUN; required for a comparison)"
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help=output_help)
    options = parser.parse_args(arguments)
    raise_if_any(_faults(options))
    return options


def write_report(report: Report, folder: Path) -> None:
    """Writes the PNGs, report.html and results.json to `folder`, each atomically."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for image in report.images:
            atomic_write_bytes(folder / image.name, image.png)
        atomic_write_bytes(folder / "report.html", report.html.encode("utf-8", errors="replace"))
        results = json.dumps(report.results, indent=2, allow_nan=False) + "\n"
        atomic_write_bytes(folder / "results.json", results.encode())
    except OSError as error:
        remedy = "give another --output-dir, free disk space, or change its permissions"
        value = f"{error.filename}: {error.strerror}"
        raise ConfigError(Fault("--output-dir", value, "a writable folder", remedy)) from error


def _comparison(options: argparse.Namespace) -> Report:
    given = [name for name in ("proxy", "main", "baseline", "reference") if getattr(options, name) is not None]
    readers: list[Callable[[], Run]] = [partial(read_run, getattr(options, name), f"--{name}") for name in given]
    faults: list[Fault] = []
    try:
        runs = dict(zip(given, read_all(readers), strict=True))
    except ConfigError as error:
        faults.extend(error.faults)
    try:
        manifest = load_manifest(options.domains).domains
    except ConfigError as error:
        faults.extend(error.faults)
    raise_if_any(faults)
    return comparison_report(compare(manifest, runs["proxy"], runs["main"], runs["baseline"]), runs)


def _faults(options: argparse.Namespace) -> list[Fault]:
    compared = [name for name in (*NEEDED[:4], "reference") if getattr(options, name) is not None]
    if options.runs and compared:
        value = ", ".join(f"--{name}" for name in compared)
        rule = "either RUN... or these flags"
        return [Fault("RUN", f"{len(options.runs)} given in addition to {value}", rule, "omit one of the two")]
    if options.runs:
        return []
    if not compared:
        remedy = "give one or more run folders; --help shows both forms"
        return [Fault("RUN", "missing", "at least one run, or --proxy, --main and --baseline", remedy)]
    missing = [name for name in NEEDED if getattr(options, name) is None]
    return [Fault(flag_of(name), "missing", "required for a comparison", "give it") for name in missing]


def command() -> None:
    """Runs `main` as a program."""
    run_or_exit(main)


if __name__ == "__main__":
    command()
