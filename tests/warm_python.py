"""A `python` that runs pretrain_doremi.py in a process that has imported torch already, for tests of shell commands.

Its start takes seconds, most of them for imports, and a script of commands starts it dozens of times. `warm_python`
makes a folder for the front of PATH. The `python` in it hands arguments, environment, working directory and open files
of pretrain_doremi.py (and of the ranks that --nproc-per-node starts) to a process that is forked from the server of
`ranks.py`, and ends with its exit code. Every other program gets the Python of the tests.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import runpy
import socket
import sys
import threading
from collections.abc import Iterator
from multiprocessing.connection import wait
from pathlib import Path

from ranks import _CONTEXT

_COLLECTING = threading.Lock()
CLIENT = Path(__file__).resolve().with_name("warm_python_client.py")
SHIM = """#!/bin/sh
case "$1" in
pretrain_doremi.py) exec "{python}" -S -E "{client}" "{socket}" "$0" "$@" ;;
esac
exec "{python}" "$@"
"""


@contextlib.contextmanager
def warm_python(folder: Path) -> Iterator[Path]:
    """Serves until the block ends; yields the folder that holds `python` and `python3`."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket"))
        server.listen(64)
        for name in ("python", "python3"):
            text = SHIM.format(python=sys.executable, client=CLIENT, socket=folder / "socket")
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        threading.Thread(target=_accept, args=(server,), daemon=True).start()
        yield folder
        server.shutdown(socket.SHUT_RDWR)


def _accept(server: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            threading.Thread(target=_serve, args=(server.accept()[0],), daemon=True).start()


def _serve(client: socket.socket) -> None:
    with client:
        process = _CONTEXT.Process(target=_run, args=(client,))
        # A start and a join both collect exit codes of any process; two threads at once would lose one.
        with _COLLECTING:
            process.start()
        wait([process.sentinel])
        with _COLLECTING:
            process.join()
        code = process.exitcode or 0
        client.sendall(str(code if code >= 0 else 128 - code).encode())


def _run(client: socket.socket) -> None:
    """Becomes the process that the client asked for."""
    size = int(client.recv(8))
    message, files, _, _ = socket.recv_fds(client, size, 64)
    while len(message) < size:
        message += client.recv(size - len(message))
    client.close()
    request = json.loads(message)
    # First out of the way of the numbers that they get.
    files = [_high(file) for file in files]
    for file, number in zip(files, request["files"], strict=True):
        os.dup2(file, number)
        os.close(file)
    # The streams of this process were made for other files.
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environ"])
    sys.executable = request["command"][0]
    sys.orig_argv = request["command"]
    sys.argv = request["command"][1:]
    sys.path.insert(0, request["folder"])
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    runpy.run_path(sys.argv[0], run_name="__main__")


def _high(file: int) -> int:
    moved = fcntl.fcntl(file, fcntl.F_DUPFD, 500)
    os.close(file)
    return moved
