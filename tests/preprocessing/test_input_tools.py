"""The tools on input files of every format: counts, exit codes, and no silent skipping.

Run alone: python -m pytest tests/preprocessing/test_input_tools.py
"""

from __future__ import annotations

import gzip
import json
import os
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import zstandard
from input_files import lines, parquet, pile, put, records, table
from ranks import run_tool, unwrapped

from megatron_doremi.data.indexed_dataset import IndexedDataset
from megatron_doremi.data.manifest import load_manifest
from megatron_doremi.preprocessing.documents import share_of
from megatron_doremi.preprocessing.input_options import held_out_fraction

TOOLS = Path(__file__).resolve().parents[2] / "tools"
ROWS = records(30)
RAW = lines(pile(ROWS))


def run(tool, *words, limit=None, **environment):
    """A real start of Python where its limits or its environment matter."""
    if limit is None and not environment:
        done = run_tool(TOOLS / tool, list(map(str, words)))
        done.stdout, done.stderr = (os.fsencode(unwrapped(text)) for text in (done.stdout, done.stderr))
        return done

    def limited():
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)

    command = [sys.executable, os.fsencode(TOOLS / tool), *(os.fsencode(str(word)) for word in words)]
    environment = os.environ | environment
    done = subprocess.run(command, capture_output=True, timeout=120, env=environment, preexec_fn=limited)
    done.stdout, done.stderr = (os.fsencode(unwrapped(os.fsdecode(text))) for text in (done.stdout, done.stderr))
    return done


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer trained on a CSV and a Parquet file with the same input options."""
    folder = tmp_path_factory.mktemp("tokenizer")
    words = ["--input", put(folder / "t.csv", table([{"text": row["text"], "domain": "Web"} for row in ROWS]))]
    words += [parquet(folder / "t.parquet", [{"text": "abc"}]), "--domain-key", "domain", "--default-domain", "Rest"]
    done = run("train_tokenizer.py", *words, "--output", folder / "t.json", "--vocab-size", 300)
    assert done.returncode == 0, done.stderr
    assert b"of 2 domains" in done.stdout
    return folder / "t.json"


def preprocess(tokenizer, output, *words, **named):
    given = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer, "--output-dir", output]
    return run("preprocess_data.py", *given, "--workers", 1, "--split", "train", *words, **named)


def test_files_of_every_format_form_one_input(tokenizer, tmp_path):
    files = [
        put(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + RAW),
        put(tmp_path / "b.json", json.dumps(pile(ROWS)).encode()),
        put(tmp_path / "c.json.gz", gzip.compress(RAW)),
        put(tmp_path / "d.jsonl.zstd", zstandard.compress(RAW)),
        put(tmp_path / "e.csv", table([{"text": row["text"], "meta": json.dumps(row["meta"])} for row in pile(ROWS)])),
        parquet(tmp_path / "f.parquet", pile(ROWS)),
        put(tmp_path / "g.ndjson.zst", RAW),
    ]
    for number, row in enumerate(ROWS):
        put(tmp_path / "folder" / row["domain"] / f"{number}.txt", row["text"].encode())
    done = preprocess(tokenizer, tmp_path / "out", "--input", *files, tmp_path / "folder", "--append-eod")
    assert done.returncode == 0, done.stderr
    single = preprocess(tokenizer, tmp_path / "one", "--input", files[3], "--append-eod")
    assert single.returncode == 0, single.stderr
    pairs = {}
    for name in ("out", "one"):
        for domain in load_manifest(tmp_path / name / "domains.json").domains:
            pairs[name, domain.name] = domain, domain.train.with_suffix(".bin").read_bytes()
    for name in ("Code", "Web"):
        (merged, all_ids), (one, ids) = pairs["out", name], pairs["one", name]
        assert (merged.documents, merged.bytes, merged.tokens) == (8 * one.documents, 8 * one.bytes, 8 * one.tokens)
        assert all_ids[: 7 * len(ids)] == 7 * ids
        assert len(all_ids) == 8 * len(ids)


def test_the_last_line_of_output_reports_what_was_skipped(tokenizer, tmp_path):
    """It lists damaged files before bad lines, however many bad lines there are."""
    bad = [{"text": 5, "meta": {"pile_set_name": "Web"}}] * 15
    empty = [{"text": "", "meta": {"pile_set_name": "Web"}}] * 3
    many = put(tmp_path / "many.jsonl", lines([*bad, *empty, {"text": "x", "meta": {"pile_set_name": "WEB"}}]))
    latin = put(tmp_path / "latin.jsonl", lines(pile(ROWS), ascii_only=False).decode().encode("latin-1"))
    cut = put(tmp_path / "cut.jsonl.gz", gzip.compress(RAW)[:-10])
    words = ["--input", many, latin, cut]
    refused = preprocess(tokenizer, tmp_path / "out", *words)
    assert refused.returncode == 2
    assert refused.stderr.decode().count(f"{latin}: the file looks like Latin-1") == 1
    assert list((tmp_path / "out").glob("[!.]*")) == []
    done = preprocess(tokenizer, tmp_path / "out", *words, "--on-error", "skip", "--resume")
    assert done.returncode == 0, done.stderr
    last = done.stdout.decode().splitlines()[-1]
    assert last.startswith(f"skipped 3 empty texts; skipped 46 bad lines: {latin}: the file looks like")
    assert f"{cut}, line 30: the file is truncated here; read 29 lines" in last
    assert f"{many}, line 10: 'text' is not text" in last
    assert done.stderr.decode().count("the domains 'WEB' and 'Web' differ only by case or spaces") == 1


def test_names_that_the_console_cannot_display(tokenizer, tmp_path):
    """A file name that is not UTF-8, and a domain name that is not ASCII on an ASCII console."""
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    with open(folder + b"/\xff.jsonl", "wb") as file:
        file.write(lines([{"text": "x", "meta": {"pile_set_name": "\u4e66 \u00e9"}}]) + b"bad\n")
    name = os.fsdecode(folder + b"/\xff.jsonl")
    words = ["--input", name, "--on-error", "skip"]
    done = preprocess(tokenizer, tmp_path / "out", *words, PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C")
    assert done.returncode == 0, done.stderr
    assert b"\\u4e66 \\xe9" in done.stdout
    assert b"line 2: not JSON" in done.stdout
    assert load_manifest(tmp_path / "out" / "domains.json").names == ("\u4e66 \u00e9",)


def test_more_domains_than_the_soft_limit_of_open_files(tokenizer, tmp_path):
    rows = [{"text": "text", "meta": {"pile_set_name": f"domain {number}"}} for number in range(60)]
    words = ["--input", put(tmp_path / "d.jsonl", lines(rows))]
    done = preprocess(tokenizer, tmp_path / "out", *words, limit=(100, 1000))
    assert done.returncode == 0, done.stderr
    assert len(load_manifest(tmp_path / "out" / "domains.json").domains) == 60
    done = preprocess(tokenizer, tmp_path / "less", *words, limit=(100, 100))
    assert done.returncode == 2
    assert b"at most 100 open files in this process, four per domain" in done.stderr
    assert b"raise the hard limit" in done.stderr


def test_any_domain_name_gives_files_in_the_output_folder(tokenizer, tmp_path):
    names = ["x" * 300 + end for end in "ab"] + ["\u4e66" * 300, "../up", "/root", ".", ".."]
    rows = [{"text": name, "meta": {"pile_set_name": name}} for name in names]
    done = preprocess(tokenizer, tmp_path / "out", "--input", put(tmp_path / "d.jsonl", lines(rows)))
    assert done.returncode == 0, done.stderr
    manifest = load_manifest(tmp_path / "out" / "domains.json")
    assert set(manifest.names) == set(names)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.jsonl", "out"]
    assert all(domain.train.parent == tmp_path / "out" for domain in manifest.domains)
    assert len({domain.train for domain in manifest.domains}) == len(names)


def test_without_a_split_a_part_of_the_documents_is_held_out(tokenizer, tmp_path):
    """A folder of text for each domain; the fraction depends on the size of the files alone."""
    for number, row in enumerate(records(120)):
        put(tmp_path / "in" / row["domain"] / f"{number}.md", row["text"].encode())
    given = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer, "--output-dir"]
    done = run("preprocess_data.py", "--input", tmp_path / "in", *given, tmp_path / "out", "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert b"holding out a fraction of 0.05 of the documents" in done.stdout
    assert b"warning" not in done.stderr
    domains = load_manifest(tmp_path / "out" / "domains.json").domains
    held_out = [row for row in records(120) if share_of(row["text"].encode()) < 0.05]
    assert {domain.name: 60 - domain.documents for domain in domains} == Counter(row["domain"] for row in held_out)
    done = run("preprocess_data.py", "--input", tmp_path / "in" / "Web", *given, tmp_path / "one", "--workers", 1)
    assert done.stderr.count(b"all documents are of a single domain, 'Web'") == 1
    few = put(tmp_path / "few.csv", table([{"text": "a"}, {"text": "b"}]))
    done = run("preprocess_data.py", "--input", few, *given, tmp_path / "few", "--workers", 1)
    assert b"warning: no document is held out of few; more text or" in done.stderr
    assert [held_out_fraction(size) for size in (0, 4 * 10**8, 2 * 10**9, 10**12)] == [0.05, 0.05, 0.01, 0.001]


def test_one_command_writes_both_splits_of_a_folder_that_has_them(tokenizer, tmp_path):
    """Of a folder without splits beside it nothing is held out: its documents are not read a second time."""
    for split, count in (("train", 3), ("validation", 2), ("test", 1)):
        put(tmp_path / "in" / "web" / f"{split}.jsonl", lines([{"text": f"{split} {n}"} for n in range(count)]))
    put(tmp_path / "plain" / "law" / "a.jsonl", lines([{"text": "law"}]))
    words = ["--input", tmp_path / "in", tmp_path / "plain", "--tokenizer-model", tokenizer, "--workers", 1]
    words += ["--output-dir", tmp_path / "out", "--resume"]
    done = run("preprocess_data.py", *words)
    assert done.returncode == 0, done.stderr
    assert b"this run then adds the held-out files of" in done.stderr
    manifest = load_manifest(tmp_path / "out" / "domains.json")
    documents = {
        domain.name: [
            IndexedDataset(prefix).num_documents if prefix else None for prefix in (domain.train, domain.valid)
        ]
        for domain in manifest.domains
    }
    assert documents == {"law": [1, None], "web": [3, 2]}
    assert b"warning: no held-out documents of law: runs are not evaluated on them" in done.stderr
    # The same where the splits are paths of their own.
    put(tmp_path / "text" / "train" / "0.txt", b"train")
    put(tmp_path / "text" / "validation" / "0.txt", b"valid")
    files = [tmp_path / "in" / "web" / f"{name}.jsonl" for name in ("train", "validation", "test")]
    given = ["--input", *files, tmp_path / "text" / "train", tmp_path / "text" / "validation", *words[3:-2]]
    done = run("preprocess_data.py", *given, tmp_path / "paths")
    assert done.returncode == 0, done.stderr
    assert b"not read, beside a validation split: " + os.fsencode(files[2]) in done.stderr
    domains = load_manifest(tmp_path / "paths" / "domains.json").domains
    sizes = {
        each.name: [IndexedDataset(prefix).num_documents for prefix in (each.train, each.valid)] for each in domains
    }
    assert sizes == {"text": [1, 1], "web": [3, 2]}
    # An interrupted valid split is resumed: the train split is complete.
    (tmp_path / "out" / ".partial-valid").mkdir()
    again = run("preprocess_data.py", *words)
    assert (again.returncode, again.stdout.count(b"encoding with")) == (0, 1), again.stderr
    # Beside an unfinished train split, what is left of a valid split is older.
    for split in ("train", "valid"):
        (tmp_path / "out" / f".partial-{split}").mkdir()
    again = run("preprocess_data.py", *words)
    assert (again.returncode, again.stdout.count(b"encoding with")) == (0, 2), again.stderr
    # Faults of the held-out files are found before the train split is encoded.
    without_text = put(tmp_path / "validation.csv", b"a,b\n1,2\n")
    done = run("preprocess_data.py", "--input", files[0], without_text, *words[3:-2], tmp_path / "none")
    assert (done.returncode, done.stdout.count(b"encoding with")) == (2, 0), done.stderr
    assert b"validation.csv" in done.stderr
