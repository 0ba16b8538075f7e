"""Throughput of tools/preprocess_data.py, from a .zst to indexed datasets on disk, relative to the raw encoders.

    python benchmarks/preprocess.py                           # text of the embedded corpus, repeated
    python benchmarks/preprocess.py --input train.jsonl.zst

For SentencePiece and for byte-level BPE (tiktoken's core, and the tokenizers library that it replaces) one run measures
the encoder alone on texts in memory, in one process and in one per worker, and the tool on the same texts. The goal is
four fifths of the encoder's rate per core. Ids are compared with the encoder's.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import sentencepiece
import zstandard
from tokenizers import Tokenizer

from megatron_doremi.data.indexed_dataset import IndexedDataset
from megatron_doremi.data.manifest import load_manifest
from megatron_doremi.preprocessing.documents import Document, DocumentReader, DomainKey
from megatron_doremi.preprocessing.sources import read_blocks
from megatron_doremi.tokenization.tokenizer import HUGGING_FACE, SENTENCEPIECE, HuggingFaceTokenizer, load_tokenizer

# SentencePiece returns lists of ints by default; the tool requests arrays.
ARRAYS = "  into arrays"
ENCODERS = {"sentencepiece": "t.model", ARRAYS: "t.model", "tiktoken": "t.json", "tokenizers": "t.json"}


def documents(path: Path) -> Iterator[Document]:
    """The documents of a file in The Pile's format."""
    reader = DocumentReader("text", DomainKey("meta.pile_set_name"))
    for block in read_blocks(path, reader.columns):
        for _, document in reader.documents(block):
            assert isinstance(document, Document), document
            yield document


def run_tool(*words: object) -> float:
    """Runs one of the tools; returns its seconds."""
    began = time.perf_counter()
    command = [sys.executable, str(REPOSITORY / "tools" / str(words[0])), *map(str, words[1:])]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return time.perf_counter() - began


def raw_encoder(name: str, file: Path) -> Callable[[str], list[int]]:
    """The raw encoder, without this package's code."""
    if name in ("sentencepiece", ARRAYS):
        encode = sentencepiece.SentencePieceProcessor(model_file=str(file)).encode
        return encode if name != ARRAYS else functools.partial(encode, return_type="numpy")
    if name == "tokenizers":
        tokenizer = Tokenizer.from_file(str(file))
        return lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    loaded = load_tokenizer(HUGGING_FACE, file)
    assert isinstance(loaded, HuggingFaceTokenizer)
    assert loaded.fast is not None
    return loaded.fast.encode_ordinary


def raw_rate(name: str, file: Path, texts: list[str]) -> float:
    """Megabytes of text per second of an encoder in this process, without its loading time."""
    encode = raw_encoder(name, file)
    encode(texts[0])
    began = time.perf_counter()
    for text in texts:
        encode(text)
    return sum(len(text.encode()) for text in texts) / 1e6 / (time.perf_counter() - began)


