"""Runs the program on a damaged set-up for the catalog of wrong input; returns exit code, output and changed files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phases.small import MODEL, read_by
from ranks import start_ranks


@dataclass(frozen=True)
class Case:
    """One mistake.

    Attributes:
        words: texts that the message must contain.
        phase: the phase to run.
        flags: added to the flags of a valid run; "@" stands for the set-up's folder.
        damage: changes the set-up before the run; None if the mistake is in the flags or the environment.
        environ: environment variables; "@" as above.
        without: flags of a valid run to remove, with their values.
    """

    words: tuple[str, ...]
    phase: str = "main"
    flags: str = ""
    damage: Callable[[Path], Any] | None = None
    environ: Mapping[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Changes a JSON file; `change` edits the parsed value in place."""
    entry = json.loads(path.read_text())
    change(entry)
    path.write_text(json.dumps(entry))


def patch(path: Path, at: int, data: bytes) -> None:
    """Overwrites bytes of a file from offset `at`."""
    content = bytearray(path.read_bytes())
    content[at : at + len(data)] = data
    path.write_bytes(bytes(content))


def truncate(path: Path, count: int) -> None:
    """Removes the last `count` bytes of a file."""
    path.write_bytes(path.read_bytes()[:-count])


def argv_of(case: Case, folder: Path) -> list[str]:
    """The command line: a valid one for the phase, plus the case's flags."""
    words = ["--phase", case.phase, "--domains", f"{folder}/data/domains.json", "--train-iters", "3", *MODEL]
    words = read_by(case.phase, words)
    if case.phase != "evaluate":
        words += ["--save", f"{folder}/save"]
    for flag in case.without:
        place = words.index(flag)
        del words[place : place + 2]
    return words + case.flags.replace("@", str(folder)).split()


def program(launch: Any, argv: list[str], environ: dict[str, str], output: str) -> None:
    """Runs pretrain_doremi.py in a process that has imported everything; writes its exit code to a file."""
    import pretrain_doremi
    from megatron_doremi.errors import run_or_exit

    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "SLURM_PROCID"):
        os.environ.pop(name, None)
    os.environ.update(environ)
    sys.argv = ["pretrain_doremi.py", *argv]
    code: Any = "none"
    try:
        run_or_exit(pretrain_doremi.main)
    except SystemExit as leave:
        code = leave.code
    sys.stdout.flush()
    sys.stderr.flush()
    Path(output + ".code").write_text(str(code))


def run_case(case: Case, setup: Path, folder: Path) -> tuple[str, str, list[str]]:
    """Runs a case on a copy of the set-up; returns exit code, output, and the files that the program changed."""
    shutil.copytree(setup, folder)
    if case.damage is not None:
        case.damage(folder)
    before = contents(folder)
    with tempfile.TemporaryDirectory() as temporary:
        output = f"{temporary}/output"
        environ = {name: value.replace("@", str(folder)) for name, value in case.environ.items()}
        processes, pipes = start_ranks(1, temporary, program, argv_of(case, folder), environ, output)
        processes[0].join(60)
        hung = processes[0].is_alive()
        if hung:
            processes[0].kill()
        pipes[0].close()
        code = Path(output + ".code")
        output_text = Path(output).read_text(errors="replace")
        after = contents(folder)
        changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        return "hung" if hung else code.read_text() if code.exists() else "died", output_text, changed


def contents(folder: Path) -> dict[str, str]:
    """{path: hash} of the files and folders below a folder, except those of run locks."""
    hashes = {}
    for path in folder.rglob("*"):
        if ".lock" in path.relative_to(folder).parts:
            continue
        data = path.read_bytes() if path.is_file() else b"folder"
        hashes[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return hashes
