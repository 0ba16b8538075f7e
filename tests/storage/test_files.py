"""Names of temporary files, which processes of several hosts write into one folder.

Run alone: python -m pytest tests/storage/test_files.py
"""

from __future__ import annotations

from megatron_doremi.storage import files
from megatron_doremi.storage.files import atomic_write_text, temporary_beside


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
