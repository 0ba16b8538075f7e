"""tools/preprocess_data.py: ids, order and counts; bad input leaves no output behind.

Run alone: python -m pytest tests/preprocessing/test_preprocess.py
"""

from __future__ import annotations

import gzip
import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import zstandard
from ranks import run_tool, unwrapped

from megatron_doremi.data.document_bytes import document_bytes
from megatron_doremi.data.indexed_dataset import IndexedDataset
from megatron_doremi.data.manifest import load_manifest
from megatron_doremi.preprocessing.documents import DocumentReader, DomainKey
from megatron_doremi.preprocessing.sources import BadLine, Block, parse_block, read_blocks
from megatron_doremi.storage.files import sha256_of
from megatron_doremi.storage.folder_lock import LOCK
from megatron_doremi.tokenization.tokenizer import SentencePieceTokenizer

TOOLS = Path(__file__).resolve().parents[2] / "tools"
DOMAINS = ("Books", "Ubuntu IRC", "Wikipedia (en)")


def run(tool, *words):
    done = run_tool(TOOLS / tool, list(map(str, words)))
    done.stdout, done.stderr = unwrapped(done.stdout), unwrapped(done.stderr)
    return done


def text_of(generator):
    syllables = ["ta", "ri", "mon", "el", "shu", "pra", "ke", "dor", "in", "os"]
    words = ["".join(generator.choices(syllables, k=generator.randint(1, 3))) for _ in range(generator.randint(1, 60))]
    return " ".join(words) + generator.choice(["\n", "", "  ", " \u00fc\u4f60\U0001f600", "</s>", "\r\n"])


def documents_of(seed, count=60):
    generator = random.Random(seed)
    return [(text_of(generator), generator.choice(DOMAINS)) for _ in range(count)]


def jsonl_of(documents):
    lines = [json.dumps({"text": text, "meta": {"pile_set_name": domain}}) for text, domain in documents]
    return ("\n".join(lines) + "\n").encode()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with two different tokenizers."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "sample.jsonl").write_bytes(jsonl_of(documents_of(1, 400)))
    for name, size in (("one", 320), ("two", 330)):
        words = ["--input", folder / "sample.jsonl", "--output", folder / f"{name}.model", "--vocab-size", size]
        done = run("train_tokenizer.py", *words)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def tokenizer(models):
    return SentencePieceTokenizer(models / "one.model")


@pytest.fixture(scope="module")
def preprocess(models):
    """Returns a function that runs the tool, by default with the first tokenizer and one worker."""

    def go(files, output, *words, model="one", workers=1):
        files = files if isinstance(files, list) else [files]
        given = ["--input", *files, "--output-dir", output, "--tokenizer-model", models / f"{model}.model"]
        return run("preprocess_data.py", *given, "--workers", workers, "--split", "train", *words)

    return go


def put(folder, data, name="input.jsonl"):
    path = folder / name
    path.write_bytes(data)
    return path


def contents(folder):
    """Returns the bytes of every file below a folder, including hidden ones, except those of an unfinished run."""
    files = [path for path in folder.rglob("*") if path.is_file() and ".partial-" not in str(path)]
    files = [path for path in files if path.name != LOCK]
    return {path.name: path.read_bytes() for path in files}


def fails(done, *words):
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def check_pairs(folder, documents, tokenizer, end):
    """Checks that the pairs hold the documents of each domain in the order of the input, encoded by `tokenizer`."""
    manifest = load_manifest(folder / "domains.json")
    assert list(manifest.names) == sorted({domain for _, domain in documents})
    for domain in manifest.domains:
        texts = [text for text, name in documents if name == domain.name]
        data = IndexedDataset(domain.train)
        assert data.num_documents == data.num_sequences == len(texts)
        for number, text in enumerate(texts):
            assert data.document(number).tolist() == [*tokenizer.encode(text).tolist(), *end]
            assert tokenizer.decode(data.document(number)[: -len(end) or None]) == text
        assert domain.documents == len(texts)
        assert domain.tokens == data.num_tokens
        assert document_bytes(domain.train).tolist() == [len(text.encode()) for text in texts]
        assert domain.bytes == sum(len(text.encode()) for text in texts)


# --- what is written


def frames_of(data, sizes):
    """Compresses data to frames of the given sizes, which end within lines."""
    compressor = zstandard.ZstdCompressor()
    starts = np.cumsum([0, *sizes])
    parts = [data[start:end] for start, end in zip(starts, [*starts[1:], len(data)], strict=True)]
    return b"".join(compressor.compress(part) for part in parts)


