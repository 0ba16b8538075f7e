"""Input files of every format that occurs in practice: read correctly, or rejected with a precise reason.

Run alone: python -m pytest tests/preprocessing/test_inputs.py
"""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import re
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from data.file_mutations import mutated_bytes
from input_files import compressed, lines, long_window, options, parquet, pile, put, read, records, table
from ranks import unwrapped

from megatron_doremi.errors import ConfigError, RunError
from megatron_doremi.preprocessing import decompression, record_blocks
from megatron_doremi.preprocessing.decompression import DAMAGED, TRUNCATED
from megatron_doremi.preprocessing.file_domains import domain_warnings, without_documents
from megatron_doremi.preprocessing.inputs import find_inputs
from megatron_doremi.preprocessing.sources import read_blocks

ROWS = records()
PLAIN = [(row["text"], row["domain"]) for row in ROWS]
RAW = lines(pile(ROWS))
HALF = len(RAW) // 2
UTF8 = lines(pile(ROWS), ascii_only=False)
META_AS_TEXT = table([{**row, "meta": json.dumps(row["meta"])} for row in pile(ROWS)])

AS_PLAIN = {
    "plain.jsonl": RAW,
    "bom.jsonl": b"\xef\xbb\xbf" + RAW,
    "two_boms.jsonl": b"\xef\xbb\xbf" + RAW[: RAW.index(b"\n") + 1] + b"\xef\xbb\xbf" + RAW[RAW.index(b"\n") + 1 :],
    "crlf.jsonl": RAW.replace(b"\n", b"\r\n"),
    "no_last_newline.jsonl": RAW.rstrip(b"\n"),
    "records.ndjson": RAW,
    "records.json": RAW,
    "records.json.gz": gzip.compress(RAW),
    "records.jsonl.zstd": zstandard.compress(RAW),
    "UPPER.JSONL.ZST": zstandard.compress(RAW),
    "array.json": json.dumps(pile(ROWS)).encode(),
    "pretty.json": b"\xef\xbb\xbf \n" + json.dumps(pile(ROWS), indent=4, ensure_ascii=False).encode() + b"\n\n",
    "array.json.zst": zstandard.compress(json.dumps(pile(ROWS)).encode()),
    "two_frames.jsonl.zst": zstandard.compress(RAW[:HALF]) + zstandard.compress(RAW[HALF:]),
    "two_members.jsonl.gz": gzip.compress(RAW[:HALF]) + gzip.compress(RAW[HALF:]),
    "skippable.jsonl.zst": b"\x5a\x2a\x4d\x18\x03\0\0\0abc" + zstandard.compress(RAW),
    "checksum.jsonl.zst": zstandard.ZstdCompressor(write_checksum=True).compress(RAW),
    "long_window.jsonl.zst": long_window(RAW),
    "not_zstd.jsonl.zst": RAW,
    "not_gzip.jsonl.gz": UTF8,
    "gzip_by_another_name.jsonl": gzip.compress(RAW),
    "nan.jsonl": RAW.replace(b'"Web"}', b'"Web", "score": NaN}'),
    "meta_as_text.jsonl": lines([{**row, "meta": json.dumps(row["meta"])} for row in pile(ROWS)]),
    "meta_as_text.csv": META_AS_TEXT,
    "bom.csv.gz": gzip.compress(b"\xef\xbb\xbf" + META_AS_TEXT),
}


@pytest.mark.parametrize("name", AS_PLAIN)
def test_read_like_plain_json_lines(name, tmp_path):
    assert read(put(tmp_path / name, AS_PLAIN[name])) == (PLAIN, [])


def test_tables_are_read_like_json_lines(tmp_path):
    for name in ("table.csv", "table.csv.zst"):
        assert read(put(tmp_path / name, compressed(table(ROWS), name)), "--domain-key", "domain") == (PLAIN, [])
    for text_type in (pyarrow.large_string(), pyarrow.binary(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())):
        text = pyarrow.array([row["text"] for row in ROWS]).cast(text_type)
        columns = {"text": text, "domain": [row["domain"] for row in ROWS], "id": list(range(len(ROWS)))}
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
        assert read(tmp_path / "t.parquet", "--domain-key", "domain") == (PLAIN, [])


