"""Command blocks of README.md, CONTRIBUTING.md, docs/ and examples/: run here, by another test, or a reason why not.

One HTML comment directly above a fence of bash says which:

    <!-- test: run -->                         run here; expected output may follow in a fence of text
    <!-- test: tests/test_quickstart.py -->    that test runs these scripts
    <!-- not run: submits a SLURM job -->      the reason why no test runs it

The blocks of a document are one script (a reader's terminal), which runs in a copy of the repository with a few sizes
reduced (`REDUCED`). `<!-- setup: COMMANDS -->` is a block that readers do not see. A document with
`<!-- after: README.md -->` starts with the files and variables that README.md's blocks leave.

Run alone: python -m pytest tests/test_command_blocks.py
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
# Sizes of a document's commands, and what stands for them here. Everything else runs as written.
REDUCED = (
    (r"--train-iters \d+", "--train-iters 4"),
    (r"--save-interval \d+", "--save-interval 2"),
    (r"@\d+\b", "@2"),
    (r"--step \d+", "--step 4"),
    (r"--vocab-size \d{5}\b", "--vocab-size 1024"),
    (r"for seed in 1 2 3", "for seed in 1 2"),
    (r" runs/[a-z]+-3\b", ""),
    (r"tools/embedded_corpus\.py(?!.*--domain-bytes)", r"\g<0> --domain-bytes 40000 --valid-fraction 0.3"),
)
PYTHON = Path(sys.executable)
SECONDS = 600.0  # of a document's script; about a minute on a quiet machine
MARKER = re.compile(r"<!-- (test|not run): (.+) -->")
SCRIPT = re.compile(r"[\w./-]+\.(?:py|sh|sbatch)\b")
COMMAND = re.compile(r"(?:[A-Z_]+=\S* )*(?:bash|python|pip|sbatch|srun|cp|cd|export) ")


@dataclass(frozen=True)
class Block:
    """A fence of bash, or a setup comment; `shown` is the output that the document prints below it."""

    line: int
    marker: str
    commands: str
    shown: str = ""


@dataclass(frozen=True)
class Document:
    after_readme: bool
    blocks: tuple[Block, ...]
    faults: tuple[str, ...]


def read_blocks(text: str) -> Document:
    """The command blocks of a Markdown text, with a fault for each command outside of one."""
    lines = text.splitlines()
    blocks: list[Block] = []
    faults: list[str] = []
    after_readme = False
    at = end_of_block = 0
    while at < len(lines):
        line = lines[at]
        if line.startswith("```"):
            end = next(n for n in range(at + 1, len(lines)) if lines[n].startswith("```"))
            body = "\n".join(lines[at + 1 : end])
            above = lines[at - 1] if at else ""
            if line == "```bash":
                blocks.append(Block(at + 1, above, body))
                end_of_block = end
            elif line in ("```sh", "```shell", "```console"):
                faults.append(f"line {at + 1}: write ```bash")
            elif line == "```text" and blocks and not "".join(lines[end_of_block + 1 : at]).strip():
                blocks[-1] = replace(blocks[-1], shown=body)
            at = end
        elif line.startswith("<!-- setup:"):
            end = next(n for n in range(at, len(lines)) if lines[n].endswith("-->"))
            body = "\n".join(lines[at : end + 1])
            blocks.append(Block(at + 1, "setup", body.removeprefix("<!-- setup:").removesuffix("-->").strip()))
            at = end
        elif line == "<!-- after: README.md -->":
            after_readme = True
        elif line.startswith("    ") and COMMAND.match(line.strip()):
            faults.append(f"line {at + 1}: a command outside of a fence of bash: {line.strip()}")
        at += 1
    return Document(after_readme, tuple(blocks), tuple(faults))


def marker_fault(block: Block, root: Path) -> str:
    """What is wrong with a block's marker, or an empty text."""
    if block.marker in ("setup", "<!-- test: run -->"):
        return ""
    marker = MARKER.fullmatch(block.marker)
    if not marker:
        return (
            f"line {block.line}: no marker on the line above the fence; write <!-- test: run -->, "
            "<!-- test: tests/... --> or <!-- not run: the reason -->"
        )
    if marker[1] == "not run":
        return ""
    tests = [root / name for name in marker[2].split()]
    missing = [name for name, path in zip(marker[2].split(), tests, strict=True) if not path.is_file()]
    if missing:
        return f"line {block.line}: no such test: {' '.join(missing)}"
    sources = "".join(path.read_text() for path in tests)
    scripts = [name for name in SCRIPT.findall(re.sub(r" #.*", "", block.commands)) if (root / name).is_file()]
    unnamed = [name for name in scripts if Path(name).name not in sources]
    if unnamed:
        return f"line {block.line}: {marker[2]} does not name {' '.join(unnamed)}"
    return "" if scripts else f"line {block.line}: no script that {marker[2]} could run"


