"""Signals, the launcher's death and its restarts, on processes whose main thread hangs.

Run alone: python -m pytest tests/cluster/test_signals.py
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_doremi.cluster.process_identity import process_start
from megatron_doremi.cluster.signals import STOP_SIGNALS

HERE = Path(__file__).resolve().parent
WORKER = [sys.executable, str(HERE / "worker.py")]
LAUNCHED = {"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "test"}
# Starts a command in its own session and waits for it.
LAUNCHER = "import subprocess, sys; subprocess.Popen(sys.argv[1:], start_new_session=True).wait()"


def start(*arguments: str, **environ: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [*WORKER, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environ}
    )
    assert process.stdout.readline().startswith("ready")
    return process


def end(process: subprocess.Popen, *signals: signal.Signals | float) -> tuple[int, str, str]:
    """Sends signals; a number waits that many seconds. Returns exit code, stdout and stderr."""
    for action in signals:
        if isinstance(action, signal.Signals):
            process.send_signal(action)
        else:
            time.sleep(action)
    stdout, stderr = process.communicate(timeout=20)
    return process.returncode, stdout, stderr


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_signal_before_the_first_step_exits_immediately_with_3(number):
    """In version 0.1 SIGINT, SIGHUP, SIGUSR2 and SIGXCPU lost everything; SIGTERM and SIGUSR1 had no effect here."""
    code, _, stderr = end(start("starting"), number)
    assert code == 3
    assert stderr == f"stopped by {number.name} before there was anything to save\n"


def test_the_same_signal_twice_within_a_second_is_one_request():
    """Ctrl-C in a terminal reaches a worker directly and through torchrun."""
    assert end(start("training", "1.5"), signal.SIGINT, 0.1, signal.SIGINT) == (3, "saving\nsaved\n", "")


def test_a_second_signal_exits_immediately_with_128_plus_its_number():
    code, stdout, stderr = end(start("training", "60"), signal.SIGUSR1, 1.3, signal.SIGTERM)
    assert (code, stdout) == (128 + signal.SIGTERM, "saving\n")
    assert stderr == "terminated by a second signal, SIGTERM: steps since the last checkpoint are lost\n"


def test_a_signal_after_everything_is_saved_does_not_change_the_exit_code():
    assert end(start("done"), signal.SIGTERM)[0] == 0


def test_unreachable_peers_do_not_change_the_exit_code():
    """The announcement to the peers took longer than an alarm of 10 s: the exit code was 142 instead of 3."""
    assert end(start("unreachable"), signal.SIGTERM)[0] == 3


def test_a_finished_process_that_hangs_in_its_exit_ends_with_its_own_code():
    assert end(start("done", SECONDS_TO_EXIT="0.5"))[0] == 0


HANGS = """
import runpy, sys, threading
from concurrent.futures import ThreadPoolExecutor
from megatron_doremi import arguments, errors
pool = ThreadPoolExecutor(1)

def read_command_line(argv, world_size):
    pool.submit(threading.Event().wait)
    print("on stdout", end="")
    {ending}

arguments.read_command_line = read_command_line
sys.argv = ["pretrain_doremi.py"]
runpy.run_path("pretrain_doremi.py", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("ending", "code", "message"),
    [
        ("raise errors.RunError('the disk is full')", 1, "error: the disk is full\n"),
        ("raise errors.ReportedElsewhere(2)", 2, ""),
        ("raise ZeroDivisionError('ours')", 1, "Traceback .*ZeroDivisionError: ours\n"),
    ],
)
def test_a_failed_process_does_not_wait_for_a_thread_that_hangs(ending, code, message):
    """At exit the interpreter joins the threads of every executor, even one in a hung fsync; the program does not."""
    command = [sys.executable, "-c", HANGS.replace("{ending}", ending)]
    process = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True, timeout=10, check=False)
    assert process.returncode == code
    assert process.stdout == "on stdout"
    assert re.fullmatch(message, process.stderr, re.DOTALL)


@pytest.mark.parametrize(
    ("arguments", "saved"), [(["starting"], False), (["training", "0.5"], True), (["training"], False)]
)
def test_a_worker_ends_when_its_launcher_is_killed(arguments, saved):
    """A killed launcher cannot signal its workers: a worker that can save does so, one that hangs is ended."""
    environ = {**os.environ, **LAUNCHED}
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, *WORKER, *arguments], stdout=subprocess.PIPE, text=True, env=environ
    )
    worker = int(re.fullmatch(r"ready (\d+)\n", launcher.stdout.readline())[1])
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 10
    while process_start(worker) is not None:
        assert time.monotonic() < deadline, "the worker is an orphan"
        time.sleep(0.05)
    assert ("saved" in launcher.stdout.read()) == saved


def test_plain_python_outlives_the_shell_that_started_it():
    """Like under nohup or setsid."""
    shell = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, *WORKER, "starting"], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    worker = int(shell.stdout.readline().split()[1])
    shell.kill()
    shell.wait()
    time.sleep(2.5)
    assert process_start(worker) is not None
    os.kill(worker, signal.SIGKILL)


def test_a_requested_stop_survives_a_restart_by_torchrun(tmp_path):
    """Real torchrun: the first generation is stopped; the second finds the marker and exits with 3 without a step."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, sys, time\n"
        "from megatron_doremi.cluster.signals import Signals\n"
        "signals = Signals(os.environ)\n"
        "signals.install()\n"
        f"open('{tmp_path}/starts', 'a').write(os.environ['TORCHELASTIC_RESTART_COUNT'])\n"
        "signals.begin()\n"
        "signals.finish(3)\n"
        "sys.exit(3)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "1", str(script)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert process.returncode == 1
    assert (tmp_path / "starts").read_text() == "0"
    assert "a stop was requested before the launcher restarted this process" in process.stderr
    assert "exitcode  : 3" in process.stderr
