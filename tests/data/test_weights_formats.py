"""Weights in the formats of other programs, and names that are translated: by name, every mismatch with its fault.

Run alone: python -m pytest tests/data/test_weights_formats.py
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from megatron_doremi.data.domain_names import read_domain_names
from megatron_doremi.data.given_weights import did_you_mean, file_and_row, is_inline
from megatron_doremi.data.manifest import Domain, Manifest, TokenizerInfo
from megatron_doremi.data.weights_file import load_weights
from megatron_doremi.errors import ConfigError
from megatron_doremi.mixture.static import resolve_weights
from megatron_doremi.storage.yaml_file import read_yaml_mapping

SHA = "ab" * 32
PILE = {"train_the_pile_arxiv": "ArXiv", "train_the_pile_wikipedia_en": "Wikipedia (en)", "no": "Norwegian"}
REGMIX = """
train:
  train_the_pile_wikipedia_en: 0.3
  train_the_pile_arxiv: 0.1   # a comment
  no: 6e-1
valid:
  valid_the_pile_pile_cc: 1.0
model_name: tinyllama_1_1b
"""
OLMIX = """
name: mix-baseline
training: {tokenizer: dolma2, seed: 42}
mix:
  web:
    weight: 0.9
    repetition_factor: 2.0
    Wikipedia (en):
      weight: 0.333333
      high: {weight: 0.75, repetition_factor: 1.0}
      low: .25
    no: {weight: 0.666667}
  ArXiv: {weight: 0.1, repetition_factor: 1.5}