FORMS = {
    "input.jsonl": lambda data: data,
    "input.jsonl.zst": lambda data: zstandard.ZstdCompressor().compress(data),
    "several.jsonl.zst": lambda data: frames_of(data, [100, 0, 1, 5000]),
    "streamed.jsonl.zst": lambda data: zstandard.ZstdCompressor(write_content_size=False).compress(data),
    "input.jsonl.gz": lambda data: gzip.compress(data),
    "several.jsonl.gz": lambda data: gzip.compress(data[:100]) + gzip.compress(data[100:]),
}


def test_ids_order_and_counts_for_files_of_every_form(tmp_path, preprocess, tokenizer):
    """Several files form one input, in the order given, and so do the frames or members of a file."""
    documents, files = [], []
    for seed, (name, form) in enumerate(FORMS.items()):
        part = [*documents_of(20 + seed), ("", "Books")]
        documents += part[:-1]
        files.append(put(tmp_path, form(jsonl_of(part)), name))
    done = preprocess(files, tmp_path / "out", "--append-eod")
    assert done.returncode == 0, done.stderr
    check_pairs(tmp_path / "out", documents, tokenizer, [tokenizer.eod])
    for domain in load_manifest(tmp_path / "out" / "domains.json").domains:
        row = re.search(rf"^{re.escape(domain.name)} +(\S+) +(\S+) +(\S+) ", done.stdout, re.MULTILINE)
        assert row.groups() == (f"{domain.documents:,}", f"{domain.tokens:,}", f"{domain.bytes:,}")
    assert done.stdout.splitlines()[-1] == f"skipped {len(FORMS)} empty texts"


def lines_of(file):
    """Returns the numbers of the lines of a file; for a truncated file the last one is the place of the truncation."""
    return [number for block in read_blocks(file, []) for number, _ in parse_block(block)]


@pytest.mark.parametrize("name", FORMS)
def test_lines_of_each_form(tmp_path, name):
    data = jsonl_of(documents_of(2))
    file = put(tmp_path, FORMS[name](data), name)
    blocks = list(read_blocks(file, []))
    assert b"".join(block.data for block in blocks) == data
    assert lines_of(file) == list(range(1, data.count(b"\n") + 1))
    assert blocks[-1].position == file.stat().st_size
    assert not blocks[-1].broken


def test_workers_do_not_change_a_byte(tmp_path, preprocess):
    """There is enough text for several blocks, so two workers can overtake each other."""
    documents = documents_of(5, 40)
    big = [(text * 500, domain) for text, domain in documents] + documents
    file = put(tmp_path, jsonl_of(big))
    assert len(jsonl_of(big)) > 3 << 20
    for workers in (1, 2):
        done = preprocess(file, tmp_path / str(workers), "--append-eod", workers=workers)
        assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert len(contents(tmp_path / "1")) == 3 * len(DOMAINS) + 2


def test_blank_lines_crlf_and_a_missing_last_newline_are_accepted(tmp_path, preprocess, tokenizer):
    """Without --append-eod nothing is appended."""
    documents = documents_of(6, 10)
    data = b"\n  \n" + jsonl_of(documents).replace(b"\n", b"\r\n\r\n").rstrip()
    assert preprocess(put(tmp_path, data), tmp_path / "out").returncode == 0
    check_pairs(tmp_path / "out", documents, tokenizer, [])


def test_other_keys_are_used(tmp_path, preprocess, tokenizer):
    documents = documents_of(7, 10)
    lines = [json.dumps({"a": {"b": {"content": text}}, "source": domain}) for text, domain in documents]
    file = put(tmp_path, "\n".join(lines).encode())
    done = preprocess(file, tmp_path / "out", "--text-key", "a.b.content", "--domain-key", "source")
    assert done.returncode == 0, done.stderr
    check_pairs(tmp_path / "out", documents, tokenizer, [])