def missing_output(shown: str, printed: str) -> list[str]:
    """Lines of a shown output that were not printed, in this order. Numbers differ between runs, so a word with a digit
    stands for any such word; an ellipsis stands for anything."""
    everything, at = " ".join(printed.split()), 0
    missing = []
    for line in shown.splitlines():
        for part in filter(str.strip, line.split("...")):
            words = [r"\S*\d\S*" if re.search(r"\d", word) else re.escape(word) for word in part.split()]
            match = re.compile(" ".join(words)).search(everything, at)
            if match:
                at = match.end()
            else:
                missing.append(line)
    return missing


def reduced(commands: str) -> str:
    for pattern, smaller in REDUCED:
        commands = re.sub(pattern, smaller, commands)
    return commands


def copy_repository(to: Path) -> Path:
    """Copies all files that git tracks or would track."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    return to


def run_blocks(blocks: list[Block], folder: Path, python: Path = PYTHON) -> list[str]:
    """Runs blocks as one script in `folder`, which is changed; returns what each of them printed.

    `python` is what the blocks call by that name. Variables that they set are kept in `folder`.variables, which the
    script of a later document reads.

    Raises:
        AssertionError: a block failed, or the script did not end in time.
    """
    variables = folder.with_name(folder.name + ".variables")
    names = sorted({name for block in blocks for name in re.findall(r"^(?:export )?([A-Z_]+)=", block.commands, re.M)})
    separator = "-- end of a block --"
    script = ["set -euo pipefail", f"[ ! -e '{variables}' ] || source '{variables}'"]
    for block in blocks:
        script += [reduced(block.commands), f"echo '{separator}'"]
    script.append(f"declare -p {' '.join(names)} > '{variables}' 2> /dev/null || true")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    search = f"{python.parent}:{PYTHON.parent}:{os.environ['PATH']}"
    environment |= {"PATH": search, "PYTHON": str(python), "OMP_NUM_THREADS": "1"}
    output = folder.with_name(folder.name + ".output")
    with output.open("w") as log:
        process = subprocess.Popen(
            ["bash", "-c", "\n".join(script)],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            code: int | str = process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = f"none after {SECONDS:.0f} s"
    printed = output.read_text().split(separator + "\n")
    if code != 0:
        block = blocks[len(printed) - 1]
        where = f"the block at line {block.line} failed (exit code {code})"
        pytest.fail(f"{where}:\n{reduced(block.commands)}\n\n{printed[-1][-3000:]}", pytrace=False)
    return printed[:-1]


def documents() -> list[Path]:
    folders = [*(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
    return [README, ROOT / "CONTRIBUTING.md", *sorted(folders)]


def runnable(path: Path) -> list[Block]:
    return [block for block in read_blocks(path.read_text()).blocks if block.marker in ("setup", "<!-- test: run -->")]


def check_outputs(blocks: list[Block], printed: list[str]) -> None:
    faults = []
    for block, text in zip(blocks, printed, strict=True):
        missing = missing_output(block.shown, text)
        if missing:
            lines = "\n".join(missing)
            faults.append(f"the block at line {block.line} does not print:\n{lines}\n\nbut:\n{text[-3000:]}")
    if faults:
        pytest.fail("\n\n".join(faults), pytrace=False)


@pytest.fixture(scope="module")
def scripts(tmp_path_factory, ready_python):
    """{path of a document: its folder, and a future of what its blocks print}. README.md, by Python itself, and the
    documents that do not need it, by one that has imported what it needs, run two at a time."""

    def run(path: Path, folder: Path) -> list[str]:
        return run_blocks(runnable(path), copy_repository(folder), PYTHON if path == README else ready_python)

    with ThreadPoolExecutor(2) as pool:
        futures = {}
        for path in documents():
            if runnable(path) and not read_blocks(path.read_text()).after_readme:
                folder = tmp_path_factory.mktemp("document") / "repository"
                futures[path] = folder, pool.submit(run, path, folder)
        yield futures


@pytest.mark.parametrize(
    ("above", "command", "words"),
    [
        ("", "bash tests/run.sh", "no marker"),
        ("<!-- run -->", "bash tests/run.sh", "no marker"),
        ("<!-- not run: -->", "bash tests/run.sh", "no marker"),
        ("<!-- test: tests/test_nothing.py -->", "bash tests/run.sh", "no such test: tests/test_nothing.py"),
        ("<!-- test: tests/test_errors.py -->", "bash tests/run.sh", "does not name tests/run.sh"),
        ("<!-- test: tests/test_errors.py -->", "true  # tests/test_errors.py", "no script"),
    ],
)
def test_a_wrong_marker_is_found(above, command, words):
    (block,) = read_blocks(f"Text.\n{above}\n```bash\n{command}\n```\n").blocks
    assert words in marker_fault(block, ROOT)


def test_commands_outside_of_a_fence_are_found():
    faults = read_blocks("    bash tests/run.sh\n\n```sh\nbash tests/run.sh\n```\n    A=1 python x.py\n").faults
    assert [fault.split(":")[0] for fault in faults] == ["line 1", "line 3", "line 6"]


def test_what_is_shown_is_compared_up_to_numbers():
    text = "<!-- test: run -->\n```bash\ndate\n```\n\n```text\n19:24:22 step 4 | loss\na sum: 3 of 4 ...\n  ...\n```\n"
    (block,) = read_blocks(text).blocks
    assert missing_output(block.shown, "19:24:25   step 9 | loss\na  sum: 7 of 8 or so") == []
    assert missing_output(block.shown, "19:24:25 stop 9 | loss\na sum: 7 of 8") == ["19:24:22 step 4 | loss"]
    assert missing_output(block.shown, "19:24:25 step 9 |\na sum: 7 of 8") == ["19:24:22 step 4 | loss"]
    assert missing_output(block.shown, "a sum: 7 of 8\n19:24:25 step 9 | loss") == ["a sum: 3 of 4 ..."]


def test_a_failing_block_is_named(tmp_path):
    (tmp_path / "copy").mkdir()
    blocks = [Block(1, "", "A=1\ntrue"), Block(5, "", 'echo "A is $A"\nfalse | cat')]
    with pytest.raises(pytest.fail.Exception, match=r"line 5 failed \(exit code 1\)[^$]*\$A[^$]*A is 1"):
        run_blocks(blocks, tmp_path / "copy")
    assert run_blocks(blocks[:1], tmp_path / "copy") == [""]
    assert run_blocks([Block(1, "", "echo $A")], tmp_path / "copy") == ["1\n"]


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_block_is_marked(path):
    document = read_blocks(path.read_text())
    faults = [*document.faults, *filter(None, (marker_fault(block, ROOT) for block in document.blocks))]
    assert not faults, "\n".join(faults)


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [path for path in documents() if runnable(path)], ids=lambda path: str(path.relative_to(ROOT))
)
def test_the_blocks_of_a_document(path, tmp_path, scripts, ready_python):
    blocks = runnable(path)
    if path in scripts:
        printed = scripts[path][1].result()
    else:
        before, script = scripts[README]
        script.result()
        folder = tmp_path / "repository"
        shutil.copytree(before, folder, symlinks=True)
        shutil.copy2(f"{before}.variables", f"{folder}.variables")
        printed = run_blocks(blocks, folder, ready_python)
    check_outputs(blocks, printed)
