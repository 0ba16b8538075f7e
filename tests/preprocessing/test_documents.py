"""From records to documents: domains by key, rule and file name; splits by hash; Parquet.

Run alone: python -m pytest tests/preprocessing/test_documents.py
"""

from __future__ import annotations

import json
import pickle
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_doremi.errors import ConfigError
from megatron_doremi.preprocessing.documents import (
    RULES_FORMAT,
    BadLine,
    DocumentReader,
    DomainKey,
    count_timeouts,
    load_domain_list,
    load_rules,
    rule_by_file,
    share_of,
)
from megatron_doremi.preprocessing.inputs import domain_of_name
from megatron_doremi.preprocessing.sources import Block, read_blocks

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "domains"


def rules_of(folder, *rules, otherwise=None):
    path = folder / "rules.json"
    content = {"format": RULES_FORMAT, "rules": list(rules), "otherwise": otherwise}
    path.write_text(json.dumps(content))
    return load_rules(path)


def rule(key, pattern, domain):
    return {"key": key, "pattern": pattern, "domain": domain}


# --- rules


def test_the_first_rule_that_matches_gives_the_domain(tmp_path):
    rules = rules_of(
        tmp_path,
        rule("meta.url", r"wikipedia\.org/", "Wikipedia"),
        rule("meta.url", r"\.(edu|gov)\b", r"Web .\1"),
        rule("lang", r"^(?P<code>[a-z]{2})$", r"Text \g<code>"),
        rule("@file", r"/books-", "Books"),
        otherwise="Rest",
    )
    assert rules.columns == {"meta", "lang"}
    for record, file, domain in (
        ({"meta": {"url": "https://en.wikipedia.org/wiki/X"}, "lang": "en"}, "a", "Wikipedia"),
        ({"meta": {"url": "https://x.edu/"}, "lang": "en"}, "a", "Web .edu"),
        ({"meta": {"url": "https://x.com/"}, "lang": "fr"}, "a", "Text fr"),
        ({"meta": "not an object", "lang": 5}, "in/books-1.jsonl", "Books"),
        ({}, "a", "Rest"),
    ):
        assert rules.domain_of(record, file) == domain


def test_a_line_that_no_rule_matches_is_bad_without_a_default(tmp_path):
    with pytest.raises(BadLine, match="no domain rule matches"):
        rules_of(tmp_path, rule("a", "b", "c")).domain_of({"a": "x"}, "")


def test_a_rule_that_yields_an_empty_name_makes_a_bad_line(tmp_path):
    with pytest.raises(BadLine, match="empty domain"):
        rules_of(tmp_path, rule("a", "(b?)", r"\1")).domain_of({"a": "x"}, "")


