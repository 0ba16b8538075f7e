"""What a run shows of work that takes a while, in a log file and at a terminal.

Run alone: python -m pytest tests/test_progress.py
"""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import termios
import time

import pytest

from megatron_doremi import progress
from megatron_doremi.console import COLUMNS, shortened, with_clock, wrapped
from megatron_doremi.progress import LinePacer, Progress, duration, stage


def test_a_log_file_gets_few_lines_at_any_length_of_a_run():
    def lines(seconds):
        pacer = LinePacer(0.0)
        return sum(pacer.due(now) for now in range(seconds + 1))

    # 5, 10, 15, 23, 35, 53 seconds after the start, then every minute from two minutes on.
    assert lines(60) == 6
    assert lines(3600) - lines(1800) == 30
    assert lines(86400) < 1450


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 00 s"), (249, "4 min 09 s"), (7500, "2 h 05 min"), (273600, "3 d 04 h")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_lines_are_wrapped_between_words_below_the_clock():
    now = time.struct_time((2026, 11, 26, 16, 5, 9, 3, 330, 0))
    lines = with_clock("a: 1\n  " + "word " * 60 + "/" + "x" * 150, now).splitlines()
    assert lines[0] == "16:05:09 a: 1"
    assert [len(line) <= COLUMNS for line in lines] == [True] * (len(lines) - 1) + [False]
    assert all(line.startswith(" " * 11) for line in lines[1:])
    assert "".join(lines[1:]).split() == ["word"] * 60 + ["/" + "x" * 150]
    assert wrapped("short  line") == ["short  line"]
    assert shortened("a" * 50 + "b" * 50, 9) == "aaa...bbb"


def test_a_stage_is_announced_only_if_it_takes_long(monkeypatch, capsys):
    with stage("a quick stage"):
        pass
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(progress, "_SILENT_SECONDS", 0.05)
    monkeypatch.setattr(progress, "_SHORTEST_PAUSE", 0.05)
    with stage("loading"):
        time.sleep(0.3)
    with stage("elsewhere", shown=False):
        time.sleep(0.1)
    printed = [line[9:] for line in capsys.readouterr().out.splitlines()]
    assert printed[:2] == ["loading ...", "loading ... 0 s"]
    assert printed[-1] == "loading: done in 0 s"

    def fail():
        with stage("failing"):
            time.sleep(0.2)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert "done" not in capsys.readouterr().out


def test_progress_in_a_log_file_never_passes_all(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_SHORTEST_PAUSE", 0.0)
    with Progress("scoring", 100, "window") as bar:
        bar.update(30)
        bar.skip(40)
        bar.update(90)
    printed = capsys.readouterr()
    lines = [re.sub(r"[\d,]+ windows/s, .* left", "RATE", line[9:]) for line in printed.out.splitlines()]
    assert lines == ["scoring: 30 of 100 windows (30 %), RATE", "scoring: 120 of 120 windows (100 %), RATE"]
    assert printed.err == ""


TERMINAL = """
import time
from megatron_doremi.console import print_stderr, say
from megatron_doremi.progress import Progress
with Progress("scoring", 9, "window", delay=0.0) as bar:
    for number in range(9):
        time.sleep(0.02)
        bar.update(1)
        say(f"line {number}")
        print_stderr("warning: odd")
"""


def test_at_a_terminal_lines_stand_above_the_bar():
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    process = subprocess.Popen([sys.executable, "-c", TERMINAL], stdout=theirs, stderr=theirs)
    os.close(theirs)
    text = b""
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:
            break
        if not part:
            break
        text += part
    assert process.wait() == 0
    os.close(ours)
    # What a carriage return has not overwritten.
    lines = [line.rstrip("\r").rsplit("\r", 1)[-1].strip() for line in text.decode().split("\n")]
    assert [line[9:] for line in lines if "line" in line] == [f"line {number}" for number in range(9)]
    assert lines.count("warning: odd") == 9
    assert b"scoring:" in text
