"""Signals, the launcher's death and restarts, on processes of their own whose main thread hangs.

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
# Starts the worker that it is told, in a session of its own, and waits.
LAUNCHER = "import subprocess, sys; subprocess.Popen(sys.argv[1:], start_new_session=True).wait()"


def start(*words: str, **environ: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [*WORKER, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environ}
    )
    assert process.stdout.readline().startswith("ready")
    return process


def end(process: subprocess.Popen, *signals: signal.Signals | float) -> tuple[int, str, str]:
    """Sends the signals, waiting the seconds between them, and returns exit code, stdout and stderr."""
    for each in signals:
        if isinstance(each, signal.Signals):
            process.send_signal(each)
        else:
            time.sleep(each)
    out, err = process.communicate(timeout=20)
    return process.returncode, out, err


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_before_the_first_step_a_signal_leaves_at_once_with_3(number):
    """Version 0.1 lost everything at SIGINT, SIGHUP, SIGUSR2, SIGXCPU, and ignored SIGTERM and SIGUSR1 here."""
    code, _, err = end(start("starting"), number)
    assert code == 3
    assert err == f"stopped by {number.name} before the first step: nothing to save\n"


def test_a_signal_that_comes_twice_within_a_moment_is_one_request():
    """As from a terminal, whose Ctrl-C torchrun passes on besides."""
    assert end(start("training", "1.5"), signal.SIGINT, 0.1, signal.SIGINT) == (3, "saving\nsaved\n", "")


def test_a_second_signal_leaves_at_once_with_128_and_its_number():
    code, out, err = end(start("training", "60"), signal.SIGUSR1, 1.3, signal.SIGTERM)
    assert (code, out) == (128 + signal.SIGTERM, "saving\n")
    assert err == "terminated by a second signal, SIGTERM: steps since the last checkpoint are lost\n"


def test_once_all_is_saved_a_signal_changes_no_exit_code():
    assert end(start("done"), signal.SIGTERM)[0] == 0


def test_a_peer_that_cannot_be_told_changes_no_exit_code():
    """Telling the others took longer than an alarm of 10 s: 142 in place of 3."""
    assert end(start("untold"), signal.SIGTERM)[0] == 3


def test_a_done_process_that_hangs_in_its_exit_is_ended_with_its_code():
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
    ("ending", "code", "words"),
    [
        ("raise errors.RunError('the disk is full')", 1, "error: the disk is full\n"),
        ("raise errors.ReportedElsewhere(2)", 2, ""),
        ("raise ZeroDivisionError('ours')", 1, "Traceback .*ZeroDivisionError: ours\n"),
    ],
)
def test_a_thread_that_hangs_keeps_no_process_that_failed(ending, code, words):
    """The interpreter joins every executor's thread at its end, such as one in a hung fsync: the program does not."""
    command = [sys.executable, "-c", HANGS.replace("{ending}", ending)]
    done = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True, timeout=10, check=False)
    assert done.returncode == code
    assert done.stdout == "on stdout"
    assert re.fullmatch(words, done.stderr, re.DOTALL)


@pytest.mark.parametrize(
    ("words", "saved"), [(["starting"], False), (["training", "0.5"], True), (["training"], False)]
)
def test_a_worker_ends_with_its_launcher(words, saved):
    """Killed, so that it can tell nobody: what can be saved is saved, what hangs is ended."""
    environ = {**os.environ, **LAUNCHED}
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, *WORKER, *words], stdout=subprocess.PIPE, text=True, env=environ
    )
    worker = int(re.fullmatch(r"ready (\d+)\n", launcher.stdout.readline())[1])
    launcher.kill()
    launcher.wait()
    limit = time.monotonic() + 10
    while process_start(worker) is not None:
        assert time.monotonic() < limit, "an orphan"
        time.sleep(0.05)
    assert ("saved" in launcher.stdout.read()) == saved


def test_plain_python_outlives_the_shell_that_started_it():
    """As under nohup or setsid."""
    shell = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, *WORKER, "starting"], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    worker = int(shell.stdout.readline().split()[1])
    shell.kill()
    shell.wait()
    time.sleep(2.5)
    assert process_start(worker) is not None
    os.kill(worker, signal.SIGKILL)


def test_torchrun_does_not_restart_a_stop_that_was_asked_for(tmp_path):
    """Real torchrun: the first generation is stopped, the second finds that out and leaves with 3, without a step."""
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
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert (tmp_path / "starts").read_text() == "0"
    assert "a stop was requested before the launcher restarted this process" in done.stderr
    assert "exitcode  : 3" in done.stderr
