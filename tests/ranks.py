"""Runs functions on several ranks: real processes over gloo, forked from a server that has imported torch.

Importing torch and DeepSpeed takes seconds; the server does it once for the whole test session. Ranks meet at
a file, so that no test hunts for a port, and a test that hangs is ended and fails.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import runpy
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from megatron_doremi.console import COLUMNS

ROOT = Path(__file__).resolve().parent.parent

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.preload"])


def on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 240.0) -> list[Any]:
    """Calls function(launch, *arguments) on every rank and returns their results in the order of ranks.

    Raises:
        AssertionError: a rank failed (with its traceback) or did not end within `timeout` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes, pipes = start_ranks(world_size, folder, function, *arguments)
        try:
            return [_result(rank, pipe, timeout) for rank, pipe in enumerate(pipes)]
        finally:
            deadline = time.monotonic() + 10.0
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
                if process.is_alive():
                    process.kill()


def start_ranks(
    world_size: int, folder: str, function: Callable[..., Any], *arguments: Any
) -> tuple[list[BaseProcess], list[Connection]]:
    """Starts function(launch, *arguments) on every rank; they meet in `folder`. Returns processes and their pipes."""
    pipes, processes = [], []
    for rank in range(world_size):
        ours, theirs = _CONTEXT.Pipe()
        url = f"file://{folder}/store" if world_size > 1 else ""
        process = _CONTEXT.Process(target=_rank, args=(rank, world_size, url, theirs, function, arguments))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    return processes, pipes


def _result(rank: int, pipe: Connection, timeout: float) -> Any:
    if not pipe.poll(timeout):
        raise AssertionError(f"rank {rank} did not end within {timeout} s")
    try:
        kind, value = pickle.loads(pipe.recv_bytes())
    except EOFError:
        raise AssertionError(f"rank {rank} died") from None
    assert kind == "result", f"rank {rank} failed:\n{value}"
    return value


def _rank(
    rank: int,
    world_size: int,
    url: str,
    pipe: Connection,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    import torch

    from megatron_doremi.cluster.launch import Launch

    torch.set_num_threads(1)
    try:
        outcome = ("result", function(Launch(rank, world_size, rank, url), *arguments))
    except BaseException:
        outcome = ("error", traceback.format_exc())
    # Plain bytes: multiprocessing would share tensors' memory with a process that is about to end.
    pipe.send_bytes(pickle.dumps(outcome))
    pipe.close()
    sys.stdout.flush()
    os._exit(0)


def program(launch: Any, argv: list[str]) -> int:
    """The body of pretrain_doremi.py on one rank, in a process that has imported everything; its exit code."""
    import pretrain_doremi
    from megatron_doremi.arguments import parse_config
    from megatron_doremi.config import data_parallel_size
    from megatron_doremi.parallel.topology import Topology

    config = parse_config(argv, launch.world_size)
    topology = Topology(
        pipe_size=config.parallel.pipeline_model_parallel_size,
        data_size=data_parallel_size(config.parallel, launch.world_size),
        tensor_size=config.parallel.tensor_model_parallel_size,
        rank=launch.rank,
    )
    return pretrain_doremi.run(config, topology, launch)


def run_program(world_size: int, argv: list[str], timeout: float = 240.0) -> None:
    """Runs pretrain_doremi.py with these arguments on `world_size` ranks."""
    on_ranks(world_size, program, argv, timeout=timeout)


def forked(function: Callable[..., Any], *arguments: Any) -> BaseProcess:
    """Starts function(*arguments) in a process that has imported what ranks need."""
    process = _CONTEXT.Process(target=function, args=arguments)
    process.start()
    return process


class Script:
    """A script that runs as `python PATH WORDS` would, in a process that has imported what it needs: it is forked from
    the server with `environ` and the working directory `cwd`, and its output comes through file descriptors.

    Its methods are those of subprocess.Popen, and so is the sign of its exit code.

    Args:
        stdout, stderr: files to write; may be the same.
    """

    def __init__(
        self, path: Path, words: Sequence[str], stdout: Path, stderr: Path, environ: Mapping[str, str], cwd: Path
    ):
        arguments = (str(path), list(words), [str(stdout), str(stderr)], dict(environ), str(cwd))
        self._process = forked(_script, *arguments)
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise AssertionError(f"process {self.pid} did not end within {timeout} s")
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


def run_tool(path: Path, words: Sequence[str], timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
    """Runs a script to its end, with this process's environment and working directory."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        script = Script(path, words, *outputs, os.environ, Path.cwd())
        try:
            code = script.wait(timeout)
        except AssertionError:
            script.kill()
            raise
        texts = [output.read_text(errors="surrogateescape") for output in outputs]
    return subprocess.CompletedProcess([str(path), *words], code, *texts)


def _script(path: str, words: list[str], outputs: list[str], environ: dict[str, str], cwd: str) -> None:
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(cwd)
    for number, (name, output) in enumerate(zip(("stdout", "stderr"), outputs, strict=True), 1):
        with open(output, "ab") as file:
            os.dup2(file.fileno(), number)
        setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115
    sys.argv[:] = [path, *words]
    sys.path[0] = os.path.dirname(path)
    runpy.run_path(path, run_name="__main__")


def unwrapped(output: str) -> str:
    """What a program printed, with the lines that `console.wrapped` made of one joined again."""
    lines: list[str] = []
    previous, indent = "", -1
    for line in output.split("\n"):
        words = line.split()
        own_indent = len(line) - len(line.lstrip())
        if words and own_indent == indent + 4 and len(previous) + 1 + len(words[0]) > COLUMNS:
            lines[-1] += " " + line.lstrip()
        else:
            lines.append(line)
            indent = own_indent
        previous = line
    return "\n".join(lines)
