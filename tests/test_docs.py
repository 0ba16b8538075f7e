"""README.md and docs/: links lead somewhere, named tests, tools and flags exist.

Run alone: python -m pytest tests/test_docs.py
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_doremi.arguments import build_parser

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FLAG_OF_THE_PROGRAM = re.compile(r"pretrain_doremi\.py((?:\\\n|[^\n`])*)")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_what_a_document_names_exists(path):
    text = path.read_text()
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not (path.parent / link).exists()] == []
    files = set(re.findall(r"\b(?:tests|tools|examples|benchmarks)/[\w./]+\.(?:py|sh|sbatch|json)\b", text))
    assert [name for name in sorted(files) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_flags_in_commands_of_the_program_exist(path):
    known = {flag for action in build_parser()._actions for flag in action.option_strings}
    commands = FLAG_OF_THE_PROGRAM.findall(path.read_text())
    used = {flag for command in commands for flag in re.findall(r"(?<!\S)--[a-z][\w-]*", command)}
    assert used <= known


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_prose_fits_into_120_columns(path):
    """Tables and what programs print may be wider."""
    prose, in_block = [], False
    for line in path.read_text().splitlines():
        in_block ^= line.startswith("```")
        if not in_block and not line.lstrip().startswith("|") and not line.startswith("    "):
            prose.append(line)
    assert [line for line in prose if len(line) > 120] == []


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
