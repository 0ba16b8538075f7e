"""Manifests and weights: kept by name, bound to a tokenizer, and refused with a clear word where wrong.

Run alone: python -m pytest tests/data/test_manifest.py
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_doremi.data.indexed_dataset import IndexedDatasetWriter
from megatron_doremi.data.manifest import (
    Domain,
    Manifest,
    TokenizerInfo,
    exclude_domains,
    load_manifest,
    save_manifest,
    similar_names,
)
from megatron_doremi.data.weights_file import load_weights, save_weights
from megatron_doremi.errors import ConfigError
from megatron_doremi.mixture.static import resolve_weights

NAMES = ("Books", "Ubuntu IRC", "Github")
SHA = "ab" * 32


def manifest_in(folder):
    tokenizer = TokenizerInfo("SentencePieceTokenizer", folder / "tokenizer.model", SHA, 400, 1)
    domains = (
        Domain("Books", folder / "Books_train", folder / "Books_valid", 100, 10, 400),
        Domain("Ubuntu IRC", folder / "Ubuntu_IRC_train", None, 300, 20, 900),
        Domain("Github", folder / "code" / "Github_train", None, 600, 30, 1500),
    )
    return Manifest(domains, tokenizer, folder / "domains.json")


def entry_of(folder):
    save_manifest(manifest_in(folder))
    return json.loads((folder / "domains.json").read_text())


def write(folder, content, name="file.json"):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def said(error):
    return str(error.value)


# --- manifests


def test_manifest_comes_back_as_saved(tmp_path):
    manifest = manifest_in(tmp_path)
    save_manifest(manifest)
    assert load_manifest(manifest.path) == manifest


def test_manifest_without_tokenizer_comes_back(tmp_path):
    manifest = replace(manifest_in(tmp_path), tokenizer=None)
    save_manifest(manifest)
    assert load_manifest(manifest.path) == manifest


def test_manifest_file_has_the_documented_form(tmp_path):
    entry = entry_of(tmp_path)
    assert entry["format"] == "megatron-doremi-domains/1"
    assert entry["tokenizer"] == {
        "type": "SentencePieceTokenizer",
        "file": "tokenizer.model",
        "sha256": SHA,
        "vocab_size": 400,
        "eod": 1,
    }
    assert entry["domains"][0] == {
        "name": "Books",
        "train": "Books_train",
        "valid": "Books_valid",
        "tokens": 100,
        "documents": 10,
        "bytes": 400,
    }
    assert entry["domains"][2]["train"] == "code/Github_train"
    assert entry["domains"][2]["valid"] is None


def test_moved_folder_keeps_working(tmp_path):
    (tmp_path / "before").mkdir()
    save_manifest(manifest_in(tmp_path / "before"))
    (tmp_path / "before").rename(tmp_path / "after")
    moved = load_manifest(tmp_path / "after" / "domains.json")
    assert moved.domains == manifest_in(tmp_path / "after").domains
    assert moved.tokenizer == manifest_in(tmp_path / "after").tokenizer


def test_manifest_given_by_a_relative_path_is_read(tmp_path, monkeypatch):
    save_manifest(manifest_in(tmp_path))
    monkeypatch.chdir(tmp_path)
    manifest = load_manifest(Path("domains.json"))
    assert manifest.domains[0].train.absolute() == tmp_path / "Books_train"


def test_order_is_the_files_and_not_the_alphabets(tmp_path):
    entry = entry_of(tmp_path)
    assert load_manifest(tmp_path / "domains.json").names == NAMES
    entry["domains"].reverse()
    assert load_manifest(write(tmp_path, entry)).names == NAMES[::-1]


def test_fingerprint_follows_the_data(tmp_path):
    """Order, sizes and tokenizer change it; nothing else does."""
    manifest = manifest_in(tmp_path)
    first = manifest.domains[0]
    others = [
        replace(manifest, domains=manifest.domains[::-1]),
        replace(manifest, domains=manifest.domains[:2]),
        replace(manifest, domains=(replace(first, name="books"), *manifest.domains[1:])),
        replace(manifest, domains=(replace(first, tokens=101), *manifest.domains[1:])),
        replace(manifest, domains=(replace(first, documents=11), *manifest.domains[1:])),
        replace(manifest, domains=(replace(first, bytes=401), *manifest.domains[1:])),
        replace(manifest, tokenizer=replace(manifest.tokenizer, sha256="cd" * 32)),
        replace(manifest, tokenizer=None),
    ]
    prints = {other.fingerprint() for other in [manifest, *others]}
    assert len(prints) == 1 + len(others)


def test_fingerprint_does_not_follow_the_place(tmp_path):
    (tmp_path / "far" / "away").mkdir(parents=True)
    assert manifest_in(tmp_path).fingerprint() == manifest_in(tmp_path / "far" / "away").fingerprint()


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        (["Web", "WEB", "Books"], [["Web", "WEB"]]),
        (["a b", "ab", "a b", "a  B"], [["a b", "ab", "a  B"]]),
        (["\u00e9", "e\u0301"], [["\u00e9", "e\u0301"]]),
        (["a-b", "a_b", "0", "00", "0"], []),
    ],
)
def test_names_that_are_nearly_the_same(names, groups):
    assert similar_names(names) == groups


def test_natural_weights_are_token_shares(tmp_path):
    assert manifest_in(tmp_path).natural_weights().tolist() == [0.1, 0.3, 0.6]


@pytest.mark.parametrize("text", ["0.3 data/a 0.7 ABS/b", "0.3 data/a\n0.7 ABS/b\n", "  3e-1\tdata/a 0.7\n\nABS/b"])
def test_megatrons_list_is_read(tmp_path, text):
    """Prefixes are relative to the list, or absolute; sizes are those of the pairs."""
    for folder, name, documents in (("data", "a", [[1, 2], [3]]), ("far", "b", [[4, 5, 6, 7]])):
        (tmp_path / folder).mkdir()
        with IndexedDatasetWriter(tmp_path / folder / name, np.dtype("<u2")) as writer:
            for document in documents:
                writer.add_document(document)
    manifest = load_manifest(write(tmp_path, text.replace("ABS", str(tmp_path / "far")), "blend.txt"))
    assert manifest.names == ("a", "b")
    assert manifest.given_weights == (0.3, 0.7)
    assert manifest.tokenizer is None
    assert [domain.train for domain in manifest.domains] == [tmp_path / "data" / "a", tmp_path / "far" / "b"]
    assert [domain.valid for domain in manifest.domains] == [None, None]
    assert [(d.tokens, d.documents, d.bytes) for d in manifest.domains] == [(3, 2, 6), (4, 1, 8)]


def test_all_missing_pairs_of_megatrons_list_are_named(tmp_path):
    with pytest.raises(ConfigError) as error:
        load_manifest(write(tmp_path, "0.3 data/a 0.7 b", "blend.txt"))
    assert "domain 'a' (data/a): no such file" in said(error)
    assert "domain 'b' (b): no such file" in said(error)
    assert "relative to the working directory" in said(error)


def test_a_manifest_that_was_moved_away_from_its_data_says_so(tmp_path):
    manifest = manifest_in(tmp_path)
    with pytest.raises(ConfigError, match="keep the manifest beside its data"):
        manifest.open_train(manifest.domains[0])


def changed(change):
    """A wrong manifest: the right one, changed in place by `change`."""

    def make(entry):
        entry = copy.deepcopy(entry)
        change(entry)
        return entry

    return make


def set_in(*way, to):
    def change(entry):
        for key in way[:-1]:
            entry = entry[key]
        entry[way[-1]] = to

    return changed(change)


def drop(*way):
    def change(entry):
        for key in way[:-1]:
            entry = entry[key]
        del entry[way[-1]]

    return changed(change)


WRONG_MANIFESTS = {
    "empty file": (lambda entry: "", "0 words"),
    "not JSON": (lambda entry: '{"format": ', "JSON object"),
    "a list": (lambda entry: [entry], "a JSON list"),
    "a key twice": (lambda entry: '{"format": "x", "format": "y"}', "duplicate key 'format'"),
    "nested too deep": (lambda entry: '{"a":' + "[" * 200_000, "recursion"),
    "no format": (drop("format"), "format None"),
    "another format": (set_in("format", to="megatron-doremi-domains/2"), "domains/2"),
    "no domains key": (drop("domains"), "domains is missing"),
    "empty domains": (set_in("domains", to=[]), "at least 1 item"),
    "domains as an object": (set_in("domains", to={"Books": 1}), "valid list"),
    "domain as text": (set_in("domains", 1, to="Books"), "domains.1: 'Books'"),
    "domain as a list": (set_in("domains", 1, to=[1, 2]), "domains.1: [1, 2]"),
    "domain as null": (set_in("domains", 1, to=None), "domains.1: None"),
    "domain without name": (drop("domains", 0, "name"), "domains.0.name is missing"),
    "domain without train": (drop("domains", 2, "train"), "domains.2.train is missing"),
    "domain without tokens": (drop("domains", 0, "tokens"), "domains.0.tokens is missing"),
    "empty name": (set_in("domains", 0, "name", to=""), "domains.0.name: ''"),
    "number as name": (set_in("domains", 0, "name", to=3), "domains.0.name: 3"),
    "null as train": (set_in("domains", 0, "train", to=None), "domains.0.train: None"),
    "number as valid": (set_in("domains", 0, "valid", to=5), "domains.0.valid: 5"),
    "negative tokens": (set_in("domains", 0, "tokens", to=-1), "domains.0.tokens: -1"),
    "fractional tokens": (set_in("domains", 0, "tokens", to=1.5), "domains.0.tokens: 1.5"),
    "true as documents": (set_in("domains", 0, "documents", to=True), "domains.0.documents: True"),
    "text as bytes": (set_in("domains", 0, "bytes", to="12"), "domains.0.bytes: '12'"),
    "one name twice": (set_in("domains", 1, "name", to="Books"), "two domains 'Books'"),
    "tokenizer as text": (set_in("tokenizer", to="sp.model"), "tokenizer"),
    "tokenizer without file": (drop("tokenizer", "file"), "tokenizer.file is missing"),
    "tokenizer without hash": (drop("tokenizer", "sha256"), "tokenizer.sha256 is missing"),
    "number as hash": (set_in("tokenizer", "sha256", to=7), "tokenizer.sha256: 7"),
    "text as vocabulary": (set_in("tokenizer", "vocab_size", to="400"), "tokenizer.vocab_size: '400'"),
    "eod beyond the vocabulary": (set_in("tokenizer", "eod", to=400), "eod 400"),
    "negative eod": (set_in("tokenizer", "eod", to=-1), "tokenizer.eod: -1"),
    "odd list": (lambda entry: "0.5 a 0.5", "3 words"),
    "list with a word as weight": (lambda entry: "much a 0.5 b", "weight much"),
    "list with weight zero alone": (lambda entry: "0 a 0.0 b", "weight 0 for every prefix"),
    "list with weights for some": (lambda entry: "1 a b c", "weight b of c"),
    "list by split without train": (lambda entry: {"valid": ["a"]}, "format None"),
    "list by split of numbers": (lambda entry: {"train": 5}, "train"),
    "list by split, empty": (lambda entry: {"train": [], "valid": []}, "0 words"),
    "newer format": (set_in("format", to="megatron-doremi-domains/3"), "written by a newer version"),
    "NUL in a prefix": (set_in("domains", 0, "train", to="a\0b"), "domains.0.train"),
    "surrogate in a name": (set_in("domains", 0, "name", to="\ud800"), "domains.0.name"),
    "hash of another form": (set_in("tokenizer", "sha256", to="ab"), "tokenizer.sha256"),
    "list with a negative weight": (lambda entry: "-1 a 1 b", "weight -1"),
    "list with an infinite weight": (lambda entry: "inf a 1 b", "weight inf"),
    "list with a sum too large": (lambda entry: "1e308 a 1e308 b", "weight 1e308"),
    "list with nan": (lambda entry: "nan a 1 b", "weight nan"),
}


@pytest.mark.parametrize("case", WRONG_MANIFESTS)
def test_wrong_manifest_is_refused(tmp_path, case):
    make, word = WRONG_MANIFESTS[case]
    path = write(tmp_path, make(entry_of(tmp_path)))
    with pytest.raises(ConfigError) as error:
        load_manifest(path)
    assert word in said(error)
    assert str(path) in said(error)


def test_manifest_that_cannot_be_read_is_refused(tmp_path):
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "nowhere.json", tmp_path, binary):
        with pytest.raises(ConfigError, match="readable manifest"):
            load_manifest(path)


def test_manifest_with_no_tokens_at_all_is_refused(tmp_path):
    entry = entry_of(tmp_path)
    for domain in entry["domains"]:
        domain["tokens"] = 0
    with pytest.raises(ConfigError, match="no tokens in any domain"):
        load_manifest(write(tmp_path, entry))


def test_all_faults_of_a_manifest_are_said_at_once(tmp_path):
    entry = entry_of(tmp_path)
    entry["domains"][0]["tokens"] = "many"
    del entry["domains"][1]["train"]
    entry["tokenizer"]["eod"] = 4000
    with pytest.raises(ConfigError) as error:
        load_manifest(write(tmp_path, entry))
    assert len(error.value.faults) == 3
    assert said(error).startswith("3 faults")


# --- weights


def test_saved_weights_come_back_to_the_last_bit(tmp_path):
    weights = {"Books": 0.1 + 0.2, "Ubuntu IRC": math.pi / 10, "Github": 1 - (0.1 + 0.2) - math.pi / 10}
    save_weights(tmp_path / "w.json", weights, SHA, {"method": "doremi", "steps": 7})
    entry = json.loads((tmp_path / "w.json").read_text())
    assert entry == {
        "format": "megatron-doremi-weights/1",
        "weights": weights,
        "tokenizer_sha256": SHA,
        "provenance": {"method": "doremi", "steps": 7},
    }
    vector = load_weights(tmp_path / "w.json", manifest_in(tmp_path), False)
    assert np.allclose(vector, list(weights.values()), rtol=1e-15, atol=0)


RAW = {"Github": 6.0, "Books": 1.0, "Ubuntu IRC": 3}
FORMS = {
    "ours": {"format": "megatron-doremi-weights/1", "weights": RAW, "tokenizer_sha256": SHA, "provenance": {}},
    "bare": RAW,
    "authors": {"train_domain_weights": RAW, "eval_domain_weights": {"Books": 1.0}},
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_matched_by_name_and_normalized(tmp_path, form):
    """The file's order is not the manifest's, and the weights sum to 10."""
    vector = load_weights(write(tmp_path, FORMS[form]), manifest_in(tmp_path), False)
    assert vector.tolist() == [0.1, 0.3, 0.6]


def test_weights_follow_names_when_the_manifest_is_reordered(tmp_path):
    manifest = manifest_in(tmp_path)
    reordered = replace(manifest, domains=manifest.domains[::-1])
    path = write(tmp_path, RAW)
    assert load_weights(path, reordered, False).tolist() == [0.6, 0.3, 0.1]
    by_name = dict(zip(manifest.names, load_weights(path, manifest, False), strict=True))
    assert by_name == dict(zip(reordered.names, load_weights(path, reordered, False), strict=True))


def test_domain_named_format_gets_its_weight(tmp_path):
    manifest = replace(manifest_in(tmp_path), domains=(Domain("format", tmp_path / "f", None, 1, 1, 1),))
    assert load_weights(write(tmp_path, {"format": 2.0}), manifest, False).tolist() == [1.0]


def test_weights_by_word_and_by_file(tmp_path):
    manifest = manifest_in(tmp_path)
    assert resolve_weights("uniform", manifest, False).tolist() == [1 / 3] * 3
    assert resolve_weights("natural", manifest, False).tolist() == [0.1, 0.3, 0.6]
    assert resolve_weights(str(write(tmp_path, RAW)), manifest, False).tolist() == [0.1, 0.3, 0.6]


def test_a_weight_of_zero_by_hand_is_kept(tmp_path):
    """The run leaves the domain out."""
    for form in (with_weight(0), {"train_domain_weights": with_weight(0)}):
        assert load_weights(write(tmp_path, form), manifest_in(tmp_path), False).tolist() == [0, 1 / 3, 2 / 3]


@pytest.mark.parametrize("setting", ["Github=6,Books=1, Ubuntu IRC=3", "Books = .1,Ubuntu IRC=0.3,Github=6e-1,"])
def test_weights_on_the_command_line(tmp_path, setting):
    weights = resolve_weights(setting, manifest_in(tmp_path), False)
    assert weights.tolist() == pytest.approx([0.1, 0.3, 0.6], abs=1e-15)


def test_names_on_the_command_line_may_hold_commas_and_equal_signs(tmp_path):
    domains = tuple(Domain(name, tmp_path / "f", None, 1, 1, 1) for name in ("a, b", "x=y", "c"))
    manifest = replace(manifest_in(tmp_path), domains=domains)
    assert resolve_weights("a, b=1,x=y=2,c=1", manifest, False).tolist() == [0.25, 0.5, 0.25]
    assert exclude_domains(manifest, ["a, b,x=y"]).names == ("c",)
    assert exclude_domains(manifest, ["c", "a, b"]).names == ("x=y",)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("Books=1,Github=1", ("missing: 'Ubuntu IRC'", "a weight of 0 leaves a domain out")),
        ("Books=1,Github=1,Ubunto IRC=1", ("unknown: 'Ubunto IRC'", "did you mean 'Ubuntu IRC'?")),
        ("Books=1,Github=-1,Ubuntu IRC=1", ("Github=-1", "0 or more")),
        ("Books=1,Github=nan,Ubuntu IRC=1", ("Github=nan",)),
        ("Books=1,Github=much,Ubuntu IRC=1", ("Github=much",)),
        ("Books=1,Github=1,Ubuntu IRC", ("no weight after 'Ubuntu IRC'",)),
        ("Books=1,Github=1,Ubuntu IRC=1,Books=2", ("'Books' twice",)),
        ("Books=0,Github=0,Ubuntu IRC=0", ("0 for every domain",)),
        ("=1", ("no weight after '=1'",)),
    ],
)
def test_wrong_weights_on_the_command_line(tmp_path, setting, words):
    with pytest.raises(ConfigError) as error:
        resolve_weights(setting, manifest_in(tmp_path), False)
    assert all(word in said(error) for word in words), said(error)


def test_domains_are_excluded_in_the_order_of_the_manifest(tmp_path):
    manifest = exclude_domains(replace(manifest_in(tmp_path), given_weights=(1.0, 2.0, 3.0)), ["Ubuntu IRC"])
    assert (manifest.names, manifest.given_weights) == (("Books", "Github"), (1.0, 3.0))
    assert manifest.excluded == ("Ubuntu IRC",)
    with pytest.raises(ConfigError, match="did you mean 'Github'"):
        exclude_domains(manifest, ["GitHub"])
    with pytest.raises(ConfigError, match="every domain"):
        exclude_domains(manifest, ["Books,Github"])
    # Learned weights of more domains are no mixture of fewer.
    with pytest.raises(ConfigError, match="excluded: 'Ubuntu IRC'") as error:
        load_weights(write(tmp_path, FORMS["ours"]), manifest, False)
    assert "what was learned with them is no mixture of the others" in said(error)


def test_weights_of_another_tokenizer_are_refused_unless_allowed(tmp_path):
    entry = {**FORMS["ours"], "tokenizer_sha256": "cd" * 32}
    path = write(tmp_path, entry)
    with pytest.raises(ConfigError) as error:
        load_weights(path, manifest_in(tmp_path), False)
    assert "cdcdcdcdcdcd" in said(error)
    assert "abababababab" in said(error)
    assert "--allow-tokenizer-mismatch" in said(error)
    assert load_weights(path, manifest_in(tmp_path), True).tolist() == [0.1, 0.3, 0.6]


def test_weights_of_no_tokenizer_are_refused_unless_allowed(tmp_path):
    path = write(tmp_path, {"format": "megatron-doremi-weights/1", "weights": RAW})
    with pytest.raises(ConfigError, match="tokenizer"):
        load_weights(path, manifest_in(tmp_path), False)
    assert load_weights(path, manifest_in(tmp_path), True).tolist() == [0.1, 0.3, 0.6]


def with_weight(value):
    return {**RAW, "Books": value}


WRONG_WEIGHTS = {
    "empty file": ("", "JSON object"),
    "not JSON": ("Books: 1", "JSON object"),
    "a list": ([1, 2, 3], "a JSON list"),
    "a number": (1, "a JSON int"),
    "a name twice": ('{"Books": 1, "Books": 2, "Ubuntu IRC": 1, "Github": 1}', "duplicate key 'Books'"),
    "a name twice, inside": (
        '{"train_domain_weights": {"Books": 1, "Books": 2, "Ubuntu IRC": 1, "Github": 1}}',
        "duplicate key 'Books'",
    ),
    "nothing": ({}, "missing: 'Books', 'Ubuntu IRC', 'Github'"),
    "a name missing": ({"Books": 1, "Github": 1}, "missing: 'Ubuntu IRC'"),
    "a name too many": ({**RAW, "Arxiv": 1}, "unknown: 'Arxiv'"),
    "other spelling": ({"books": 1, "Ubuntu IRC": 1, "Github": 1}, "unknown: 'books'"),
    "trailing space": ({"Books ": 1, "Ubuntu IRC": 1, "Github": 1}, "unknown: 'Books '"),
    "zero, learned": ({**FORMS["ours"], "weights": with_weight(0)}, "weights.Books: 0"),
    "zero for all": (dict.fromkeys(RAW, 0), "0 for every domain"),
    "negative": (with_weight(-0.5), "weights.Books: -0.5"),
    "nan": (with_weight(math.nan), "weights.Books: nan"),
    "infinite": (with_weight(math.inf), "weights.Books: inf"),
    "too large for a float": ('{"Books": 1e999, "Ubuntu IRC": 1, "Github": 1}', "weights.Books: inf"),
    "whole number too large": (with_weight(10**400), "weights.Books: a huge integer"),
    "sum too large": ({"Books": 1e308, "Ubuntu IRC": 1e308, "Github": 1e308}, "weights.Github: 1e+308"),
    "text": (with_weight("0.5"), "weights.Books: '0.5'"),
    "true": (with_weight(True), "weights.Books: True"),
    "null": (with_weight(None), "weights.Books: None"),
    "an object": (with_weight({"weight": 1}), "weights.Books: {'weight': 1}"),
    "another format": ({**FORMS["ours"], "format": "megatron-doremi-weights/9"}, "weights/9"),
    "a manifest": ({"format": "megatron-doremi-domains/1", "domains": []}, "domains/1"),
    "format without weights": ({"format": "megatron-doremi-weights/1", "tokenizer_sha256": SHA}, "weights is missing"),
    "weights as a list": ({**FORMS["ours"], "weights": [1, 2, 3]}, "weights: [1, 2, 3]"),
    "authors' form with a list": ({"train_domain_weights": [1, 2, 3]}, "weights: [1, 2, 3]"),
}


@pytest.mark.parametrize("case", WRONG_WEIGHTS)
def test_wrong_weights_are_refused(tmp_path, case):
    content, word = WRONG_WEIGHTS[case]
    path = write(tmp_path, content)
    with pytest.raises(ConfigError) as error:
        load_weights(path, manifest_in(tmp_path), False)
    assert word in said(error)
    assert f"--domain-weights {path}" in said(error)


def test_weights_file_that_cannot_be_read_is_refused(tmp_path):
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "nowhere.json", tmp_path, binary):
        with pytest.raises(ConfigError, match="readable file"):
            load_weights(path, manifest_in(tmp_path), False)


def test_all_faults_of_weights_are_said_at_once(tmp_path):
    entry = {**FORMS["ours"], "tokenizer_sha256": "cd" * 32, "weights": {"Books": -1, "Arxiv": 1, "Github": 0}}
    with pytest.raises(ConfigError) as error:
        load_weights(write(tmp_path, entry), manifest_in(tmp_path), False)
    for word in (
        "learned with tokenizer",
        "unknown: 'Arxiv'",
        "missing: 'Ubuntu IRC'",
        "weights.Books: -1",
        "weights.Github: 0",
    ):
        assert word in said(error)
    assert len(error.value.faults) == 5
