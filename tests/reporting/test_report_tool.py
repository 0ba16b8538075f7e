"""tools/report.py from end to end: files, nothing external, all escaped, faults without traceback."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from megatron_doremi.errors import ConfigError
from megatron_doremi.reporting import plots
from megatron_doremi.reporting.assemble import plain_numbers, unique_labels
from megatron_doremi.reporting.evaluations import Evaluation

TOOL = Path(__file__).resolve().parents[2] / "tools" / "report.py"
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
ODD = "<b>&"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("report_tool", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _References(HTMLParser):
    """Collects what a browser would load, and the tags."""

    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]


def parsed(html: str) -> _References:
    parser = _References()
    parser.feed(html)
    return parser


def flags(runs: dict[str, Path], manifest: Path, output: Path) -> list[str]:
    pairs = [
        *((f"--{name}", path) for name, path in runs.items()),
        ("--domains", manifest),
        ("--output-dir", output),
    ]
    return [str(part) for pair in pairs for part in pair]


def test_comparison_writes_everything(tool, three_runs, write_manifest, tmp_path, capsys):
    manifest = write_manifest({"code": 600, "noise": 300, "boilerplate": 100})
    assert tool.main(flags(three_runs, manifest, tmp_path / "out")) == 0
    printed = capsys.readouterr().out
    assert re.search(r"code +600 +0\.6000 +0\.7000 +0\.9000 +2\.750 +2\.500 +-0\.250", printed)
    written = {path.name: path for path in (tmp_path / "out").iterdir()}
    figures = {"proxy_weights", "proxy_excess_loss", "proxy_training_loss", "domain_weights", "held_out_loss"}
    assert set(written) == {f"{each}.png" for each in (*figures, "held_out_over_time")} | {
        "report.html",
        "results.json",
    }
    for name, path in written.items():
        if name.endswith(".png"):
            assert path.read_bytes().startswith(PNG_MAGIC)
    results = json.loads(written["results.json"].read_text())
    assert results["domains"][1]["difference"] == 0.25
    assert results["worst"]["main_domain"] == "noise"
    assert results["statements"][0].startswith("main is better than the baseline on 1 of 3 domains")
    page = parsed(written["report.html"].read_text())
    assert len(page.references) == 6
    assert all(each.startswith("data:image/png;base64,") for each in page.references)
    assert not page.tags & {"script", "link", "iframe"}


def test_whatever_comes_from_files_is_escaped(tool, write_run, rows, tmp_path, capsys):
    proxy_row, evaluation_row = rows
    lines = [proxy_row(1, {ODD: 0.4, "_a$x$": 0.6}), evaluation_row(1, {ODD: 1.0, "_a$x$": 2.0}, 1.5)]
    config = {"run": {"phase": "proxy", "domains": '"><script>alert(1)</script>'}, ODD: 1}
    path = write_run("odd", lines, config=config)
    assert tool.main([str(path)]) == 0
    assert ODD in capsys.readouterr().out
    html = (path / "report" / "report.html").read_text()
    assert "<td>&lt;b&gt;&amp;</td>" in html
    assert not parsed(html).tags & {"b", "script"}
    assert "_a$x$" in html


def test_several_runs_stand_side_by_side(tool, three_runs, tmp_path, capsys):
    arguments = [str(path) for path in three_runs.values()] + ["--output-dir", str(tmp_path / "out")]
    assert tool.main(arguments) == 0
    printed = capsys.readouterr().out
    assert re.search(r"domain +main @2 +baseline @2", printed)
    assert re.search(r"noise +5\.750 +5\.500", printed)
    assert (tmp_path / "out" / "proxy_weights.png").is_file()
    assert (tmp_path / "out" / "held_out_over_time.png").is_file()
    assert json.loads((tmp_path / "out" / "results.json").read_text())["runs"]["proxy"]["phase"] == "proxy"


def test_missing_folders_end_with_two_and_no_traceback(tmp_path):
    arguments = [
        "--proxy",
        "no-p",
        "--main",
        "no-m",
        "--baseline",
        "no-b",
        "--domains",
        "d.json",
        "--output-dir",
        "o",
    ]
    done = subprocess.run([sys.executable, TOOL, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "4 faults" in done.stderr
    assert "Traceback" not in done.stderr
    assert all(each in done.stderr for each in ("no-p", "no-m", "no-b", "d.json"))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [([], "RUN"), (["r", "--main", "m"], "--main"), (["--main", "m"], "--output-dir")],
)
def test_flags_that_do_not_go_together(tool, arguments, named):
    with pytest.raises(ConfigError, match=named):
        tool.parse(arguments)


def test_an_output_folder_that_cannot_be_made_is_a_fault(tool, three_runs, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--output-dir"):
        tool.main([str(three_runs["main"]), "--output-dir", str(tmp_path / "file" / "out")])


def test_many_domains_keep_different_looks():
    looks = {str(plots._look(index)) for index in range(32)}
    assert len(looks) == 32


def test_figures_of_22_domains_and_of_one_step():
    names = [f"domain {index}" for index in range(22)]
    weights = np.full((1, 22), 1 / 22)
    figure = plots.weights_over_time(np.array([1]), weights, names, 1e-3 / 22)
    assert plots.png(figure).startswith(PNG_MAGIC)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(labels) == 24
    history = [Evaluation(step, dict.fromkeys(names, 1.0 / step), None) for step in (1, 2)]
    assert plots.png(plots.evaluations_over_time({"main": history}, names)).startswith(PNG_MAGIC)


def test_smoothing_keeps_the_first_value_and_skips_gaps():
    values = np.ones((600, 2))
    values[0] = 100.0
    values[50:60, 1] = np.nan
    smoothed = plots.smooth(values)
    assert smoothed[0].tolist() == [100.0, 100.0]
    assert smoothed[40:].min() == smoothed[40:].max() == 1.0


def test_labels_and_numbers_fit_for_files():
    assert unique_labels(["a/b", "a b", "..", "x"]) == ["a_b", "a_b-2", "run", "x"]
    assert plain_numbers({"a": [float("nan"), 1.0], 2: (float("inf"),)}) == {"a": [None, 1.0], "2": [None]}
