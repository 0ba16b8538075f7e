"""A stand-in for Python in shell scripts under test: scripts start in a fork of a process that has imported all they
need, which saves each start two to three seconds of imports.

`program(folder)` gives the path to hand to a shell script as PYTHON. Called with the path of a script, the program
sends words, variables, working directory and open files to the server, waits, passes signals on and exits as the script
does; a kill of the program ends the script. With `-c` or `-m` it is Python itself. Ranks that the script starts with
sys.executable start in the same way. Modules are those of the working tree, also for a script in a copy of it.

Run alone: python -m pytest tests/test_ready_python.py
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from ranks import forked

# Descriptors of a request are moved above this number first.
_OWN = 512
_CLIENT = r"""#!{python} -IS
import os, sys
if len(sys.argv) < 2 or not sys.argv[1].endswith(".py"):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
import json, signal, socket
numbers = [0, 1, 2]
for name in os.listdir("/proc/self/fd"):
    if int(name) > 2:
        try:
            if os.get_inheritable(int(name)):
                numbers.append(int(name))
        except OSError:
            pass
signals = {{signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}}
signal.pthread_sigmask(signal.SIG_BLOCK, signals)
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
environ = {{os.fsdecode(key): os.fsdecode(value) for key, value in os.environb.items()}}
request = json.dumps([sys.argv, environ, os.getcwd(), numbers]).encode()
socket.send_fds(server, [len(request).to_bytes(8, "big")], numbers)
server.sendall(request)
answers = server.makefile()
pid = int(answers.readline())
for number in signals:
    if signal.getsignal(number) is not signal.SIG_IGN:
        signal.signal(number, lambda number, frame: os.kill(pid, number))
signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
os._exit(int(answers.readline()))
"""


@contextlib.contextmanager
def program(folder: Path) -> Iterator[Path]:
    """Starts the server and yields the program's path; `folder` is a new one with a short path."""
    path, address = folder / "python", folder / "socket"
    path.write_text(_CLIENT.format(python=sys.executable, address=str(address)))
    path.chmod(0o755)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(address))
    listener.listen(64)
    server = forked(_serve, listener, str(path))
    listener.close()
    try:
        yield path
    finally:
        server.kill()
        server.join()


def _serve(listener: socket.socket, python: str) -> NoReturn:
    """Forks a process for each request, which forks the script's and waits for it."""
    while True:
        connection, _ = listener.accept()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if os.fork() == 0:
            listener.close()
            try:
                _answer(connection, python)
            finally:
                os._exit(0)
        connection.close()


def _answer(connection: socket.socket, python: str) -> None:
    head, files, _, _ = socket.recv_fds(connection, 8, 64)
    request = b""
    while len(request) < int.from_bytes(head, "big"):
        request += connection.recv(1 << 20)
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        _run(json.loads(request), files, connection, python)
    for file in files:
        os.close(file)
    with contextlib.suppress(OSError):
        # The script may have done so itself.
        os.setpgid(pid, pid)
    with contextlib.suppress(OSError):
        connection.sendall(b"%d\n" % pid)
    ended = os.pidfd_open(pid)
    if ended not in select.select([connection, ended], [], [])[0]:
        # The program was killed: the script, which is no child of it, ends with all that it has started.
        os.killpg(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(OSError):
        connection.sendall(b"%d\n" % (code if code >= 0 else 128 - code))


def _run(request: list[Any], files: list[int], connection: socket.socket, python: str) -> NoReturn:
    words, environ, cwd, numbers = request
    moved = [fcntl.fcntl(file, fcntl.F_DUPFD, _OWN) for file in files]
    connection.close()
    for file in files:
        os.close(file)
    for file, number in zip(moved, numbers, strict=True):
        # Libraries have files of their own open here; a file of theirs that the program inherited is the same here.
        if number <= 2 or not _is_open(number):
            os.dup2(file, number)
        elif not os.path.sameopenfile(file, number):
            os.write(2, b"ready_python.py: a file of the program has the number of a file of the server\n")
            os._exit(70)
        os.close(file)
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(cwd)
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        errors, by_line = getattr(sys, f"__{name}__").errors, number == 2 or "PYTHONUNBUFFERED" in os.environ
        setattr(sys, name, open(number, mode, 1 if by_line else -1, errors=errors, closefd=False))  # noqa: SIM115
    sys.orig_argv[:] = [python, *words[1:]]
    sys.executable = python
    sys.argv[:] = words[1:]
    path, module, code = os.path.abspath(words[1]), ModuleType("__main__"), 0
    sys.path[0], module.__file__, sys.modules["__main__"] = os.path.dirname(path), path, module
    try:
        exec(compile(Path(path).read_bytes(), path, "exec"), module.__dict__)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else end.code is not None
        if code and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True