def test_integers_are_valid_domain_names(tmp_path):
    rows = [{"text": row["text"], "domain": i % 2} for i, row in enumerate(ROWS)]
    parquet(tmp_path / "d.parquet", rows)
    for path in (put(tmp_path / "d.jsonl", lines(rows)), tmp_path / "d.parquet", put(tmp_path / "d.csv", table(rows))):
        assert read(path, "--domain-key", "domain") == ([(row["text"], str(row["domain"])) for row in rows], [])
    # Booleans and fractions are not.
    for value in ("true", "0.5", "[1]"):
        line = b'{"text": "x", "domain": ' + value.encode() + b"}\n"
        assert read(put(tmp_path / "e.jsonl", line), "--domain-key", "domain")[1] == [
            f"{tmp_path}/e.jsonl, line 1: 'domain' is not text"
        ]


# --- faults of files


WRONG_FORMATS = {
    "utf16.jsonl": (RAW.decode().encode("utf-16"), r"looks like UTF-16: convert it with iconv -f UTF-16 -t UTF-8"),
    "utf16le.jsonl": (RAW.decode().encode("utf-16-le"), r"looks like UTF-16LE: convert"),
    "utf16be.csv": (b"\xfe\xff" + table(ROWS).decode().encode("utf-16-be"), r"looks like UTF-16: convert"),
    "utf32.jsonl": (RAW.decode().encode("utf-32"), r"looks like UTF-32: convert"),
    "utf16.jsonl.gz": (gzip.compress(RAW.decode().encode("utf-16")), r"looks like UTF-16: convert"),
    "latin1.jsonl": (UTF8.decode().encode("latin-1"), r"looks like Latin-1 or Windows-1252, .*iconv -f WINDOWS-1252"),
    "bzip2.jsonl": (b"BZh91AY&SY", r"is bzip2: decompress it"),
    "xz.jsonl.zst": (b"\xfd7zXZ\0\0", r"is xz: decompress it"),
    "parquet.jsonl": (b"PAR1" + bytes(50), r"is Parquet: name it \*\.parquet"),
    "bytes.jsonl.gz": (bytes(range(256)) * 9, r"is neither gzip nor text"),
    "lines.parquet": (RAW, r"is not Parquet"),
    "dictionary.jsonl.zst": (
        zstandard.ZstdCompressor(
            dict_data=zstandard.train_dictionary(2000, [RAW[i:] for i in range(0, 9000, 9)])
        ).compress(RAW),
        r"was compressed with a zstd dictionary",
    ),
}


@pytest.mark.parametrize("name", WRONG_FORMATS)
def test_a_file_in_a_wrong_format_is_reported_once(name, tmp_path):
    data, reason = WRONG_FORMATS[name]
    documents, bad = read(put(tmp_path / name, data))
    assert documents == []
    assert len(set(bad)) == 1
    assert re.fullmatch(rf"{re.escape(str(tmp_path / name))}: the file {reason}.*", bad[0])


def test_a_window_that_exceeds_the_memory_is_reported(tmp_path, monkeypatch):
    path = put(tmp_path / "d.jsonl.zst", long_window(RAW))
    monkeypatch.setattr(decompression, "_free_memory", lambda: 1 << 30)
    (message,) = read(path)[1]
    assert "a window larger than the 512 MiB that this machine's free memory allows" in message


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.zst", "d.jsonl.gz"])
def test_a_disk_that_fails_is_not_a_broken_file(name, tmp_path):
    """On Linux, reading /proc/self/mem from its start is an input/output error."""
    (tmp_path / name).symlink_to("/proc/self/mem")
    with pytest.raises(RunError, match=r"cannot read .*: Input/output error"):
        list(read_blocks(tmp_path / name, []))


