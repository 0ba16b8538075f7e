"""tools/report.py from end to end: files, nothing external, all escaped, faults without traceback.

Run alone: python -m pytest tests/reporting/test_report_tool.py
"""

from __future__ import annotations

import base64
import csv
import importlib.util
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest

from megatron_doremi.console import escape_unencodable_characters
from megatron_doremi.errors import ConfigError
from megatron_doremi.reporting.html import _visible as visible
from megatron_doremi.reporting.sections import plain_numbers, unique_labels

TOOL = Path(__file__).resolve().parents[2] / "tools" / "report.py"
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
ODD = "<b>&</script>"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("report_tool", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Page(HTMLParser):
    """Collects what a browser would load, the tags, and the texts of scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.tags: list[str] = []
        self.scripts: list[str] = []
        self.policy = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if ("http-equiv", "Content-Security-Policy") in attrs:
            self.policy = dict(attrs)["content"] or ""

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "script" and data.strip():
            self.scripts.append(data)


@pytest.fixture
def output(tool, three_runs, write_manifest, tmp_path, capsys):
    """What a comparison printed, and the folder that it wrote."""
    manifest = write_manifest({"code": 600, "noise": 300, "boilerplate": 100})
    flags = [f"--{name}={path}" for name, path in three_runs.items()]
    assert tool.main([*flags, f"--domains={manifest}", f"--output-dir={tmp_path / 'out'}"]) == 0
    return capsys.readouterr().out, tmp_path / "out"


def test_comparison_writes_everything(output):
    printed, folder = output
    assert re.search(r"code +0\.6000 +0\.7000 +2\.500 +2\.750 +-0\.250", printed)
    assert "One run of each cannot tell: main against baseline is +0.250 in the worst domain (noise) and" in printed
    assert "Planted domain noise lost weight in the mean over all steps (0.1400)" in printed
    written = {path.name: path for path in folder.iterdir()}
    charts = {"differences", "domain_weights", "domains_1", "held_out_loss", "held_out_over_time", "entropy"}
    charts |= {"weights_1", "excess_1", "training_loss", "training_loss_by_domain"}
    assert set(written) == {f"{each}.png" for each in charts} | {"report.html", "results.json"}
    assert all(path.read_bytes().startswith(PNG_MAGIC) for name, path in written.items() if name.endswith(".png"))
    results = json.loads(written["results.json"].read_text())
    comparison = results["comparisons"][0]
    assert comparison["domains"]["noise"]["difference"] == 0.25
    assert comparison["summary"]["worst domain"]["rival"] == [5.5]
    assert results["runs"]["proxy"]["mean_weights"]["code"] == pytest.approx(0.7)
    html = written["report.html"].read_text()
    page = Page(html)
    assert "default-src 'none'" in page.policy
    assert "unsafe-eval" not in page.policy
    assert page.tags.count("script") == 2
    # Anchors of the page, and CSV of every table.
    assert all(re.match(r"#|data:text/csv;charset=utf-8;base64,", each) for each in page.references)
    assert page.tags.count("table") == sum(each.startswith("data:") for each in page.references)
    # A still picture of every chart for two widths, in colors that follow dark mode.
    assert page.tags.count("svg") == 2 * len(charts)
    assert 'stroke="var(--s1)"' in html
    assert set(json.loads(page.scripts[0])) == charts
    encoded = next(each for each in page.references if each.startswith("data:")).split(",")[1]
    rows = list(csv.reader(io.StringIO(base64.b64decode(encoded).decode())))
    assert rows[1][:5] == ["baseline", "worst domain", "5.75", "5.5", "0.25"]


def test_whatever_comes_from_files_is_escaped(tool, write_run, rows, tmp_path, capsys):
    proxy_row, evaluation_row = rows
    lines = [proxy_row(1, {ODD: 0.4, "constructor": 0.6}), evaluation_row(1, {ODD: 1.0, "constructor": 2.0}, 1.5)]
    config = {
        "run": {"phase": "proxy", "domains": '"><script>alert(1)</script>'},
        ODD: 1,
        "versions": {"torch": "2.9.1"},
    }
    path = write_run("odd", lines, config=config)
    assert tool.main([str(path)]) == 0
    assert ODD in capsys.readouterr().out
    html = (path / "report" / "report.html").read_text()
    assert "&lt;b&gt;&amp;&lt;/script&gt;</td>" in html
    assert re.search(r"versions\.torch</td>\s*<td[^>]*>all runs</td>\s*<td[^>]*>2\.9\.1</td>", html)
    page = Page(html)
    assert "b" not in page.tags
    assert page.tags.count("script") == 2
    assert any(row[0] == ODD for row in json.loads(page.scripts[0])["held_out_loss"]["values"])


def test_numbers_at_their_edges_are_reported(tool, write_run, rows, tmp_path, capsys):
    """All weights 0, an evaluation all NaN, a name with a lone surrogate, names that differ by case."""
    proxy_row, evaluation_row = rows
    nan, odd = float("nan"), "\ud800 $x"
    names = [odd, "Code", "code"]
    lines = [proxy_row(n, dict.fromkeys(names, 0.0)) for n in (1, 2, 3)]
    lines += [{**evaluation_row(n, dict.fromkeys(names, nan), 1.0), "eval_token_mean": nan} for n in (1, 2)]
    path = write_run("p", lines, "proxy")
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    other = write_run("Q", [evaluation_row(n, {"Code": 1.0, "code": float("inf")}, 1.0) for n in (1, 2)])
    escape_unencodable_characters()
    assert tool.main([str(path), str(other), f"--output-dir={tmp_path / 'out'}"]) == 0
    assert "Domain names that differ only by case or spaces: 'Code', 'code'." in capsys.readouterr().out
    json.loads((tmp_path / "out" / "results.json").read_text())


def test_only_a_visible_difference_has_a_color():
    cells = {"better": "better", "[-0.2, -0.1]": "better", "[+0.100, +0.200]": "worse", "[-0.1, +0.1]": None}
    cells |= {"[0.000, +0.100]": None, "[0.376, 0.395]": None, "no difference seen": None, "-": None}
    assert {text: (visible(text) or [None])[0] for text in cells} == cells


def test_several_runs_stand_side_by_side(tool, three_runs, tmp_path, capsys):
    arguments = [str(path) for path in three_runs.values()] + ["--output-dir", str(tmp_path / "out")]
    assert tool.main(arguments) == 0
    printed = capsys.readouterr().out
    assert re.search(r"domain +learned +main +baseline\n", printed)
    assert re.search(r"noise +0\.1400 +5\.750 +5\.500", printed)
    assert "The runs are shown side by side and not compared" in printed
    assert json.loads((tmp_path / "out" / "results.json").read_text())["runs"]["proxy"]["phase"] == "proxy"


def test_missing_folders_end_with_two_and_no_traceback(tmp_path):
    arguments = ["--proxy", "no-p", "--group", "main=no-m", "--baseline", "no-b", "--domains", "d.json"]
    command = [sys.executable, str(TOOL), *arguments, "--output-dir", "o"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "4 faults" in done.stderr
    assert "Traceback" not in done.stderr
    assert all(each in done.stderr for each in ("no-p", "no-m", "no-b", "d.json"))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "RUN"),
        (["r", "--main", "m"], "either RUN"),
        (["--group", "m"], "NAME=DIR"),
        (["--main", "m", "--group", "main=n"], "each name once"),
    ],
)
def test_flags_that_do_not_go_together(tool, arguments, named):
    with pytest.raises(ConfigError, match=named):
        tool.parse(arguments)


def test_groups_are_parsed_in_order(tool):
    options = tool.parse(["--group", "a=x", "y", "--proxy", "p", "--group", "b=z"])
    assert options.groups == [("a", [Path("x"), Path("y")]), ("proxy", [Path("p")]), ("b", [Path("z")])]
    assert options.output_dir == Path("x/report")


def test_an_output_folder_that_cannot_be_written_is_reported_with_the_runs_faults(tool, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    with pytest.raises(ConfigError) as caught:
        tool.main(["no-such-run", "--output-dir", "file/out"])
    assert [fault.subject for fault in caught.value.faults] == ["--output-dir", "RUN"]
    assert caught.value.faults[0].value == f"{tmp_path / 'file'}: not a folder"
    # Nothing is made for a run that is missing.
    with pytest.raises(ConfigError):
        tool.main(["no-such-run"])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_labels_and_numbers_fit_for_files():
    assert unique_labels(["a/b", "a b", "..", "x"]) == ["a_b", "a_b-2", "run", "x"]
    assert plain_numbers({"a": [float("nan"), 1.0], 2: (float("inf"),)}) == {"a": [None, 1.0], "2": [None]}