def test_a_regular_expression_times_out(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_doremi.preprocessing.documents._TIMEOUT_SECONDS", 0.2)
    rules = rules_of(tmp_path, rule("a", "^(a|aa)+$", "c"), otherwise="d")
    with pytest.raises(BadLine, match=r"took more than 0\.2 s"):
        rules.domain_of({"a": "a" * 60 + "b"}, "")


WRONG = {
    "no rules": {"rules": []},
    "another format": {"format": "x"},
    "a missing pattern": {"rules": [{"key": "a", "domain": "b"}]},
    "a number": {"rules": [{"key": "a", "pattern": 5, "domain": "b"}]},
    "an invalid expression": {"rules": [rule("a", "(", "b")]},
    "a missing group": {"rules": [rule("a", "b", r"\1")]},
    "a missing named group": {"rules": [rule("a", "(b)", r"\g<c>")]},
    "a template with an invalid escape": {"rules": [rule("a", "b", "a\\q")]},
    "a template that ends in a backslash": {"rules": [rule("a", "b", "a\\")]},
    "a template with an invalid character": {"rules": [rule("a", "b", r"\U00110000")]},
    "a lone surrogate": {"rules": [rule("a", "b", "\ud800")]},
    "an empty default": {"otherwise": ""},
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_rules_are_refused(tmp_path, case):
    content = {"format": RULES_FORMAT, "rules": [rule("a", "b", "c")], "otherwise": None} | WRONG[case]
    (tmp_path / "rules.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="--domain-rules"):
        load_rules(tmp_path / "rules.json")


@pytest.mark.parametrize(
    ("file", "domain"),
    [
        ("data/arxiv-00012.jsonl.zst", "arxiv"),
        ("arxiv.jsonl", "arxiv"),
        ("books_3_of_8.parquet", "books"),
        ("c4/en.noblocklist-01-of-99.jsonl.gz", "en.noblocklist"),
        ("x/pes2o_v2.jsonl", "pes2o_v2"),
        ("x/c4.jsonl", "c4"),
        ("x/proof.JSONL.ZST", "proof"),
        ("x/Web_train.part3.csv", "Web"),
        ("x/train-web-00.jsonl", "web"),
        ("wiki/data/train-00000-of-00002.parquet", "wiki"),
        ("pile/train/07.jsonl.zst", "pile"),
        ("/train.jsonl", "train"),
    ],
)
def test_the_domain_is_the_file_name_without_number_and_split(file, domain):
    assert domain_of_name(Path(file)) == domain


def test_a_pattern_for_the_path():
    assert rule_by_file(r".*/(\w+)/[^/]+").domain_of({}, "in/en/a.jsonl") == "en"
    with pytest.raises(BadLine):
        rule_by_file(r"other/(.*)").domain_of({}, "in/en/a.jsonl")
    with pytest.raises(ConfigError, match="--domain-from-file"):
        rule_by_file("no group")


def test_a_rule_that_times_out_repeatedly_stops_the_run(tmp_path, monkeypatch):
    """Within one block, and over several blocks."""
    monkeypatch.setattr("megatron_doremi.preprocessing.documents._TIMEOUT_SECONDS", 0.05)
    rules = rules_of(tmp_path, rule("a", "^(a|aa)+$", "c"), rule("a", "a", "d"))
    lines = [json.dumps({"text": "x", "a": "a" * 60 + end}) + "\n" for end in "bbcb"]
    reader = DocumentReader("text", rules)
    block = Block("f", 1, "".join(lines[:2]).encode(), 0)
    slow = [bad.rule for _, bad in reader.documents(block)]
    assert slow == ["the pattern '^(a|aa)+$' on 'a'"] * 2
    timeouts = Counter(slow)
    for exceed in (
        lambda: count_timeouts(timeouts, slow[:1]),
        lambda: list(reader.documents(replace(block, data=block.data * 2))),
    ):
        with pytest.raises(ConfigError, match=re.escape(slow[0])) as caught:
            exceed()
        # Workers send the error to the main process.
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


# --- lists


@pytest.mark.parametrize(("name", "count"), [("pile", 22), ("regmix", 17), ("common_pile", 30)])
def test_the_lists_in_examples(name, count):
    names = load_domain_list(EXAMPLES / f"{name}.json")
    assert len(set(names)) == count
    if name == "regmix":
        assert set(names) < set(load_domain_list(EXAMPLES / "pile.json"))


def test_the_rules_in_examples():
    rules = load_rules(EXAMPLES / "rules.json")
    assert rules.domain_of({"meta": {"url": "https://de.wikipedia.org/wiki/A"}}, "") == "Wikipedia"
    assert rules.domain_of({"meta": {"url": "http://cs.uni.edu/a"}}, "") == "Web .edu"
    assert rules.domain_of({"meta": {"pile_set_name": "ArXiv"}}, "") == "ArXiv"
    assert rules.domain_of({}, "in/books-01.jsonl") == "Books"
    assert rules.domain_of({}, "in/cc-01.jsonl") == "Other web"


@pytest.mark.parametrize("content", [{}, {"domains": []}, {"domains": ["a", "a"]}, {"domains": ["a", 1]}, []])
def test_wrong_lists_are_refused(tmp_path, content):
    if isinstance(content, dict):
        content = {"format": "megatron-doremi-domain-list/1", **content}
    (tmp_path / "list.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="--domain-list"):
        load_domain_list(tmp_path / "list.json")


def test_a_domain_that_is_not_in_the_list_makes_a_bad_line():
    reader = DocumentReader("text", DomainKey("domain"), known=frozenset(["a"]))
    block = Block("f", 1, b'{"text": "x", "domain": "a"}\n{"text": "x", "domain": "b"}\n', 0)
    (_, first), (number, second) = reader.documents(block)
    assert first.domain == "a"
    assert (number, str(second)) == (2, "unknown domain 'b'")


# --- splits


def test_a_hash_of_the_text_alone_holds_out_the_valid_fraction():
    reader = DocumentReader("text", DomainKey("domain"), valid_fraction=0.1)
    texts = [f"text number {n}" for n in range(5000)]
    splits = {text: reader.read({"text": text, "domain": "a"}, "x").split for text in texts}
    held_out = {text for text, split in splits.items() if split == "valid"}
    assert 400 < len(held_out) < 600
    assert {text for text in texts if share_of(text.encode()) < 0.1} == held_out
    # A larger fraction contains a smaller one; the domain and the file do not matter.
    wider = DocumentReader("text", DomainKey("domain"), valid_fraction=0.2)
    assert all(wider.read({"text": text, "domain": "b"}, "y").split == "valid" for text in held_out)


def test_shares_are_the_same_on_every_machine():
    assert [round(share_of(text), 12) for text in (b"", b"a", "\u00e9".encode())] == [
        pytest.approx(value, abs=1e-12) for value in EXPECTED_SHARES
    ]


# blake2b digests of 6 bytes, divided by 2^48; coreutils' b2sum -l 48 gives the same.
EXPECTED_SHARES = [int(digest, 16) / 2**48 for digest in ("ddd9c40767f9", "433911c6eb0d", "fd327df7a50a")]


# --- Parquet


def write_parquet(path, rows, **options):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)


def test_rows_of_a_parquet_file_are_documents(tmp_path):
    rows = [{"text": f"text {n} \u00e9", "meta": {"name": "ab"[n % 2], "other": n}, "id": n} for n in range(1000)]
    rows[7]["text"] = None
    write_parquet(tmp_path / "d.parquet", rows, row_group_size=300)
    reader = DocumentReader("text", DomainKey("meta.name"))
    blocks = list(read_blocks(tmp_path / "d.parquet", reader.columns))
    documents = [pair for block in blocks for pair in reader.documents(block)]
    assert [number for number, _ in documents] == list(range(1, 1001))
    assert str(documents[7][1]) == "'text' is null"
    del documents[7], rows[7]
    assert [(d.text, d.domain, d.size) for _, d in documents] == [
        (row["text"], row["meta"]["name"], len(row["text"].encode())) for row in rows
    ]
    assert blocks[-1].position == (tmp_path / "d.parquet").stat().st_size


def test_large_parquet_files_are_split_into_blocks(tmp_path):
    rows = [{"text": chr(97 + n % 26) * 1000 + str(n), "domain": "a"} for n in range(5000)]
    write_parquet(tmp_path / "d.parquet", rows)
    blocks = list(read_blocks(tmp_path / "d.parquet", ["text", "domain"]))
    assert len(blocks) > 2
    assert sum(block.data.num_rows for block in blocks) == 5000


def test_damaged_parquet_files_are_reported(tmp_path):
    write_parquet(tmp_path / "good.parquet", [{"text": "x" * 5000, "domain": "a"}] * 200, compression="none")
    data = (tmp_path / "good.parquet").read_bytes()
    reader = DocumentReader("text", DomainKey("domain"))
    for damaged in (data[: len(data) // 2], b"PAR1", b""):
        (tmp_path / "bad.parquet").write_bytes(damaged)
        blocks = read_blocks(tmp_path / "bad.parquet", reader.columns)
        *_, (_, bad) = (pair for block in blocks for pair in reader.documents(block))
        assert str(bad).startswith("the file is truncated here: its footer is missing; read 0 rows, 0 of")
    with pytest.raises(ConfigError, match="no column 'other'"):
        list(read_blocks(tmp_path / "good.parquet", ["other", "text"]))


def test_text_of_a_parquet_file_that_is_not_utf8(tmp_path):
    column = pyarrow.array([b"good", b"\xff\xfe"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column, "domain": ["a", "a"]}), tmp_path / "d.parquet")
    reader = DocumentReader("text", DomainKey("domain"))
    (block,) = read_blocks(tmp_path / "d.parquet", reader.columns)
    (_, good), (number, bad) = reader.documents(block)
    assert (good.text, number, str(bad)) == ("good", 2, "not UTF-8")
