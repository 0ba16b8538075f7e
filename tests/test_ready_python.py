"""The stand-in for Python (ready_python.py) does with words, files, signals and exit codes what Python does.

Run alone: python -m pytest tests/test_ready_python.py
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import subprocess
import sys

import pytest

SCRIPT = """
import atexit, os, sys
atexit.register(print, "at exit")
print(sys.argv, sys.orig_argv[1:], __name__, os.getcwd(), os.environ["GIVEN"], os.path.dirname(__file__) == sys.path[0])
print(sys.stdin.read(), "megatron_doremi.phases.train" in sys.modules, file=sys.stderr)
os.write(int(os.environ["FILE"]), b"through a file that is open")
exec(sys.argv[1])
"""


@pytest.mark.parametrize("unbuffered", [{}, {"PYTHONUNBUFFERED": "1"}], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize(
    ("ending", "code", "words"),
    [
        ("pass", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit('a message')", 1, "a message"),
        ("1 / 0", 1, "ZeroDivisionError"),
        ("os._exit(5)", 5, ""),
        ("os.kill(os.getpid(), 9)", 128 + 9, ""),
    ],
)
def test_a_script_runs_as_under_python(ending, code, words, unbuffered, ready_python, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = {}
    for python in (sys.executable, str(ready_python)):
        reading, low = os.pipe()
        # The server has files of its own at low numbers.
        writing = fcntl.fcntl(low, fcntl.F_DUPFD, 100)
        os.close(low)
        environ = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        environ |= {"GIVEN": "a b\udcff", "FILE": str(writing), **unbuffered}
        done[python] = subprocess.run(
            [python, "script.py", ending, "--x=\udcff"],
            input="given",
            cwd=tmp_path,
            env=environ,
            pass_fds=[writing],
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=60,
        )
        os.close(writing)
        with os.fdopen(reading) as file:
            assert file.read() == "through a file that is open"
    expected, found = done.values()
    assert found.returncode == code
    assert expected.returncode in (code, 128 - code)
    assert words in found.stderr
    assert found.stdout == expected.stdout
    assert (expected.stderr.splitlines()[0], found.stderr.splitlines()[0]) == ("given False", "given True")


def test_signals_are_passed_on_and_other_words_go_to_python(ready_python, tmp_path):
    (tmp_path / "script.py").write_text(
        "import signal, sys\n"
        "signal.signal(signal.SIGUSR1, lambda number, frame: sys.exit(7))\n"
        "print('ready', flush=True)\nsignal.pause()\n"
    )
    process = subprocess.Popen([ready_python, tmp_path / "script.py"], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 7
    process.stdout.close()
    code = "import sys; print(sys.executable, 'torch' in sys.modules)"
    printed = subprocess.run([ready_python, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == f"{sys.executable} False\n"


def test_a_script_ends_with_the_program(ready_python, tmp_path):
    """A kill, which the program cannot pass on, ends the script and what it has started: all that write to the pipe."""
    (tmp_path / "script.py").write_text(
        "import subprocess, time\nsubprocess.Popen(['sleep', '300'])\nprint('ready', flush=True)\ntime.sleep(300)\n"
    )
    process = subprocess.Popen([ready_python, tmp_path / "script.py"], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    assert select.select([process.stdout], [], [], 30)[0]
    assert process.stdout.read() == b""
    process.stdout.close()


def test_what_a_script_leaves_running_goes_on(ready_python, tmp_path):
    (tmp_path / "script.py").write_text(
        "import subprocess\nsubprocess.Popen('sleep 1; echo still here', shell=True)\nprint('ended', flush=True)\n"
    )
    done = subprocess.run([ready_python, tmp_path / "script.py"], stdout=subprocess.PIPE, check=True, timeout=60)
    assert done.stdout == b"ended\nstill here\n"