BROKEN_FILES = {
    "cut.jsonl.zst": (zstandard.compress(RAW[:HALF]) + zstandard.compress(RAW[HALF:])[:-20], TRUNCATED),
    "cut.jsonl.gz": (gzip.compress(RAW)[:-9], TRUNCATED),
    "cut_header.jsonl.zst": (zstandard.compress(RAW)[:3], TRUNCATED),
    "tail.jsonl.gz": (gzip.compress(RAW) + b"garbage", f"{DAMAGED} (gzip"),
    "tail.jsonl.zst": (zstandard.compress(RAW) + b"garbage", f"{DAMAGED} (zstd"),
    "open.json": (json.dumps(pile(ROWS)).encode()[:-5], f"{TRUNCATED}: its array is not closed"),
    "closed_twice.json": (json.dumps(pile(ROWS)).encode() + b"]", "text follows the end of the array"),
    "footer.parquet": (b"PAR1" + RAW, f"{TRUNCATED}"),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_a_broken_file_reports_how_much_was_read(name, tmp_path):
    data, reason = BROKEN_FILES[name]
    documents, bad = read(put(tmp_path / name, data), *(["--domain-from-file"] if "parquet" in name else []))
    assert documents == PLAIN[: len(documents)]
    assert len(bad) == 1
    share = rf"; read (\d+) (line|element|row)s, [\d,]+ of {len(data):,} bytes on disk \(\d+ %\)"
    match = re.search(re.escape(reason) + r".*" + share, bad[0])
    assert match, bad
    assert int(match.group(1)) == len(documents)
    assert name.startswith(("cut_header", "footer")) or len(documents) >= 10


# --- lines


def test_reading_takes_time_linear_in_the_length_of_a_line(tmp_path, monkeypatch):
    """Version 0.1 searched for the end of the line from its start after every 32 KiB."""
    size = 0

    class NoSearch(bytearray):
        def rfind(self, *_):
            raise AssertionError("searched the entire buffer")

    monkeypatch.setattr(record_blocks, "bytearray", NoSearch, raising=False)
    with gzip.open(tmp_path / "d.jsonl.gz", "wb", compresslevel=1) as file:
        file.write(b'{"text": "')
        for _ in range(30):
            file.write(b"a " * 500_000)
        file.write(b'", "meta": {"pile_set_name": "Web"}}\n' + RAW)
    for block in read_blocks(tmp_path / "d.jsonl.gz", []):
        size += len(block.data)
    assert size == 30_000_000 + len(b'{"text": "", "meta": {"pile_set_name": "Web"}}\n' + RAW)


def test_an_endless_line_is_skipped_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(record_blocks, "RECORD_BYTES", 1 << 22)
    monkeypatch.setattr("megatron_doremi.preprocessing.sources.RECORD_BYTES", 1 << 22)
    bomb = zstandard.compress(RAW + b"x" * 200_000_000 + b"\n" + RAW, 1)
    path = put(tmp_path / "d.jsonl.zst", bomb)
    tracemalloc.start()
    documents, bad = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert documents == PLAIN * 2
    assert bad == [f"{path}, line 41: longer than 4 MiB"]
    assert peak < 40_000_000


def test_decompression_yields_parts_of_bounded_size(tmp_path):
    """A zstd block of four bytes may hold 128 KiB; version 0.1 decompressed 32 KiB of them at once."""
    path = put(tmp_path / "d.jsonl.zst", zstandard.compress(b" " * 300_000_000 + b"\n" + RAW))
    assert path.stat().st_size < 40_000
    with path.open("rb") as raw:
        assert max(map(len, decompression.text_parts(raw, path))) <= 18 << 17


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_records_that_span_many_parts(kind, tmp_path, monkeypatch):
    """The boundaries between reads fall everywhere, including after a backslash and within quotes."""
    rows = records(12, '#\\" \\\\ "",\r\n\u4f60[{]\n')
    data = json.dumps(rows).encode() if kind == "json" else table(rows)
    path = put(tmp_path / f"d.{kind}", data)
    monkeypatch.setattr(decompression, "_SNIFFED_BYTES", 1)
    monkeypatch.setattr(record_blocks, "BLOCK_BYTES", 50)
    for size in range(1, 40):
        monkeypatch.setattr(decompression, "_PLAIN_BYTES", size)
        assert read(path, "--domain-key", "domain") == ([(row["text"], row["domain"]) for row in rows], [])


def test_wrong_elements_of_an_array_are_reported(tmp_path):
    good = json.dumps(ROWS[0])
    path = put(tmp_path / "d.json", f'[{good}, {{"text": 1}}, {{"a" 5}}, , "x", {good}]'.encode())
    documents, bad = read(path, "--domain-key", "domain")
    assert documents == PLAIN[:1] * 2
    faults = {2: "'text' is not text", 3: "not JSON", 4: "not JSON", 5: "no key 'text'"}
    assert bad == [f"{path}, element {number}: {text}" for number, text in faults.items()]
    assert read(put(tmp_path / "e.json", b" [ \n ] ")) == ([], [])


def test_wrong_records_of_a_table_are_reported(tmp_path):
    body = b'text,domain\n"a\nb",Web\n"x"y,Web\nc\n\nd,Code\n\xe9,Web\ne,\nf,Web\n"open,Web\ng,Web\n'
    path = put(tmp_path / "d.csv", body)
    documents, bad = read(path, "--domain-key", "domain")
    assert documents == [("a\nb", "Web"), ("d", "Code"), ("f", "Web")]
    assert [message.removeprefix(str(path)) for message in bad] == [
        ", line 4: not CSV (',' expected after '\"')",
        ", line 5: number of fields: 1, in the header: 2",
        f": the file looks like Latin-1 or Windows-1252, not UTF-8: {decompression.conversion('WINDOWS-1252')}",
        ", line 9: 'domain' is empty",
        ", line 11: not CSV (unexpected end of data), consumed up to line 12",
    ]


# --- Parquet


def test_a_small_file_with_much_text_is_split_into_blocks(tmp_path):
    """A dictionary with one value for all rows: 80 MB of text in less than a kilobyte."""
    rows = pyarrow.table({"text": pyarrow.array(["a " * 50_000] * 800), "domain": pyarrow.array(["Web"] * 800)})
    pyarrow.parquet.write_table(rows, tmp_path / "d.parquet", compression="zstd")
    assert (tmp_path / "d.parquet").stat().st_size < 1000
    before = pyarrow.total_allocated_bytes()
    peak = count = 0
    for block in read_blocks(tmp_path / "d.parquet", ["domain", "text"]):
        peak = max(peak, pyarrow.total_allocated_bytes() - before)
        count += block.data.num_rows
        assert block.data.nbytes <= 1 << 21
    assert count == 800
    assert peak < 60_000_000


def test_wrong_columns_are_reported_before_anything_is_read(tmp_path):
    parquet(tmp_path / "integers.parquet", [{"text": 5, "domain": "a"}])
    parquet(tmp_path / "other.parquet", [{"content": "x", "domain": "a"}])
    put(tmp_path / "other.csv", b"content,domain\nx,a\n")
    put(tmp_path / "twice.csv", b"text,domain,text\nx,a,b\n")
    with pytest.raises(ConfigError) as caught:
        options(*sorted(tmp_path.iterdir()), "--domain-key", "domain")
    assert [(Path(fault.subject.split()[1]).name, fault.value) for fault in caught.value.faults] == [
        ("integers.parquet", "column 'text' holds int64"),
        ("other.csv", "no column 'text'"),
        ("other.parquet", "no column 'text'"),
        ("twice.csv", "two columns 'text'"),
    ]


# --- domains


DEFAULT = ("--default-domain", "R")


def test_the_default_domain(tmp_path, capsys):
    rows = [{"text": "a", "domain": value} for value in (None, "", "  ", "Web", 3)] + [{"text": "b"}]
    path = put(tmp_path / "d.jsonl", lines(rows))
    documents, bad = read(path, "--domain-key", "domain")
    assert [domain for _, domain in documents] == ["Web", "3"]
    assert [message.split(": ")[1] for message in bad] == [
        "'domain' is null",
        *["'domain' is empty"] * 2,
        "no key 'domain'",
    ]
    documents, bad = read(path, "--domain-key", "domain", "--default-domain", " Rest ")
    assert [domain for _, domain in documents] == ["Rest", "Rest", "Rest", "Web", "3", "Rest"]
    assert bad == []
    # A table without the domain column.
    assert read(parquet(tmp_path / "d.parquet", [{"text": "x"}]), "--default-domain", "R") == ([("x", "R")], [])
    # If --domain-key names a missing column, it may be a typo, so there is a warning.
    options(parquet(tmp_path / "e.parquet", [{"text": "x", "domain": "Web"}]), "--domain-key", "domian", *DEFAULT)
    assert "e.parquet has no column 'domian': all of its documents go to 'R'" in unwrapped(capsys.readouterr().err)
    options(tmp_path / "e.parquet", "--domain-key", "domain", *DEFAULT)
    assert capsys.readouterr().err == ""
    rules = {"format": "megatron-doremi-domain-rules/1", "rules": [{"key": "u", "pattern": "w", "domain": "W"}]}
    put(tmp_path / "rules.json", json.dumps(rules).encode())
    assert read(path, "--domain-rules", tmp_path / "rules.json", "--default-domain", "R")[0][0] == ("a", "R")
    for name in ("", " ", "\ud800"):
        with pytest.raises(ConfigError, match="--default-domain"):
            options(path, "--default-domain", name)


def test_white_space_around_a_domain_name_is_stripped(tmp_path):
    path = put(tmp_path / "d.jsonl", lines([{"text": "a", "domain": name} for name in ("Web", " Web ", "\tWeb\n")]))
    assert read(path, "--domain-key", "domain") == ([("a", "Web")] * 3, [])


def test_a_lone_surrogate_in_a_domain_name_makes_a_bad_line(tmp_path):
    path = put(tmp_path / "d.jsonl", b'{"text": "x", "domain": "a\\ud800"}\n{"text": "x", "domain": "a"}\n')
    documents, (message,) = read(path, "--domain-key", "domain")
    assert documents == [("x", "a")]
    assert message == f"{path}, line 1: the domain name contains a lone surrogate"


# --- folders and duplicate files


def test_the_folder_gives_the_domain(tmp_path):
    for domain in ("Web", "Code"):
        rows = [row for row in ROWS if row["domain"] == domain]
        for number, row in enumerate(rows):
            put(tmp_path / "text" / domain / f"{number:02}.{('txt', 'md')[number % 2]}", row["text"].encode())
        parquet(tmp_path / "hf" / "data" / domain / "train-00000-of-00001.parquet", [{"text": r["text"]} for r in rows])
        put(tmp_path / "json" / domain / "deeper" / "a.jsonl", lines([{"text": row["text"]} for row in rows]))
    put(tmp_path / "hf" / "README.md", b"# A card")
    put(tmp_path / "hf" / ".cache" / "x.jsonl", b"hidden")
    code_first = sorted(PLAIN, key=lambda pair: pair[1])
    for name in ("text", "hf", "json"):
        assert read(tmp_path / name) == (code_first, [])
    assert read(tmp_path / "text" / "Web", tmp_path / "text" / "Code")[0] == sorted(PLAIN, key=lambda p: p[1] != "Web")
    assert read(tmp_path / "text", "--domain-from-file", r".*/(\w)[^/]*/[^/]*")[0][0][1] == "C"
    # A flag that names a field overrides the folder; files directly in the given folder use the default key.
    with pytest.raises(ConfigError, match="no column 'domain'"):
        read(tmp_path / "hf", "--domain-key", "domain")
    put(tmp_path / "flat" / "a.jsonl", RAW)
    assert read(tmp_path / "flat") == (PLAIN, [])


def test_ignored_files_in_folders_are_reported(tmp_path, capsys):
    put(tmp_path / "d" / "a.jsonl", RAW)
    put(tmp_path / "d" / "README.md", b"x")
    put(tmp_path / "d" / "picture.png", b"x")
    options(tmp_path / "d")
    assert "ignoring 2 of 3 files, of other kinds: README.md, picture.png" in unwrapped(capsys.readouterr().err)
    put(tmp_path / "none" / "picture.png", b"x")
    for split in ("train", "test"):
        parquet(tmp_path / "splits" / f"{split}-00000-of-00001.parquet", [{"text": "x"}])
    (tmp_path / "circle").mkdir()
    (tmp_path / "circle" / "again").symlink_to(tmp_path / "circle")
    put(tmp_path / "circle" / "a.jsonl", RAW)
    assert len(find_inputs([tmp_path / "circle"]).files) == 1
    with pytest.raises(ConfigError, match="holds no input files"):
        options(tmp_path / "none", tmp_path / "splits")


def test_the_name_of_a_file_gives_the_domain_of_records_without_one(tmp_path, capsys):
    """Without a flag for domains, if no record has meta.pile_set_name; in a folder of mixed files the key decides."""
    bare = [{"text": row["text"]} for row in ROWS]
    for name, rows in (("web-train-0.jsonl", bare), ("web-train-1.jsonl", bare[:1]), ("code_train.jsonl", bare)):
        put(tmp_path / "a" / name, lines(rows))
    parquet(tmp_path / "a" / "law.parquet", bare)
    expected = [(row["text"], name) for name, n in (("code", 40), ("law", 40), ("web", 41)) for row in (ROWS * 2)[:n]]
    documents, bad = read(tmp_path / "a")
    assert ([name for _, name in documents], bad) == ([name for _, name in expected], [])
    assert "the file's name gives the domain (code, law, web)" in unwrapped(capsys.readouterr().err)
    assert read(tmp_path / "a", "--domain-from-file") == (documents, [])
    assert read(tmp_path / "a" / "*.jsonl")[0] == [pair for pair in documents if pair[1] != "law"]
    assert read(tmp_path / "a", "--default-domain", "R")[0][0][1] == "R"
    put(tmp_path / "a" / "with_key.jsonl", RAW)
    (tmp_path / "a" / "law.parquet").unlink()
    with pytest.raises(ConfigError, match=r"in its first 40 records(?s:.*)--default-domain"):
        read(tmp_path / "a")
    documents, bad = read(tmp_path / "a", "--on-error", "skip")
    assert (documents, len(bad)) == (PLAIN, 81)


def test_text_files_named_by_words_of_splits_are_documents(tmp_path):
    for name in ("web/test_plan.txt", "web/dev-guide.md", "law/validation.txt", "law/a.txt"):
        put(tmp_path / "a" / name, b"a")
    found = find_inputs([tmp_path / "a"])
    assert (len(found.files), found.with_held_out) == (4, [])
    # Names that differ by the split alone are splits.
    for name in ("web/wiki-train.txt", "web/wiki-valid.txt"):
        put(tmp_path / "a" / name, b"a")
    found = find_inputs([tmp_path / "a"])
    assert (len(found.files), found.with_held_out) == (5, [tmp_path / "a"])


def test_a_folder_of_text_beside_folders_of_records_is_a_domain(tmp_path):
    put(tmp_path / "a" / "code" / "0.jsonl", lines(ROWS[:2]))
    put(tmp_path / "a" / "code" / "README.md", b"about")
    put(tmp_path / "a" / "README.md", b"about")
    put(tmp_path / "a" / "web" / "0.txt", b"a")
    put(tmp_path / "a" / "web" / "1.txt", b"")
    found = find_inputs([tmp_path / "a"])
    assert [file.domain for file in found.files] == ["code", "web", "web"]
    assert any("1 empty file: " in note for note in found.ignored)
    assert without_documents(found.files, [("code", "train"), ("other", "train")]) == {"web"}
    # Beside splits, it is documentation.
    (tmp_path / "a" / "code").rename(tmp_path / "a" / "train")
    assert [file.path.name for file in find_inputs([tmp_path / "a"]).files] == ["0.jsonl"]


def test_a_folder_whose_name_is_not_utf8_is_a_fault(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/a/caf\xe9"))
    put(folder / "0.txt", b"a")
    assert [fault.remedy for fault in find_inputs([tmp_path / "a"]).faults] == [
        "rename it, or give --domain-key or --domain-rules"
    ]


def test_records_without_the_fields_are_found_before_they_are_read(tmp_path):
    rows = [{"content": "a", "meta": {"source": "Web"}}] * 3
    file = put(tmp_path / "a.jsonl", lines([*rows, *ROWS]))
    with pytest.raises(ConfigError, match=r"--text-key KEY"):
        read(put(tmp_path / "b.jsonl", lines(rows)))
    with pytest.raises(ConfigError, match=r"'content', 'meta.source'(?s:.*)--domain-key KEY"):
        read(tmp_path / "b.jsonl", "--text-key", "content", "--domain-key", "source")
    with pytest.raises(ConfigError, match=r"an object with fields"):
        read(put(tmp_path / "c.json", b'["a", "b"]'))
    with pytest.raises(ConfigError, match="separate the columns by commas"):
        read(put(tmp_path / "d.csv", b"text;domain\na;Web\n"), "--domain-key", "domain")
    assert len(read(file)[1]) == 3
    assert read(put(tmp_path / "e.json", b'{\n "text": "a"\n}\n'))[1][0].endswith(
        "line 1: not JSON on one line: jq -c . FILE > NEW"
    )


def test_the_files_of_one_split_are_read(tmp_path, capsys):
    for split, text in (("train", "a"), ("validation", "b"), ("test", "c")):
        put(tmp_path / "wiki" / split / "0.jsonl", lines([{"text": text}]))
        put(tmp_path / "flat" / f"web_{split}.jsonl", lines([{"text": text}]))
        put(tmp_path / "deep" / "law" / f"{split}-00000-of-00001.jsonl", lines([{"text": text}]))
    put(tmp_path / "flat" / "code.jsonl", lines([{"text": "d"}]))
    assert read(tmp_path / "wiki") == ([("a", "wiki")], [])
    assert read(tmp_path / "flat") == ([("d", "code"), ("a", "web")], [])
    assert read(tmp_path / "deep") == ([("a", "law")], [])
    assert "holds several splits: reading 1 files of train, not test, valid" in unwrapped(capsys.readouterr().err)
    assert [file.path.parent.name for file in find_inputs([tmp_path / "wiki"], split="valid").files] == ["validation"]
    # Folders named like splits beside others are domains.
    put(tmp_path / "wiki" / "web" / "0.jsonl", lines([{"text": "e"}]))
    assert {name for _, name in read(tmp_path / "wiki")[0]} == {"train", "validation", "test", "web"}


def test_patterns_that_match_nothing_and_unlisted_domains_are_faults(tmp_path):
    put(tmp_path / "web.jsonl", lines([{"text": "a"}]))
    listed = put(tmp_path / "list.json", b'{"format": "megatron-doremi-domain-list/1", "domains": ["law"]}')
    for words, message in (
        ([tmp_path / "*.parquet"], r"\*\.parquet matches nothing"),
        (
            [tmp_path / "web.jsonl", "--domain-from-file", "/nowhere/(.*)"],
            r"does not match 1 of 1 files",
        ),
        ([tmp_path / "web.jsonl", "--domain-list", listed], r"domains web, by files and folders"),
    ):
        with pytest.raises(ConfigError, match=message):
            options(*words)


def test_domains_that_look_wrong_are_reported_before_text_is_read(tmp_path):
    for number in range(51):
        put(tmp_path / "ids" / f"{number:x}x.jsonl", lines([{"text": "a"}]))
        put(tmp_path / "one" / f"web-{number}.jsonl", lines([{"text": "a"}]))

    def warnings(*words):
        inputs = options(*words)
        return domain_warnings(inputs.files, inputs.reader)

    assert "each of the 51 files is a domain of its own" in warnings(tmp_path / "ids")[0]
    assert "a single domain, 'web'" in warnings(tmp_path / "one")[0]
    assert "single domain, 'one'" in warnings(tmp_path / "one", "--domain-from-file", r".*/(\w+)/[^/]*")[0]
    assert warnings(tmp_path / "one", tmp_path / "ids" / "1x.jsonl") == []
    assert warnings(put(tmp_path / "pile.jsonl", RAW)) == []


@pytest.mark.parametrize("form", ["stream", "file"])
def test_arrow_folders_of_hugging_face(tmp_path, form):
    """As `Dataset.save_to_disk` and `DatasetDict.save_to_disk` write them, and damaged ones."""
    schema = pyarrow.schema({"text": pyarrow.string(), "id": pyarrow.int64()})
    new = {"stream": pyarrow.ipc.new_stream, "file": pyarrow.ipc.new_file}[form]
    path = tmp_path / "hf" / "train" / "data-00000-of-00001.arrow"
    for name, text in (("train", "a"), ("test", "b")):
        put(tmp_path / "hf" / name / "dataset_info.json", b'{"features": {}}')
        put(tmp_path / "hf" / name / "state.json", b'{"_data_files": []}')
        with new(str(tmp_path / "hf" / name / "data-00000-of-00001.arrow"), schema) as writer:
            for start in range(0, 2500, 1000):
                ids = range(start, min(2500, start + 1000))
                writer.write_table(pyarrow.table({"text": [f"{text}{i}" for i in ids], "id": list(ids)}, schema))
    put(tmp_path / "hf" / "dataset_dict.json", b'{"splits": ["train", "test"]}')
    put(tmp_path / "hf" / "train" / "cache-12.arrow", b"an intermediate result")
    expected = [(f"a{i}", "hf") for i in range(2500)]
    assert read(tmp_path / "hf") == (expected, [])
    blocks = list(read_blocks(path, ["text"]))
    assert [block.position for block in blocks] == sorted(block.position for block in blocks)
    with pytest.raises(ConfigError, match="column 'id' holds int64"):
        options(tmp_path / "hf", "--text-key", "id")
    data = path.read_bytes()
    for size in (3, len(data) // 2, len(data) - 8):
        put(tmp_path / "cut.arrow", data[:size])
        documents, bad = read(tmp_path / "cut.arrow", "--domain-from-file")
        assert documents == [(text, "cut") for text, _ in expected[: len(documents)]]
        assert len(bad) == 1, size


def test_duplicate_files_are_refused(tmp_path):
    path = put(tmp_path / "a" / "plain.jsonl", RAW)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "linked.jsonl").symlink_to(path)
    (tmp_path / "b" / "hard.jsonl").hardlink_to(path)
    for others in (["a/plain.jsonl"], ["b/linked.jsonl"], ["b/hard.jsonl"], ["a"], ["b"]):
        with pytest.raises(ConfigError, match=r"each file once, or its documents count twice"):
            options(path, *(tmp_path / other for other in others))
    put(tmp_path / "c.jsonl", RAW)
    assert len(options(path, tmp_path / "c.jsonl").files) == 2


def test_all_inputs_that_cannot_be_opened_are_reported_together(tmp_path, monkeypatch):
    good = put(tmp_path / "a.jsonl", RAW)
    opened = Path.open

    def refused(self, *words, **named):
        if self.name == "a.jsonl":
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *words, **named)

    monkeypatch.setattr(Path, "open", refused)
    long, absent = tmp_path / ("x" * 300), tmp_path / "absent.jsonl"
    with pytest.raises(ConfigError) as caught:
        options(good, long, absent, tmp_path / "a\0b")
    values = [fault.value for fault in caught.value.faults]
    assert [re.sub(r".*: ", "", value) for value in values] == [
        "File name too long",
        str(absent),
        values[2].split(": ")[-1],
        "Permission denied",
    ]


def test_damaged_arrow_files_never_end_in_a_traceback(tmp_path):
    """A damaged size asks for more memory than there is; Arrow has no checksums, so a damaged text may be read."""
    rows = pyarrow.Table.from_pylist(ROWS)
    out = io.BytesIO()
    with pyarrow.ipc.new_stream(out, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=10)
    dice = random.Random(5)
    outcomes = set()
    for _ in range(60):
        path = put(tmp_path / "d.arrow", mutated_bytes(out.getvalue(), dice))
        try:
            documents, bad = read(path, "--domain-key", "domain")
        except ConfigError:
            outcomes.add("refused")
        else:
            outcomes.add(bool(bad))
            assert bad or len(documents) == len(ROWS)
    assert outcomes >= {True, False}