def test_domains_with_the_same_file_name_get_separate_files(tmp_path, preprocess, tokenizer):
    documents = [("ta", "a b"), ("ri", "a/b"), ("mon", "a_b"), ("el", "../a b"), ("ke", "\u4f60")]
    done = preprocess(put(tmp_path, jsonl_of(documents)), tmp_path / "out")
    assert done.returncode == 0, done.stderr
    check_pairs(tmp_path / "out", documents, tokenizer, [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["input.jsonl", "out"]


def test_manifest_identifies_the_tokenizer_beside_it(tmp_path, preprocess, models):
    assert preprocess(put(tmp_path, jsonl_of(documents_of(8))), tmp_path / "out").returncode == 0
    known = load_manifest(tmp_path / "out" / "domains.json").tokenizer
    assert known.sha256 == sha256_of(models / "one.model") == sha256_of(known.file)
    assert known.file.parent == tmp_path / "out"
    assert (known.type, known.vocab_size, known.eod) == ("SentencePieceTokenizer", 320, 1)


def test_valid_split_extends_the_manifest(tmp_path, preprocess, tokenizer):
    """A domain without valid text keeps null; the sizes remain those of the train split."""
    out = tmp_path / "out"
    train = documents_of(9)
    valid = [(text, domain) for text, domain in documents_of(10) if domain != "Books"]
    assert preprocess(put(tmp_path, jsonl_of(train)), out, "--append-eod").returncode == 0
    before = load_manifest(out / "domains.json")
    pairs = contents(out)
    done = preprocess(put(tmp_path, jsonl_of(valid)), out, "--append-eod", "--split", "valid")
    assert done.returncode == 0, done.stderr
    after = load_manifest(out / "domains.json")
    check_pairs(out, train, tokenizer, [tokenizer.eod])
    assert after.fingerprint() == before.fingerprint()
    assert {name: data for name, data in contents(out).items() if name in pairs and name != "domains.json"} == {
        name: data for name, data in pairs.items() if name != "domains.json"
    }
    for domain in after.domains:
        texts = [text for text, name in valid if name == domain.name]
        assert (domain.valid is None) == (domain.name == "Books") == (not texts)
        if domain.valid:
            data = IndexedDataset(domain.valid)
            assert document_bytes(domain.valid).tolist() == [len(text.encode()) for text in texts]
            assert data.document(0).tolist() == [*tokenizer.encode(texts[0]).tolist(), tokenizer.eod]


# --- what is refused


@pytest.fixture(scope="module")
def train_split(tmp_path_factory, preprocess):
    folder = tmp_path_factory.mktemp("train")
    file = put(folder, jsonl_of([("ta ri", "Books"), ("mon el", "Github")]))
    assert preprocess(file, folder / "out").returncode == 0
    return folder / "out"


@pytest.fixture
def made(tmp_path, train_split):
    """An output folder with a train split, and its contents."""
    shutil.copytree(train_split, tmp_path / "out")
    return tmp_path / "out", contents(tmp_path / "out")


def test_valid_split_with_an_unknown_domain_is_refused(tmp_path, preprocess, made):
    out, before = made
    file = put(tmp_path, jsonl_of([("ta", "Books"), ("ri", "Arxiv")]))
    fails(preprocess(file, out, "--split", "valid"), f"{file}, line 2: unknown domain 'Arxiv'")
    assert contents(out) == before


def test_valid_split_with_another_tokenizer_is_refused(tmp_path, preprocess, made):
    out, before = made
    file = put(tmp_path, jsonl_of([("ta", "Books")]))
    fails(preprocess(file, out, "--split", "valid", model="two"), "two.model", "domains.json")
    assert contents(out) == before


def test_valid_split_without_a_train_split_is_refused(tmp_path, preprocess):
    file = put(tmp_path, jsonl_of([("ta", "Books")]))
    fails(preprocess(file, tmp_path / "out", "--split", "valid"), "make the train split first")
    assert contents(tmp_path / "out") == {}


GOOD = b'{"text": "ta ri", "meta": {"pile_set_name": "Books"}}'
BAD_LINES = {
    "missing text": (b'{"meta": {"pile_set_name": "Books"}}', "no key 'text'"),
    "missing domain": (b'{"text": "ta"}', "no key 'meta.pile_set_name'"),
    "half the way to the domain": (b'{"text": "ta", "meta": "Books"}', "no key 'meta.pile_set_name'"),
    "not JSON": (b'{"text": "ta", ', "not JSON"),
    "two objects": (b"{} {}", "not JSON"),
    "a list": (b'["text"]', "no key 'text'"),
    "a number": (b"5", "no key 'text'"),
    "text a number": (b'{"text": 5, "meta": {"pile_set_name": "Books"}}', "'text' is not text"),
    "text null": (b'{"text": null, "meta": {"pile_set_name": "Books"}}', "'text' is null"),
    "domain a list": (b'{"text": "ta", "meta": {"pile_set_name": ["Books"]}}', "'meta.pile_set_name' is not text"),
    "a lone surrogate": (
        b'{"text": "\\ud800", "meta": {"pile_set_name": "Books"}}',
        "'text' contains a lone surrogate",
    ),
    "invalid UTF-8": (b'{"text": "\xff\xfe", "meta": {"pile_set_name": "Books"}}', "not UTF-8"),
    "cut UTF-8": (b'{"text": "\xe4\xbd", "meta": {"pile_set_name": "Books"}}', "not UTF-8"),
    "nested too deep": (b'{"a":' + b"[" * 200_000, "not JSON"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_lines_are_distinguished_from_documents(case):
    line, reason = BAD_LINES[case]
    reader = DocumentReader("text", DomainKey("meta.pile_set_name"))
    ((number, bad),) = reader.documents(Block("file", 7, line, 0))
    assert isinstance(bad, BadLine)
    assert (number, reason in str(bad)) == (7, True)


@pytest.mark.parametrize("cases", [list(BAD_LINES)[:7], list(BAD_LINES)[7:]], ids=["first half", "second half"])
def test_bad_lines_are_reported_and_nothing_is_published(tmp_path, preprocess, cases):
    """Every second line of the file is bad: lines 2, 4, ..."""
    lines = [part for case in cases for part in (GOOD, BAD_LINES[case][0])]
    file = put(tmp_path, b"\n".join(lines))
    named = [f"{file}, line {2 * n}: {BAD_LINES[case][1]}" for n, case in enumerate(cases, 1)]
    fails(preprocess(file, tmp_path / "out"), *named, "7 bad lines", "--on-error skip")
    assert contents(tmp_path / "out") == {}


def test_truncated_files_are_reported_and_nothing_is_published(tmp_path, preprocess):
    """Truncated soon after the start, in the middle, and just before the end."""
    files, named = [], []
    for name in ("input.jsonl.zst", "streamed.jsonl.zst", "input.jsonl.gz"):
        data = FORMS[name](jsonl_of(documents_of(11, 400)))
        for size in (20, len(data) // 2, len(data) - 3):
            files.append(put(tmp_path, data[:size], f"{size}-{name}"))
            number = len(lines_of(files[-1]))
            named.append(f"{files[-1]}, line {number}: the file is truncated here")
    fails(preprocess(files, tmp_path / "out"), *named, "9 bad lines")
    assert contents(tmp_path / "out") == {}


def test_damaged_files_and_files_in_another_format_are_reported(tmp_path, preprocess):
    """Garbage after a valid file, a changed byte in the middle, and a file that is neither text nor zstd."""
    plain = jsonl_of(documents_of(12, 200))
    files, other = [], put(tmp_path, bytes(range(256)) * 20, "other.jsonl.zst")
    for name in ("input.jsonl.zst", "input.jsonl.gz"):
        good = FORMS[name](plain)
        changed = good[: len(good) // 2] + bytes([good[len(good) // 2] ^ 255]) + good[len(good) // 2 + 1 :]
        files.append(put(tmp_path, good + b"garbage of some length", f"garbage-{name}"))
        files.append(put(tmp_path, changed, f"changed-{name}"))
    done = preprocess([*files, other], tmp_path / "out")
    fails(done, *(f"{file}, line " for file in files), f"{other}: the file is neither zstd nor text")
    assert contents(tmp_path / "out") == {}


def test_earlier_output_survives_a_failed_run(tmp_path, preprocess, made):
    out, before = made
    file = put(tmp_path, b"\n".join([GOOD, GOOD, GOOD, b"bad"]))
    fails(preprocess(file, out), "line 4")
    assert contents(out) == before


def test_bad_lines_are_counted_and_the_first_ten_listed(tmp_path, preprocess):
    file = put(tmp_path, b"\n".join([GOOD, GOOD, GOOD, *[b"bad"] * 15]))
    done = preprocess(file, tmp_path / "out")
    fails(done, "15 bad lines", "line 4:", "line 13:", "and 5 more")
    assert "line 14:" not in done.stderr


def test_on_error_skip_continues_and_reports(tmp_path, preprocess, tokenizer):
    documents = documents_of(13, 9)
    lines = jsonl_of(documents).splitlines()
    file = put(tmp_path, b"\n".join([*lines[:4], b"bad", *lines[4:], b'{"text": 1}']))
    done = preprocess(file, tmp_path / "out", "--on-error", "skip")
    assert done.returncode == 0, done.stderr
    assert "skipped 2 bad lines" in done.stdout
    assert f"{file}, line 5: not JSON" in done.stdout
    assert f"{file}, line 11: 'text' is not text" in done.stdout
    check_pairs(tmp_path / "out", documents, tokenizer, [])


def test_on_error_skip_keeps_the_beginning_of_a_truncated_file(tmp_path, preprocess, tokenizer):
    """It reports the truncation and continues with the next file."""
    documents, files = [], []
    for seed, name in enumerate(("input.jsonl.zst", "input.jsonl.gz")):
        part = documents_of(30 + seed, 2000)
        data = FORMS[name](jsonl_of(part))
        files.append(put(tmp_path, data[: len(data) * 9 // 10], name))
        kept = len(lines_of(files[-1])) - 1
        assert kept < len(part)
        documents += part[:kept]
    files.append(put(tmp_path, jsonl_of(documents_of(32, 5)), "after.jsonl"))
    documents += documents_of(32, 5)
    done = preprocess(files, tmp_path / "out", "--on-error", "skip")
    assert done.returncode == 0, done.stderr
    assert "skipped 2 bad lines" in done.stdout
    assert done.stdout.count("the file is truncated here") == 2
    check_pairs(tmp_path / "out", documents, tokenizer, [])


@pytest.mark.parametrize("name", ["input.jsonl.zst", "input.jsonl.gz"])
def test_lines_before_a_truncation_are_read(tmp_path, name):
    """The reported line number is exact."""
    plain = jsonl_of(documents_of(14, 3000))
    data = FORMS[name](plain)
    file = put(tmp_path, data[: len(data) // 2], name)
    blocks, lines = list(read_blocks(file, [])), lines_of(file)
    assert [block.broken for block in blocks] == [False] * (len(blocks) - 1) + [True]
    assert lines == list(range(1, len(lines) + 1))
    assert 500 < len(lines) < 2900
    assert plain.startswith(b"".join(block.data for block in blocks))


@pytest.mark.parametrize("data", [b"", b"\n\n"])
def test_input_without_documents_is_refused(tmp_path, preprocess, data):
    fails(preprocess(put(tmp_path, data), tmp_path / "out"), "no documents")
    assert contents(tmp_path / "out") == {}


def test_all_faults_of_the_flags_are_reported_together(tmp_path, preprocess):
    wrong = [tmp_path / "nowhere.jsonl", put(tmp_path, b"", "data.txt")]
    fails(preprocess(wrong, tmp_path / "out", workers=0), "nowhere.jsonl", "data.txt", "--workers: 0", "3 faults")
    assert contents(tmp_path / "out") == {}


def test_output_below_a_file_is_refused(tmp_path, preprocess):
    file = put(tmp_path, jsonl_of([("ta", "Books")]))
    fails(preprocess(file, file / "below"), "--output-dir", "below")


def test_a_folder_in_the_place_of_an_output_file_is_refused(tmp_path, preprocess):
    out = tmp_path / "out"
    file = put(tmp_path, jsonl_of([("ta", "Books"), ("ri", "Github")]))
    for name in ("Books_train.idx", "domains.json"):
        (out / name / "in the way").mkdir(parents=True)
        fails(preprocess(file, out), name, "a folder")
        assert not [name for name in contents(out) if name.startswith(".") or name.endswith(".tmp")]
        shutil.rmtree(out)


def test_file_that_is_not_a_tokenizer_is_refused(tmp_path, preprocess, models):
    file = put(tmp_path, jsonl_of([("ta", "Books")]))
    fails(preprocess(file, tmp_path / "out", "--tokenizer-model", file), "--tokenizer-model", "input.jsonl")
    fails(preprocess(file, tmp_path / "out", "--tokenizer-type", "Other"), "--tokenizer-type", "Other")


def test_replacing_a_train_split_prints_a_warning(tmp_path, preprocess, made):
    folder, _ = made
    done = preprocess(put(tmp_path, jsonl_of([("ta ri", "Law")] * 4), "second.jsonl"), folder)
    assert done.returncode == 0, done.stderr
    assert f"{folder / 'domains.json'} already contains a train split (Books, Github)" in done.stderr
    assert load_manifest(folder / "domains.json").names == ("Law",)
