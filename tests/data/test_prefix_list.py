"""Megatron-LM's lists mean what they mean there, and data that two domains share are found whatever their spelling.

Run alone: python -m pytest tests/data/test_prefix_list.py
"""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from ranks import unwrapped

from megatron_doremi.data.indexed_dataset import IndexedDatasetWriter
from megatron_doremi.data.manifest import load_manifest, print_warnings
from megatron_doremi.errors import ConfigError
from megatron_doremi.mixture.static import resolve_weights


def pair(prefix, tokens=10):
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with IndexedDatasetWriter(prefix, np.dtype("<u2")) as writer:
        writer.add_document([1] * tokens)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Pairs in folders below the working directory; lists lie elsewhere."""
    for name, tokens in (("x/a", 10), ("y/a", 20), ("x/b", 70), ("x/deep/c", 5), ("y/deep/c", 6), ("y/b_text", 9)):
        pair(tmp_path / name, tokens)
    (tmp_path / "lists").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(folder, content):
    path = folder / "lists" / "list.txt"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return load_manifest(path)


def refused(folder, content):
    with pytest.raises(ConfigError) as error:
        load(folder, content)
    return str(error.value)


# --- weights and prefixes


def test_one_base_name_in_several_folders_is_named_by_the_shortest_path_that_tells(folder):
    manifest = load(folder, "1 x/a 2 y/a 3 x/b 4 x/deep/c 5 y/deep/c")
    assert manifest.names == ("x/a", "y/a", "b", "x/deep/c", "y/deep/c")
    assert manifest.given_weights == (1.0, 2.0, 3.0, 4.0, 5.0)
    assert [domain.tokens for domain in manifest.domains] == [10, 20, 70, 5, 6]


def test_a_prefix_given_twice_is_one_domain_with_the_sum_of_the_weights(folder):
    os.symlink("x", folder / "link")
    manifest = load(folder, f"0.25 x/a 0.5 x/b 0.125 ./y/../x/a 0.0625 {folder}/x/a 0.0625 link/a")
    assert manifest.names == ("a", "b")
    assert manifest.given_weights == (0.5, 0.5)
    assert load(folder, "x/a x/b x/a").names == ("a", "b")


@pytest.mark.parametrize("content", ["x/a x/b", "x/a y/a x/b"])
def test_prefixes_alone_are_read_in_proportion_to_their_size(folder, content):
    manifest = load(folder, content)
    assert manifest.given_weights is None
    tokens = np.array([domain.tokens for domain in manifest.domains])
    assert resolve_weights("natural", manifest, False).tolist() == (tokens / tokens.sum()).tolist()
    with pytest.raises(ConfigError, match="with weights"):
        resolve_weights("given", manifest, False)


def test_weight_zero_leaves_a_domain_out_and_says_so(folder):
    manifest = load(folder, "0 nowhere 1 x/a 0.0 x/b 3 y/b_text")
    assert manifest.names == ("a", "b_text")
    assert resolve_weights("given", manifest, False).tolist() == [0.25, 0.75]
    assert [warning.split(": ")[-1] for warning in manifest.warnings] == [
        "nowhere has weight 0 and is ignored",
        "x/b has weight 0 and is ignored",
    ]


def test_numbers_that_do_not_pair_with_prefixes_are_refused(folder):
    assert "3 words, numbers among them" in refused(folder, "0.5 x/a 0.5")
    assert "3 words, numbers among them" in refused(folder, "x/a 0.5 x/b")
    assert "weight x/a of 0.5" in refused(folder, "1 x/b x/a 0.5")


# --- where prefixes are


def test_prefixes_are_relative_to_the_working_directory_and_else_to_the_list(folder):
    pair(folder / "lists" / "x" / "d", 30)
    manifest = load(folder, "1 x/a 1 x/d")
    assert [domain.tokens for domain in manifest.domains] == [10, 30]
    pair(folder / "lists" / "x" / "a", 11)
    message = refused(folder, "1 x/a 1 x/d")
    assert "x/a is a pair in the working directory and a different pair in" in message
    assert "absolute path" in message
    # The same pair by both ways is no contradiction.
    os.symlink(folder / "y", folder / "lists" / "y")
    assert load(folder, "1 y/a").domains[0].tokens == 20


# --- lists by split


@pytest.mark.parametrize(
    ("train", "valid"),
    [
        (("in/books_train_text_document", "in/web_train"), ("in/web_valid", "in/books_valid_text_document")),
        (("train/books", "train/web"), ("valid/web", "valid/books")),
        (("books/train", "web/train"), ("web/validation", "books/val")),
        (("one/train.books", "web-train"), ("two/test-web", "books")),
    ],
)
def test_lists_by_split_pair_held_out_data_with_train_data(folder, train, valid):
    for number, name in enumerate((*train, *valid)):
        pair(folder / name, 30 + number)
    for lists in (
        {"train": ["1", train[0], "3", train[1]], "valid": ["5", valid[0], "1", valid[1]], "test": None},
        {"train": f"1 {train[0]} 3 {train[1]}", "valid": list(valid)},
        {"train": [1, train[0], 3, train[1]], "valid": list(valid)},
    ):
        manifest = load(folder, lists)
        assert [name.split("_")[0] for name in manifest.names] == ["books", "web"]
        assert [domain.train.absolute() for domain in manifest.domains] == [folder / name for name in train]
        assert [domain.valid.absolute() for domain in manifest.domains] == [folder / name for name in valid[::-1]]
        assert manifest.given_weights == (1.0, 3.0)
        assert manifest.warnings == ()


def test_lists_by_split_that_do_not_fit_are_refused(folder):
    assert "held-out prefix y/b_text" in refused(folder, {"train": ["x/a"], "valid": ["y/b_text"]})
    assert "a second one" in refused(folder, {"train": ["x/a"], "valid": ["x/a", "y/a"]})
    assert "a second one" in refused(folder, {"train": ["1", "x/a"], "valid": ["1", "y/a", "1", "x/a"]})
    assert load(folder, {"train": ["x/a"], "valid": ["0", "y/b_text", "1", "y/a"]}).domains[0].valid.name == "a"
    assert "the list 'test' is ignored" in load(folder, {"train": ["x/a"], "test": ["x/b"]}).warnings[0]


# --- data that two domains share


def manifest_of(folder, *domains):
    sizes = {"tokens": 10, "documents": 1, "bytes": 30}
    entry = {"format": "megatron-doremi-domains/1", "domains": [dict(each, **sizes) for each in domains]}
    return entry


@pytest.mark.parametrize("spelling", ["../x/a", "../y/../x/./a", "{folder}/x/a", "../link/a", "../hard"])
@pytest.mark.parametrize("split", ["train", "valid"])
def test_two_domains_with_the_same_data_are_refused_however_it_is_spelled(folder, spelling, split):
    os.symlink("x", folder / "link")
    for suffix in ("bin", "idx"):
        os.link(folder / "x" / f"a.{suffix}", folder / f"hard.{suffix}")
    first, second = {"name": "A", "train": "../x/b"}, {"name": "B", "train": "../y/a"}
    first[split], second[split] = "../x/a", spelling.format(folder=folder)
    message = refused(folder, manifest_of(folder, first, second))
    assert f"'A' and 'B' have the same {split} data" in message


def test_held_out_data_that_are_train_data_and_names_that_look_alike_are_warned_of(folder, capsys):
    first = {"name": "Web", "train": "../x/a", "valid": "../x/b"}
    second = {"name": " WEB ", "train": "../x/deep/../b", "valid": None}
    print_warnings(load(folder, manifest_of(folder, first, second)))
    warnings = unwrapped(capsys.readouterr().err).splitlines()
    assert len(warnings) == 2
    assert "the held-out data of 'Web' is the training data of ' WEB '" in warnings[0]
    assert "'Web', ' WEB ' differ only by case or spaces" in warnings[1]
    assert load(folder, manifest_of(folder, first)).warnings == ()
