"""Names of temporary files, which processes of several hosts write into one folder; files that cannot be read.

Run alone: python -m pytest tests/storage/test_files.py
"""

from __future__ import annotations

import os
import re

import pytest

from megatron_doremi.errors import ConfigError
from megatron_doremi.storage import files
from megatron_doremi.storage.files import atomic_write_text, read_json_object, temporary_beside
from megatron_doremi.storage.yaml_file import read_yaml_mapping


def test_no_two_writers_share_a_temporary_name(tmp_path, monkeypatch):
    """On two hosts two processes may have the same number, and threads of one process have."""
    monkeypatch.setattr(files.os, "getpid", lambda: 7)
    names = set()
    for host in ("node1", "node2"):
        monkeypatch.setattr(files.socket, "gethostname", lambda host=host: host)
        for _ in range(50):
            temporary = temporary_beside(tmp_path / "domains.json")
            assert host in temporary.name
            assert temporary.name.startswith(".domains.json.")
            names.add(temporary)
    assert len(names) == 100


def test_long_names_fit_the_file_system(tmp_path):
    path = tmp_path / ("\u00e9" * 120 + ".json")
    atomic_write_text(path, "text")
    assert path.read_text() == "text"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_file_is_named_with_what_is_like_it(tmp_path):
    (tmp_path / "proxy").mkdir()
    file = tmp_path / "proxy" / "domain_weights.json"
    file.write_text("\ufeff{}", encoding="utf-8")
    assert read_json_object(file, "weights") == {}
    for wrong in (tmp_path / "prxy" / file.name, file.with_name("domain_weight.json")):
        with pytest.raises(ConfigError, match="no such file\n.*\n.*" + re.escape(f"did you mean {file}?")):
            read_json_object(wrong, "weights")
    with pytest.raises(ConfigError, match="remedy: make one"):
        read_json_object(tmp_path / "x" / "y.json", "weights", "make one")
    with pytest.raises(ConfigError, match="weights: a folder"):
        read_json_object(tmp_path, "weights")


@pytest.mark.parametrize("read", [read_json_object, read_yaml_mapping])
def test_what_is_no_file_of_text_is_refused(tmp_path, read):
    """A pipe was waited for without end, and a device read until memory was full."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "utf-16").write_text('{"a": 1}', encoding="utf-16")
    with (tmp_path / "large").open("wb") as file:
        file.truncate((1 << 30) + 1)
    cases = {"pipe": "a pipe or a device", "utf-16": "save it as UTF-8", "large": "1,073,741,825 bytes"}
    for name, said in {**cases, "/dev/zero": "a pipe or a device"}.items():
        with pytest.raises(ConfigError, match=said):
            read(tmp_path / name, name)