def raw_rates(name: str, file: Path, texts: list[str], processes: int) -> float:
    """The sum of the rates of several concurrent processes."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return sum(pool.map(raw_rate, [name] * processes, [file] * processes, [texts] * processes))


def prepare(
    folder: Path, corpus: Path | None, megabytes: float, sentencepiece_model: Path | None
) -> tuple[Path, list[str], float]:
    """Writes a .zst of about `megabytes` of text, and tokenizers; returns (path, sample of texts, megabytes)."""
    if corpus is None:
        run_tool("embedded_corpus.py", "--output-dir", folder / "corpus")
        corpus = folder / "corpus" / "train.jsonl"
    selected = [document for document in documents(corpus) if document.domain not in ("noise", "boilerplate")]
    size = sum(document.size for document in selected) / 1e6
    times = max(1, round(megabytes / size))
    once, path = folder / "once.jsonl.zst", folder / "text.jsonl.zst"
    with zstandard.open(once, "wt", encoding="utf-8") as file:
        for document in selected:
            entry = {"text": document.text, "meta": {"pile_set_name": document.domain}}
            file.write(json.dumps(entry) + "\n")
    with path.open("wb") as file:
        for _ in range(times):
            file.write(once.read_bytes())
    texts = [document.text for document in selected[:: max(1, round(size / 100))]]
    if sentencepiece_model is not None:
        shutil.copyfile(sentencepiece_model, folder / "t.model")
    for name in ("t.json",) if sentencepiece_model is not None else ("t.model", "t.json"):
        words: tuple[object, ...] = ("--vocab-size", 16000, "--sample-bytes", 10_000_000, "--output", folder / name)
        run_tool("train_tokenizer.py", "--input", once, *words)
    return path, texts, size * times


def check_ids(output: Path, path: Path, encode: Callable[[str], list[int]], count: int = 500) -> None:
    """Compares the first documents' ids with the encoder's."""
    data = {domain.name: IndexedDataset(domain.train) for domain in load_manifest(output / "domains.json").domains}
    next_document = dict.fromkeys(data, 0)
    for _, document in zip(range(count), documents(path), strict=False):
        ids = data[document.domain].document(next_document[document.domain]).tolist()
        assert ids[:-1] == encode(document.text), "other ids than the encoder's"
        next_document[document.domain] += 1


def main() -> None:
    """Measures the rates and prints them as a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--input", type=Path, help="text in The Pile's format (default: the embedded corpus)")
    parser.add_argument(
        "--megabytes", type=float, default=1000, help="megabytes of text; the input is repeated (default: 1000)"
    )
    parser.add_argument(
        "--sentencepiece-model", type=Path, help="tokenizer model (default: train one of 16,000 pieces)"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="encoder processes (default: one per core)"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path, texts, megabytes = prepare(folder, args.input, args.megabytes, args.sentencepiece_model)
        packed = path.stat().st_size / 1e6
        print(f"{megabytes:.0f} MB of text in {packed:.0f} MB, {args.workers} workers; MB of text a second")
        columns = f"{'alone':>8}{f'{args.workers} alone':>10}{'the tool':>10}{'part':>6}"
        print(f"{'encoder':<14}{columns}{'its start':>11}{'part without':>14}")
        done: dict[str, tuple[float, float]] = {}
        for encoder, model in ENCODERS.items():
            part = texts[::10] if encoder == "tokenizers" else texts
            one = raw_rate(encoder, folder / model, part)
            all_cores = raw_rates(encoder, folder / model, part, args.workers)
            print(f"{encoder:<14}{one:>8.1f}{all_cores:>10.1f}", end="", flush=True)
            if encoder == "tokenizers":  # the tool takes tiktoken for this file
                print()
                continue
            if encoder != ARRAYS:
                done[model] = time_tool(encoder, path, folder, model, args.workers)
            start, seconds = done[model]
            print(f"{megabytes / seconds:>10.1f}{megabytes / seconds / all_cores:>6.2f}", end="")
            print(f"{start:>9.1f} s{megabytes / (seconds - start) / all_cores:>14.2f}", flush=True)


def time_tool(encoder: str, path: Path, folder: Path, model: str, workers: int) -> tuple[float, float]:
    """(seconds for one document, seconds for all) of the tool; compares its ids with the encoder's."""
    kind = SENTENCEPIECE if encoder == "sentencepiece" else HUGGING_FACE
    words = ("--tokenizer-type", kind, "--tokenizer-model", folder / model, "--append-eod")
    tool = ("preprocess_data.py", "--input", path, "--workers", workers, "--split", "train", *words, "--output-dir")
    start = run_tool(*tool, folder / f"start-{encoder}", "--max-documents", 1)
    seconds = run_tool(*tool, folder / encoder)
    check_ids(folder / encoder, path, raw_encoder("tokenizers" if encoder == "tiktoken" else encoder, folder / model))
    return start, seconds


if __name__ == "__main__":
    main()
