"""How a program reports what is wrong with its input.

Run alone: python -m pytest tests/test_errors.py
"""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_doremi.errors import ConfigError, Fault, machine_failure, raise_if_any
from megatron_doremi.flag_parser import FlagParser
from megatron_doremi.storage.files import atomic_write_text, make_folder
from megatron_doremi.version import version_text

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
from megatron_doremi import errors
def main():
    raise errors.ConfigError([errors.Fault("--lr", "fast", "a number", "give one"), errors.Fault("--x", "", "r", "m")])
errors.run_or_exit(main)
"""


def test_a_message_holds_every_fault():
    with pytest.raises(ConfigError) as caught:
        raise_if_any([Fault("--lr", "fast", "a number", "give one"), Fault("file", "", "be there", "make it")])
    assert str(caught.value).splitlines() == [
        "2 faults in the input:",
        "  [1] --lr: fast",
        "      rule:   a number",
        "      remedy: give one",
        "  [2] file",
        "      rule:   be there",
        "      remedy: make it",
    ]
    raise_if_any([])


def test_a_rule_that_many_faults_break_stands_once():
    same = [Fault(f"domain {number}", "short", "long", "add text") for number in range(15)]
    with pytest.raises(ConfigError) as caught:
        raise_if_any([*same, Fault("--x", "", "r", "m"), *same[:2]])
    lines = str(caught.value).splitlines()
    assert lines[:2] == ["18 faults in the input:", "  [1] domain 0: short"]
    assert lines[10:] == [
        "  [10] domain 9: short",
        "  and 5 more like these",
        "      rule:   long",
        "      remedy: add text",
        "  [16] --x",
        "      rule:   r",
        "      remedy: m",
        "  [17] domain 0: short",
        "  [18] domain 1: short",
        "      rule:   long",
        "      remedy: add text",
    ]


def test_a_full_disk_is_reported_with_its_path_and_a_remedy(tmp_path, monkeypatch):
    """A failed write names no file by itself."""

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("megatron_doremi.storage.files.os.fsync", full)
    with pytest.raises(OSError, match="No space") as caught:
        atomic_write_text(tmp_path / "t.json", "x")
    message = str(machine_failure(caught.value))
    assert message.startswith(f"{tmp_path / 't.json'}: No space left on device; free disk space")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_found_at_once(tmp_path):
    with pytest.raises(ConfigError, match=r"--output: /proc: .*\n +rule: +a folder that this user can write to"):
        make_folder(Path("/proc"), "--output")
    make_folder(tmp_path / "a" / "b", "--output")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_parser_suggests_flags_and_collects_unknown_ones(capsys):
    parser = FlagParser(prog="tool")
    parser.add_argument("--input", required=True)
    command = parser.add_subparsers(dest="command").add_parser("show")
    command.add_argument("--first", type=int)
    for words, faults in (
        (["--inptu", "a", "--xyzzy"], ["--inptu: did you mean --input?", "--xyzzy: see --help for all flags"]),
        (["--input", "a", "show", "--frist=1"], ["--frist=1: did you mean --first?"]),
        (["--input"], ["argument --input: expected one argument: see --help"]),
        (["--input", "a", "show", "--first", "x"], ["argument --first: invalid int value: 'x': see --help"]),
    ):
        with pytest.raises(ConfigError) as caught:
            parser.parse_args(words)
        assert [f"{fault.value}: {fault.remedy}" for fault in caught.value.faults] == faults
    assert vars(parser.parse_args(["--input", "a"])) == {"input": "a", "command": None}
    with pytest.raises(SystemExit):
        parser.parse_args(["--version"])
    assert capsys.readouterr().out == f"{version_text()}\n"


def test_the_program_exits_with_2_and_without_a_traceback():
    process = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert process.stderr.startswith("error: 2 faults")
    assert "Traceback" not in process.stderr