"""
RUNS = """,run,name,index,ArXiv,no,Wikipedia (en)
0,19g3guks,swarm-0000,0,0.0,0.4,0.6
1,d4nbvsr7,swarm-0001,1,0.1,0.6,0.3
2,ube633ci,swarm-0003,3,0.2,0.2,0.6
"""


def manifest_of(tmp_path, *names):
    domains = tuple(Domain(name, tmp_path / "t", None, 100, 1, 400) for name in names)
    return Manifest(domains, TokenizerInfo("SentencePieceTokenizer", tmp_path / "m", SHA, 400, 1), tmp_path / "d.json")


@pytest.fixture
def manifest(tmp_path):
    return manifest_of(tmp_path, "ArXiv", "Wikipedia (en)", "no")


def weights(tmp_path, manifest, name, text, renames=None, row=""):
    (tmp_path / name).write_text(text)
    return load_weights(f"{tmp_path / name}{row}", manifest, False, renames=renames).tolist()


def faults(tmp_path, manifest, name, text, renames=None, row=""):
    with pytest.raises(ConfigError) as error:
        weights(tmp_path, manifest, name, text, renames, row)
    return error.value.faults


def test_regmix_yaml_is_matched_through_the_map(tmp_path):
    manifest = manifest_of(tmp_path, "ArXiv", "Norwegian", "Wikipedia (en)")
    assert weights(tmp_path, manifest, "m.yaml", REGMIX, PILE) == pytest.approx([0.1, 0.6, 0.3], abs=1e-15)
    assert weights(tmp_path, manifest, "m.YML", REGMIX, PILE) == pytest.approx([0.1, 0.6, 0.3], abs=1e-15)


def test_olmix_yaml_gives_products_of_weights_by_path(tmp_path):
    names = ("web:Wikipedia (en):low", "web:no", "ArXiv", "web:Wikipedia (en):high")
    found = weights(tmp_path, manifest_of(tmp_path, *names), "m.yaml", OLMIX)
    assert found == pytest.approx([0.9 / 3 * 0.25, 0.6, 0.1, 0.9 / 3 * 0.75], abs=1e-6)
    flat = {"mix": {"web:no": [0.75, 1.0], "ArXiv": {"weight": 0.25, "repetition_factor": 4}}}
    assert weights(tmp_path, manifest_of(tmp_path, "ArXiv", "web:no"), "m.json", json.dumps(flat)) == [0.25, 0.75]


def test_negative_weights_of_two_levels_do_not_cancel(tmp_path, manifest):
    text = json.dumps({"mix": {"ArXiv": {"weight": -1, "a": -1}, "no": 1, "Wikipedia (en)": 1}})
    (fault,) = faults(tmp_path, manifest, "m.json", text)
    assert "weights.ArXiv: -1" in str(fault)


@pytest.mark.parametrize("row", ["@d4nbvsr7", "@swarm-0001", "@1"])
def test_a_run_of_a_table_is_named_by_any_of_its_columns(tmp_path, manifest, row):
    assert weights(tmp_path, manifest, "ratios.csv", RUNS, row=row) == pytest.approx([0.1, 0.3, 0.6])


def test_a_table_of_one_run_needs_no_row(tmp_path, manifest):
    assert weights(tmp_path, manifest, "r.csv", "no,Wikipedia (en), ArXiv\n1,1,2\n") == [0.5, 0.25, 0.25]
    # As a spreadsheet writes it, and as Olmix's proposal.
    assert weights(tmp_path, manifest, "r.csv", "\ufeffdomain,weight\r\nno,1\r\nArXiv,2\r\nWikipedia (en),1\r\n") == [
        *(0.5, 0.25, 0.25)
    ]
    records = [{"domain": name, "weight": w} for name, w in (("no", 1), ("ArXiv", 2), ("Wikipedia (en)", 1))]
    assert weights(tmp_path, manifest, "optimal.json", json.dumps(records)) == [0.5, 0.25, 0.25]


def test_a_domain_may_be_named_like_a_column_that_identifies_runs(tmp_path):
    manifest = manifest_of(tmp_path, "index", "name")
    assert weights(tmp_path, manifest, "r.csv", "run,index,name\nx,1,3\ny,1,1\n", row="@x") == [0.25, 0.75]
    renamed = manifest_of(tmp_path, "A", "B")
    assert weights(tmp_path, renamed, "r.csv", "index,name\n1,3\n", {"index": "A", "name": "B"}) == [0.25, 0.75]


@pytest.mark.parametrize(
    ("name", "text", "row", "words"),
    [
        ("r.csv", RUNS, "", ("3 rows", "'run' or 'name' or 'index'", "r.csv@19g3guks")),
        ("r.csv", RUNS, "@swarm-0002", ("no run 'swarm-0002'", "did you mean 'swarm-000")),
        ("r.csv", RUNS, "@2", ("no run '2'", "one row")),
        ("r.csv", "run,no\nx,1\nx,2\n", "@x", ("2 rows of run 'x'",)),
        ("r.csv", "no,ArXiv\n1,2\n3,4\n", "@1", ("no run '1'", "none (run, run_id, name or index)")),
        ("r.csv", "no,ArXiv\n1,2,3\n", "", ("line 2: 3 cells, and 2 columns",)),
        ("r.csv", "no,no,ArXiv\n1,2,3\n", "", ("'no' twice",)),
        ("r.csv", "domain,weight,weight\nno,1,2\nArXiv,3,4\n", "", ("a column twice",)),
        ("r.csv", "", "", ("an empty file",)),
        ("r.csv", "no,ArXiv\n", "", ("0 rows",)),
        ("r.csv", 'no,"ArXiv\n1,2\n', "", ("unexpected end of data",)),
        ("r.csv", "no,ArXiv,Wikipedia (en)\n1,,-2\n", "", ("weights.ArXiv: ''", "weights.Wikipedia (en): -2.0")),
        ("r.csv", "no,ArXiv,Wikipedia (en)\n1,nan,1_0\n", "", ("weights.ArXiv: nan", "weights.Wikipedia (en): '1_0'")),
        ("nowhere.csv", None, "@3", ("nowhere.csv@3: no such file",)),
        ("nowhere.yaml", None, "", ("nowhere.yaml: no such file",)),
        ("m.yaml", "a: 1\nb: 2\na: 3\n", "", ("line 3: duplicate key 'a'",)),
        ("m.yaml", "train: {a: 1, b: {c: 1, c: 2}}", "", ("duplicate key 'c'",)),
        ("m.yaml", "a: &x 1\nb: *x\n", "", ("an anchor that is used again",)),
        ("m.yaml", "a: !!python/object/apply:os.system [ls]\n", "", ("the tag",)),
        ("m.yaml", "a: !mine 1\n", "", ("the tag !mine",)),
        ("m.yaml", "a: 1\n---\nb: 2\n", "", ("but found another document",)),
        ("m.yaml", "[a, b]", "", ("no YAML mapping",)),
        ("m.yaml", "", "", ("no YAML mapping",)),
        ("m.yaml", "a: [1, 2", "", ("line 1",)),
        ("m.yaml", "? [a]\n: 1\n", "", ("a key that is no text",)),
        ("m.yaml", "[" * 1200, "", ("YAML mapping",)),
        (
            "m.yaml",
            "name: x\npriors: {token_counts: {a: 5}}\n",
            "",
            ("no weights, but 'name', 'priors'", "'mix' (Olmix)"),
        ),
        ("m.json", '[{"domain": "a", "weight": 1}, {"domain": "a", "weight": 2}]', "", ("'a' twice",)),
        ("m.json", '[{"domain": "a"}]', "", ("a JSON list",)),
    ],
)
def test_wrong_files_are_refused(tmp_path, manifest, name, text, row, words):
    if text is None:
        with pytest.raises(ConfigError) as error:
            load_weights(f"{tmp_path / name}{row}", manifest, False)
        found = str(error.value)
    else:
        found = "\n".join(map(str, faults(tmp_path, manifest, name, text, row=row)))
    assert all(word in found for word in words), found


def test_each_unknown_name_is_a_fault_with_its_guess(tmp_path, manifest):
    found = faults(tmp_path, manifest, "m.yaml", REGMIX)
    assert [fault.value for fault in found] == [
        "unknown: 'train_the_pile_wikipedia_en'; did you mean 'Wikipedia (en)'?",
        "unknown: 'train_the_pile_arxiv'; did you mean 'ArXiv'?",
        "missing: 'ArXiv', 'Wikipedia (en)'",
    ]
    many = {f"domain {number}": 1 for number in range(300)}
    error = ConfigError(found := faults(tmp_path, manifest, "m.json", json.dumps(many)))
    assert len(found) == 301
    assert len(str(error)) < 2000
    assert "and 290 more like these" in str(error)
    (fault,) = faults(tmp_path, manifest_of(tmp_path, "a", *many), "m.json", json.dumps(many))
    assert fault.value == "missing: 'a'"


def test_faults_of_renamed_names(tmp_path, manifest):
    text = json.dumps({"a": 1, "b": 1, "no": 1})
    found = faults(tmp_path, manifest, "m.json", text, {"a": "ArXiv", "b": "ArXiv"})
    assert [fault.value for fault in found] == ["'a', 'b' for one domain, 'ArXiv'", "missing: 'Wikipedia (en)'"]
    found = faults(tmp_path, manifest, "m.json", text, {"a": "Arxiv", "b": "Wikipedia (en)"})
    assert found[0].value == "unknown: 'a', renamed to 'Arxiv'; did you mean 'ArXiv'?"
    found = faults(tmp_path, manifest, "m.json", text, {"ArXiv": "a", "Wikipedia (en)": "b"})
    assert "swap names and values" in [fault.remedy for fault in found]
    # A name of the map that the file does not have is named where its domain has no weight, and else has no effect.
    found = faults(tmp_path, manifest, "m.json", json.dumps({"arx": 1, "b": 1, "no": 1}), {"arxx": "ArXiv", "b": "b"})
    assert [fault.value for fault in found if fault.subject == "--domain-names"] == [
        "'arxx' is not in the weights file; did you mean 'arx'?"
    ]
    renames = {"a": "ArXiv", "b": "Wikipedia (en)", "other": "no"}
    assert weights(tmp_path, manifest, "m.json", text, renames) == pytest.approx([1 / 3] * 3)
    # Two names may change places, and the map may hold more names than the file.
    assert weights(tmp_path, manifest_of(tmp_path, "a", "b"), "m.json", '{"a": 3, "b": 1}', {"a": "b", "b": "a"}) == [
        *(0.25, 0.75)
    ]
    excluded = replace(manifest_of(tmp_path, "no"), excluded=("ArXiv",))
    (fault,) = faults(tmp_path, excluded, "m.json", '{"no": 1, "a": 1}', {"a": "ArXiv", "z": "y"})
    assert fault.value == "excluded: 'ArXiv'"


def test_the_map_applies_to_every_form(tmp_path, manifest):
    renames, by_name = {"a": "ArXiv", "w": "Wikipedia (en)"}, {"a": 1, "w": 2, "no": 1}
    ours = {"format": "megatron-doremi-weights/1", "weights": by_name, "tokenizer_sha256": SHA}
    for form in (ours, by_name, {"train_domain_weights": by_name}, {"train": by_name}, {"mix": by_name}):
        assert weights(tmp_path, manifest, "m.json", json.dumps(form), renames) == [0.25, 0.5, 0.25]
        assert weights(tmp_path, manifest, "m.yaml", json.dumps(form), renames) == [0.25, 0.5, 0.25]
    assert resolve_weights("a=1,w=2,no=1", manifest, renames=renames).tolist() == [0.25, 0.5, 0.25]
    assert weights(tmp_path, manifest, "r.csv", "index,a,w,no\n7,1,2,1\n", renames, "@7") == [0.25, 0.5, 0.25]


@pytest.mark.parametrize("text", ["[]", '{"a": 1}', '{"a": "b", "a": "c"}', '{"": "b"}', "{"])
def test_a_wrong_map_is_refused(tmp_path, text):
    (tmp_path / "map.json").write_text(text)
    with pytest.raises(ConfigError, match="--domain-names"):
        read_domain_names(tmp_path / "map.json")


def test_yaml_scalars_are_numbers_or_the_text_as_it_is_written(tmp_path):
    (tmp_path / "m.yaml").write_text("no: 1e-06\nyes: on\n010: 010\n1_0: 1_0\nx: '1'\ny: ~\nz: [1, a]\nt: 2001-01-01\n")
    assert read_yaml_mapping(tmp_path / "m.yaml", "m") == {
        **{"no": 1e-06, "yes": "on", "010": 10.0, "1_0": "1_0", "x": "1", "y": "~", "z": [1.0, "a"]},
        "t": "2001-01-01",
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [
        # The second was taken, and the first forgotten.
        ('{"mix": {"ArXiv": {"x": 1}, "ArXiv:x": 2, "no": 1}}', "'ArXiv:x' twice"),
        ('{"train": {"ArXiv": 1, "no": 1}, "mix": {"ArXiv": 3, "no": 1}}', "weights in 'mix' and 'train'"),
        ('{"train": {"ArXiv": 1, "no": 1}, "ArXiv": 3, "no": 1}', "weights in 'train' and 'ArXiv'"),
        ('{"train_domain_weights": {"no": 1}, "train": {"no": 2}}', "weights in 'train_domain_weights' and 'train'"),
        # It counted as 1, beside shares.
        ('{"mix": {"ArXiv": {"repetition_factor": 2}, "no": 0.5, "Wikipedia (en)": 0.5}}', "weights.ArXiv: None"),
    ],
)
def test_weights_that_are_given_twice_or_not_at_all_are_refused(tmp_path, manifest, text, value):
    (fault,) = faults(tmp_path, manifest, "m.json", text)
    assert fault.value == value


def test_only_a_weight_of_0_leaves_a_domain_out(tmp_path, manifest):
    """A product that no float holds was 0, so that the domain vanished silently."""
    text = "mix: {ArXiv: {weight: 1e-200, x: {weight: 1e-200}}, no: 1, Wikipedia (en): 1}"
    (fault,) = faults(tmp_path, manifest, "m.yaml", text, {"ArXiv:x": "ArXiv"})
    assert (fault.value, fault.rule) == ("'ArXiv': a share of 0.0e+00", "shares of at least 1e-12")
    text = text.replace("1e-200}}", "0}}")
    assert weights(tmp_path, manifest, "m.yaml", text, {"ArXiv:x": "ArXiv"}) == [0.0, 0.5, 0.5]


@pytest.mark.parametrize("separator", [";", "\t"])
def test_another_separator_is_named(tmp_path, manifest, separator):
    (fault,) = faults(tmp_path, manifest, "m.csv", f"ArXiv{separator}no\n1{separator}2\n")
    assert f"is it separated by {separator!r}?" in fault.value


def test_a_foreign_table_of_many_columns_is_answered_at_once(tmp_path, manifest):
    """Each unknown name was compared with each domain, each name that occurs twice with each name: minutes."""
    names = [f"d{number}" for number in range(30_000)]
    many = manifest_of(tmp_path, *names)
    table = ",".join(names) + "\n" + ",".join("1" * len(names)) + "\n"
    assert weights(tmp_path, many, "m.csv", table) == pytest.approx([1 / len(names)] * len(names))
    found = faults(tmp_path, manifest, "m.csv", table)
    assert len(found) == len(names) + 1
    twice = ",".join(names * 2) + "\n" + ",".join("1" * 2 * len(names)) + "\n"
    assert len(faults(tmp_path, many, "m.csv", twice)) == len(names)


def test_inline_weights_are_written_as_in_files(manifest):
    with pytest.raises(ConfigError, match="ArXiv=1_0"):
        resolve_weights("ArXiv=1_0,no=1,Wikipedia (en)=1", manifest)


def test_a_path_that_is_too_long_is_a_fault(manifest):
    with pytest.raises(ConfigError, match="File name too long"):
        resolve_weights("x" * 5000, manifest)


def test_settings_that_name_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert file_and_row("a/b.csv@x@y=1") == ("a/b.csv", "x@y=1")
    assert file_and_row("a/b.csv") == ("a/b.csv", None)
    (tmp_path / "b.csv@1").write_text("")
    assert file_and_row("b.csv@1") == ("b.csv@1", None)
    files = ("lr=1.csv@a", "a.csv@lr=1", "x=1.yaml", "x=1.yml", "x=1.json")
    assert [is_inline(setting) for setting in files] == [False] * 5
    assert is_inline("A.csv=0.5,B=0.5")


def test_a_guess_ignores_case_punctuation_and_what_stands_before():
    known = ["PubMed Central", "PubMed Abstracts", "C", "Gutenberg (PG-19)"]
    assert did_you_mean("train_the_pile_pubmed_central", known) == "did you mean 'PubMed Central'?"
    assert did_you_mean("gutenberg_pg_19", known) == "did you mean 'Gutenberg (PG-19)'?"
    assert did_you_mean("topic", known) == ""
