"""Array jobs, interruptions and limits: however the work is split, the output equals that of a single run.

Run alone: python -m pytest tests/preprocessing/test_shards.py
"""

from __future__ import annotations

import csv
import fcntl
import functools
import gzip
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import unwrapped
from test_preprocess import DOMAINS, TOOLS, contents, documents_of, fails, jsonl_of, put, run

from megatron_doremi.data.indexed_dataset import IndexedDataset
from megatron_doremi.data.manifest import load_manifest
from megatron_doremi.preprocessing import decompression, parquet_rows, record_blocks
from megatron_doremi.preprocessing.documents import share_of
from megatron_doremi.preprocessing.sources import Shard, Text, parse_block, read_blocks, read_shard
from megatron_doremi.storage.folder_lock import LOCK
from megatron_doremi.storage.formats import sealed
from megatron_doremi.tokenization.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Inputs of several megabytes in three forms, one of them empty, and a tokenizer."""
    folder = tmp_path_factory.mktemp("shards")
    for number, (name, form) in enumerate(
        {
            "a.jsonl.zst": lambda data: zstandard.ZstdCompressor().compress(data),
            "b.jsonl": lambda data: data,
            "c.jsonl": lambda data: b"",
            "d.jsonl.gz": lambda data: gzip.compress(data, 1),
        }.items()
    ):
        documents = [(text * 40 + str(place), domain) for place, (text, domain) in enumerate(documents_of(number, 600))]
        put(folder, form(jsonl_of(documents)), name)
    words = ["--input", folder / "b.jsonl", "--sample-bytes", 100000, "--output", folder / "t.model"]
    done = run("train_tokenizer.py", *words, "--vocab-size", 400)
    assert done.returncode == 0, done.stderr
    return folder


def command(folder, output, *words):
    inputs = [folder / name for name in ("a.jsonl.zst", "b.jsonl", "c.jsonl", "d.jsonl.gz")]
    tokenizer = ["--tokenizer-model", folder / "t.model", "--append-eod"]
    return ["--input", *inputs, "--output-dir", output, *tokenizer, "--split", "train", "--workers", 1, *words]


def preprocess(folder, output, *words):
    done = run("preprocess_data.py", *command(folder, output, *words))
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def single_run(folder):
    """The files that a single run writes."""
    preprocess(folder, folder / "single_run", "--workers", 2)
    return contents(folder / "single_run")


# --- splitting inputs into shards, without processes


SMALL = [
    (record_blocks, "BLOCK_BYTES", 1500),
    (parquet_rows, "BLOCK_BYTES", 1500),
    (decompression, "COMPRESSED_BYTES", 64),
    (decompression, "_PLAIN_BYTES", 700),
    (decompression, "_SNIFFED_BYTES", 100),
]


def put_as(folder, place, kind, texts, packed):
    """Writes the texts to a file in one of the formats."""
    if kind == "parquet":
        path = folder / f"{place}.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(texts, pyarrow.string())}), path)
        return path
    rows = io.StringIO()
    csv.writer(rows).writerows([("text", "n"), *zip(texts, range(len(texts)), strict=True)])
    plain = {
        "jsonl": "".join(json.dumps({"text": text}) + "\n" for text in texts),
        "json": json.dumps([{"text": text} for text in texts], indent=1),
        "csv": rows.getvalue(),
        "txt": "".join(texts),
    }[kind].encode()
    name = f"{place}.{kind}.zst" if packed else f"{place}.{kind}"
    return put(folder, zstandard.ZstdCompressor().compress(plain) if packed else plain, name)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=5), st.integers(1, 9), st.integers(0, 2**32), st.data())
@settings(max_examples=40, deadline=None)
def test_shards_of_any_files_partition_their_blocks(tmp_path_factory, counts, number, seed, data):
    """A shard can also resume after any of its blocks."""
    folder, generator, paths, texts = tmp_path_factory.mktemp("cut"), random.Random(seed), [], []
    for place, count in enumerate(counts):
        file_texts = [
            f'"{generator.choice(["x", ",", chr(10), chr(92), "[{"]) * generator.randint(1, 99)}' for _ in range(count)
        ]
        kind = generator.choice(["jsonl", "json", "csv", "parquet", "txt"])
        file_texts = file_texts[:1] if kind == "txt" else file_texts
        paths.append(put_as(folder, place, kind, file_texts, generator.random() < 0.5))
        texts += file_texts
    with pytest.MonkeyPatch.context() as patch:
        for module, name, size in SMALL:
            patch.setattr(module, name, size)
        all_blocks = [(block.file, block.first) for path in paths for block in read_blocks(path, ["text"])]
        shards = [list(read_shard(paths, ["text"], Shard(index, number))) for index in range(number)]
        assert [(block.file, block.first) for shard in shards for block, _ in shard] == all_blocks
        read = [record for shard in shards for block, _ in shard for _, record in parse_block(block)]
        assert [record.text if isinstance(record, Text) else record["text"] for record in read] == texts
        chosen = data.draw(st.integers(0, number - 1))
        skip = data.draw(st.integers(0, len(shards[chosen])))
        assert list(read_shard(paths, ["text"], Shard(chosen, number), skip)) == shards[chosen][skip:]
        for shard in shards:
            assert [progress.blocks for _, progress in shard] == list(range(1, len(shard) + 1))


# --- array jobs


@pytest.mark.parametrize("number", [2, 4])
def test_merged_shards_equal_the_output_of_one_run(folder, single_run, tmp_path, number):
    for shard in reversed(range(number)):
        preprocess(folder, tmp_path / "out", "--shard", shard, "--num-shards", number)
    assert not (tmp_path / "out" / "domains.json").exists()
    done = run("merge_datasets.py", "--output-dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    shards = {path: path.read_bytes() for path in (tmp_path / "out" / "shards").glob("*/*")}
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.*")} == single_run
    # Running a task again does nothing; a valid split is added in the same way.
    again = preprocess(folder, tmp_path / "out", "--shard", 0, "--num-shards", number, "--resume")
    assert "already complete" in again.stdout
    assert {path: path.read_bytes() for path in (tmp_path / "out" / "shards").glob("*/*")} == shards
    for shard in range(2):
        preprocess(folder, tmp_path / "out", "--split", "valid", "--shard", shard, "--num-shards", 2)
    assert run("merge_datasets.py", "--output-dir", tmp_path / "out", "--split", "valid").returncode == 0
    for domain in load_manifest(tmp_path / "out" / "domains.json").domains:
        assert domain.valid.with_suffix(".bin").read_bytes() == domain.train.with_suffix(".bin").read_bytes()


def test_the_batch_scripts_give_the_same_output(folder, single_run, tmp_path):
    """Runs the scripts as SLURM does: copies in another folder, with the variables of the job."""
    root = TOOLS.parent
    for name in ("preprocess", "merge"):
        shutil.copy(root / "examples" / "slurm" / f"{name}.sbatch", tmp_path / f"slurm_{name}")
    inputs = [str(word) for word in command(folder, "unused")[1:5]]
    job = os.environ | {"SLURM_SUBMIT_DIR": str(root), "DATA": str(tmp_path / "out"), "PYTHON": sys.executable}
    job |= {"TOKENIZER": str(folder / "t.model"), "SLURM_CPUS_PER_TASK": "1", "SLURM_ARRAY_TASK_COUNT": "2"}
    for task in ("0", "1", "1"):
        words = ["bash", tmp_path / "slurm_preprocess", "train", *inputs]
        subprocess.run(words, env=job | {"SLURM_ARRAY_TASK_ID": task}, check=True, capture_output=True, timeout=120)
    subprocess.run(["bash", tmp_path / "slurm_merge", "train"], env=job, check=True, capture_output=True, timeout=120)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.*")} == single_run


@pytest.fixture(scope="module")
def three(folder):
    """An output folder with three shards."""
    for shard in range(3):
        preprocess(folder, folder / "three", "--shard", shard, "--num-shards", 3)
    return folder / "three"


def test_faults_of_shards_are_reported(folder, three, tmp_path):
    out = tmp_path / "out"
    shards = out / "shards"
    fails(run("merge_datasets.py", "--output-dir", out), "no shards of the train split")
    shutil.copytree(three, out)
    shutil.rmtree(shards / "train-00001-of-00003")
    fails(run("merge_datasets.py", "--output-dir", out), "no shard 1", "all of 0 to 2")
    preprocess(folder, out, "--shard", 1, "--num-shards", 4)
    fails(run("merge_datasets.py", "--output-dir", out), "shards of 3, 4 tasks")
    shutil.rmtree(shards / "train-00001-of-00004")
    preprocess(folder, out, "--shard", 1, "--num-shards", 3, "--valid-fraction", 0.1)
    fails(run("merge_datasets.py", "--output-dir", out), "other inputs or settings", "train-00001-of-00003")
    shutil.rmtree(shards / "train-00001-of-00003")
    preprocess(folder, out, "--shard", 1, "--num-shards", 3)
    (shards / "train-00002-of-00003" / "shard.json").unlink()
    fails(run("merge_datasets.py", "--output-dir", out), "train-00002-of-00003")
    assert not list(out.glob("*.bin"))
    assert not (out / "domains.json").exists()


def test_a_damaged_shard_is_not_merged(three, tmp_path):
    shutil.copytree(three, tmp_path / "out")
    (pair, *_) = sorted((tmp_path / "out" / "shards" / "train-00001-of-00003").glob("*.bin"))
    pair.write_bytes(pair.read_bytes()[:-2])
    fails(run("merge_datasets.py", "--output-dir", tmp_path / "out"), pair.name)
    assert not list((tmp_path / "out").glob("*.bin"))


def test_a_shard_with_another_tokenizer_is_reported(folder, three, tmp_path):
    shutil.copytree(three, tmp_path / "out")
    words = ["--input", folder / "b.jsonl", "--sample-bytes", 100000, "--output", tmp_path / "t.model"]
    assert run("train_tokenizer.py", *words, "--vocab-size", 410).returncode == 0
    inputs = command(folder, tmp_path / "out", "--shard", "0", "--num-shards", "3")
    inputs[inputs.index("--tokenizer-model") + 1] = tmp_path / "t.model"
    assert run("preprocess_data.py", *inputs).returncode == 0
    fails(run("merge_datasets.py", "--output-dir", tmp_path / "out"), "another tokenizer")


# --- interruptions


def stopped(folder, output, how, *words):
    """Starts the tool and stops it soon after its first journal. Returns its exit code and output."""
    started = [sys.executable, TOOLS / "preprocess_data.py", *command(folder, output, "--journal-seconds", 0, *words)]
    # If this test runs as a background job of a shell, its children inherit SIGINT as ignored.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    output_of = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "preexec_fn": heed}
    with subprocess.Popen([str(word) for word in started], **output_of) as process:
        end = time.monotonic() + 60
        while not list(output.glob(".partial-*/journal.json")) and time.monotonic() < end and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(how)
        output_text = process.communicate(timeout=60)[0].decode()
    return process.returncode, output_text


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_resumes_to_the_same_output(folder, single_run, tmp_path, how):
    for attempt in range(5):  # on a busy machine a run may be near its end before the test sees its journal
        out = tmp_path / f"out{attempt}"
        code, output = stopped(folder, out, how)
        if contents(out) == {}:
            break
    assert code == (-how if how == signal.SIGKILL else 130), output
    assert how == signal.SIGKILL or "--resume" in output
    assert contents(out) == {}
    code, _ = stopped(folder, out, how, "--resume")
    if code:  # the second run may finish before it can be stopped
        done = preprocess(folder, out, "--resume")
        assert "resuming after" in done.stdout
        assert "resuming after 0 documents" not in done.stdout
    assert contents(out) == single_run
    assert not list(out.glob(".*"))


def test_an_interrupted_run_can_start_over(folder, single_run, tmp_path):
    assert stopped(folder, tmp_path / "out", signal.SIGKILL)[0] == -signal.SIGKILL
    preprocess(folder, tmp_path / "out")
    assert contents(tmp_path / "out") == single_run
    assert not list((tmp_path / "out").glob(".*"))


def test_a_run_neither_resumes_with_other_settings_nor_beside_another(folder, tmp_path):
    out = tmp_path / "out"
    stopped(folder, out, signal.SIGKILL)
    fails(run("preprocess_data.py", *command(folder, out, "--resume", "--max-documents", 9)), "another --max-documents")
    # A journal counts blocks, whose size may differ in another version of the program.
    journal = out / ".partial-train" / "journal.json"
    kept = journal.read_text()
    content = json.loads(kept)
    del content["sha256"]
    content["settings"]["size of blocks"] += 1
    journal.write_text(json.dumps(sealed(content)))
    fails(run("preprocess_data.py", *command(folder, out, "--resume")), "another size of blocks")
    journal.write_text(kept)
    with (out / LOCK).open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fails(run("preprocess_data.py", *command(folder, out)), "another run is writing")
    preprocess(folder, out, "--resume")


def test_bad_lines_are_skipped_without_encoding_again(folder, tmp_path):
    file = put(tmp_path, (folder / "b.jsonl").read_bytes() + b"bad\n")
    words = ["--input", file, *command(folder, tmp_path / "out")[5:]]
    fails(run("preprocess_data.py", *words), "1 bad line:", "--on-error skip --resume")
    assert contents(tmp_path / "out") == {}
    done = run("preprocess_data.py", *words, "--resume", "--on-error", "skip")
    assert done.returncode == 0, done.stderr
    assert "resuming after 600 documents" in done.stdout
    assert f"skipped 1 bad line: {file}, line 601: not JSON" in done.stdout


def test_a_full_disk_is_reported_and_the_run_resumes_later(folder, single_run, tmp_path):
    """The fifth block raises the error of a full disk."""
    out = tmp_path / "out"
    tool = [sys.executable, str(TOOLS / "preprocess_data.py"), *map(str, command(folder, out, "--journal-seconds", 0))]
    code = (
        "import errno, runpy, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, sys.argv.pop(0))\n"
        "from megatron_doremi.preprocessing.outputs import Outputs\n"
        "add, calls = Outputs.add, []\n"
        "def full(self, encoded):\n"
        "    calls.append(1)\n"
        "    if len(calls) > 4: raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "    add(self, encoded)\n"
        "Outputs.add = full\n"
        "if __name__ == '__main__': runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    (tmp_path / "full.py").write_text(code)
    done = subprocess.run(
        [sys.executable, tmp_path / "full.py", str(TOOLS.parent), *tool[1:]],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "No space left on device" in unwrapped(done.stderr)
    assert "--resume" in done.stderr
    assert "Traceback" not in done.stderr
    assert contents(out) == {}
    assert "resuming after" in preprocess(folder, out, "--resume").stdout
    assert contents(out) == single_run


# --- limits and splits


@pytest.mark.parametrize("count", [1, 500, 1700])
def test_max_documents_takes_the_first_documents_of_the_input(folder, tmp_path, count):
    preprocess(folder, tmp_path / "out", "--max-documents", count)
    manifest = load_manifest(tmp_path / "out" / "domains.json")
    order = [
        (text * 40 + str(place), domain)
        for number in (0, 1, 3)
        for place, (text, domain) in enumerate(documents_of(number, 600))
    ][:count]
    tokenizer = load_tokenizer("SentencePieceTokenizer", folder / "t.model")
    assert sum(domain.documents for domain in manifest.domains) == count
    for domain in manifest.domains:
        texts = [text for text, name in order if name == domain.name]
        data = IndexedDataset(domain.train)
        assert [tokenizer.decode(data.document(n)[:-1]) for n in range(data.num_documents)] == texts
        assert domain.bytes == sum(len(text.encode()) for text in texts)


def test_one_run_writes_both_splits(folder, tmp_path):
    listed = ["Wikipedia (en)", "Books", "never seen", "Ubuntu IRC"]
    (tmp_path / "list.json").write_text(json.dumps({"format": "megatron-doremi-domain-list/1", "domains": listed}))
    preprocess(folder, tmp_path / "out", "--valid-fraction", 0.2, "--domain-list", tmp_path / "list.json")
    manifest = load_manifest(tmp_path / "out" / "domains.json")
    assert manifest.names == tuple(name for name in listed if name in DOMAINS)
    tokenizer = load_tokenizer(manifest.tokenizer.type, manifest.tokenizer.file, eod=manifest.tokenizer.eod)
    assert tokenizer.sha256 == manifest.tokenizer.sha256
    for domain in manifest.domains:
        for prefix, kept in ((domain.train, lambda share: share >= 0.2), (domain.valid, lambda share: share < 0.2)):
            data = IndexedDataset(prefix)
            assert data.num_documents > 50
            for number in range(data.num_documents):
                assert kept(share_of(tokenizer.decode(data.document(number)[:-1]).encode()))


def test_conflicting_flags_are_refused(folder, tmp_path):
    wrong = ["--shard", 3, "--num-shards", 2, "--max-documents", 0, "--valid-fraction", 1.5, "--split", "valid"]
    done = run(
        "preprocess_data.py", *command(folder, tmp_path / "out", *wrong, "--domain-key", "a", "--domain-from-file")
    )
    fails(
        done,
        "--shard: 3",
        "--max-documents: 0",
        "--valid-fraction: 1.5",
        "--domain-key, --domain-from-file",
        "one of them",
    )
    assert not (tmp_path / "out").exists()
