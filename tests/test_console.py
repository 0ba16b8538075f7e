"""A console that cannot be written to: programs finish their work and exit with their own code.

Run alone: python -m pytest tests/test_console.py
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from megatron_doremi.console import CONSOLE_ERRORS, BestEffortWriter, command_lines, print_stdout, warn

PROGRAM = """
import sys
from megatron_doremi.console import CONSOLE_ERRORS, BestEffortWriter, print_stdout, warn
from megatron_doremi.errors import RunError, run_or_exit

def main():
    write = BestEffortWriter("the console", CONSOLE_ERRORS)
    for number in range(3000):
        print_stdout(f"line {number} \\u00e9\\u4e2d")
        write(lambda: print("progress", file=sys.stdout, flush=True))
    warn("the last warning")
    open(sys.argv[1], "w").write("done")
    {ending}

run_or_exit(main)
"""


def run(tmp_path, ending, stdout, stderr=subprocess.PIPE, **environ):
    marker = tmp_path / "marker"
    marker.unlink(missing_ok=True)
    program = [sys.executable, "-c", PROGRAM.replace("{ending}", ending), str(marker)]
    process = subprocess.run(program, stdout=stdout, stderr=stderr, env={**os.environ, **environ})
    assert marker.read_text() == "done"
    return process


def closed_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("full", [False, True])
def test_a_closed_or_full_stdout_does_not_end_the_program(full, tmp_path):
    for ending, code in (("return 0", 0), ("return 3", 3), ("raise RunError('machine')", 1)):
        stdout = os.open("/dev/full", os.O_WRONLY) if full else closed_pipe()
        process = run(tmp_path, ending, stdout)
        os.close(stdout)
        assert process.returncode == code
        stderr = process.stderr.decode()
        assert "Traceback" not in stderr
        assert "Exception ignored" not in stderr
        assert stderr.count("the console cannot be written") == full, (
            "print_stdout() has detected the closed pipe before"
        )
        assert "warning: the last warning" in stderr
        assert ("error: machine" in stderr) == (code == 1)


def test_without_any_stream(tmp_path):
    program = [sys.executable, "-c", PROGRAM.replace("{ending}", "return 3"), str(tmp_path / "marker")]
    closed = subprocess.run(["bash", "-c", 'exec "$@" >&- 2>&-', "bash", *program])
    assert closed.returncode == 3
    assert (tmp_path / "marker").read_text() == "done"


def test_a_warning_goes_to_stdout_if_stderr_is_closed(tmp_path):
    process = run(tmp_path, "return 0", subprocess.PIPE, closed_pipe())
    assert process.returncode == 0
    assert b"warning: the last warning" in process.stdout


def test_an_ascii_console(tmp_path):
    process = run(tmp_path, "return 0", subprocess.PIPE, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert process.returncode == 0
    assert b"line 0 \\xe9\\u4e2d\n" in process.stdout


@pytest.mark.parametrize(("ending", "code"), [("print('x' * 10**6)", 141), ("open('/nowhere/file', 'w')", 1)])
def test_exit_codes_and_messages_of_machine_errors(ending, code, tmp_path):
    program = f"from megatron_doremi.errors import run_or_exit\ndef main():\n    {ending}\nrun_or_exit(main)"
    stdout = closed_pipe()
    process = subprocess.run([sys.executable, "-c", program], stdout=stdout, stderr=subprocess.PIPE)
    os.close(stdout)
    assert process.returncode == code
    assert process.stderr == (b"" if code == 141 else b"error: /nowhere/file: No such file or directory\n")


def test_best_effort_writes_suppress_only_the_given_errors(capsys):
    """A ValueError comes from a closed stream; anywhere else it is a bug."""

    def closed():
        raise ValueError("I/O operation on closed file")

    def full():
        raise OSError(28, "No space left on device")

    BestEffortWriter("the console", CONSOLE_ERRORS)(closed)
    metrics = BestEffortWriter("metrics.jsonl")
    metrics(full)
    assert capsys.readouterr().err.count("cannot be written") == 2
    with pytest.raises(ValueError, match="closed file"):
        metrics(closed)


def test_no_line_is_longer_than_120_columns(capsys):
    """Words, such as paths and flags, are never split; what is shorter is printed as it is."""
    path = "/data/" + "long-name/" * 12 + "domains.json"
    words = "a rule of a fault, with many words --tensor-model-parallel-size 2 " * 4
    print_stdout(f"  {words}\n\ttable   with   spaces")
    warn(f"{path} is missing; {words}")
    printed = capsys.readouterr()
    for text, message in ((printed.out, words), (printed.err, f"warning: {path} is missing; {words}")):
        lines = text.splitlines()
        assert all(len(line) <= 120 or path in line for line in lines)
        assert message.split() == text.split()[: len(message.split())]
    assert printed.out.splitlines()[1].startswith("      ")
    assert printed.out.endswith("\n\ttable   with   spaces\n")
    assert command_lines(["--a", *["--bcdefgh 1"] * 10]) == ["--a" + " --bcdefgh 1" * 9 + " \\", "    --bcdefgh 1"]
