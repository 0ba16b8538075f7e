"""Turns The Pile's JSON lines into one indexed pair a domain, and the manifest that names them.

    python tools/preprocess_data.py --input train.jsonl.zst --output-dir data --split train \\
        --tokenizer-model tokenizer.model --append-eod --workers 8
    python tools/preprocess_data.py --input valid.jsonl.zst --output-dir data --split valid ...

The train split starts the manifest, data/domains.json; the valid split adds its pairs to it. Documents keep the
order of the input whatever the number of workers. Nothing appears under a final name before all of it is good.
"""

from __future__ import annotations

import argparse
import errno
import multiprocessing
import re
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from megatron_doremi.data.files import atomic_write_bytes, make_folder
from megatron_doremi.data.indexed_dataset import IndexedDatasetWriter, dtype_for
from megatron_doremi.data.jsonl import (
    BadLine,
    Line,
    bad_lines_error,
    check_inputs,
    parse_document,
    read_lines,
)
from megatron_doremi.data.manifest import Domain, Manifest, TokenizerInfo, load_manifest, save_manifest
from megatron_doremi.data.tokenizer import SENTENCEPIECE, SentencePieceTokenizer, load_tokenizer
from megatron_doremi.errors import ConfigError, Fault, raise_if_any, run_or_exit

# Bytes of text that travel to a worker at once: enough to hide the way there and back.
_BATCH_BYTES = 1 << 20
_NAMED_BAD_LINES = 10
# Characters of a domain's name that its files carry; file systems end at 255.
_SLUG_CHARACTERS = 100


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--input", nargs="+", required=True, type=Path, metavar="FILE", help=".jsonl, .zst or .gz")
    parser.add_argument("--output-dir", required=True, type=Path, metavar="DIR", help="pairs and domains.json")
    parser.add_argument("--split", choices=("train", "valid"), default="train", help="(default: train)")
    parser.add_argument("--text-key", default="text", help="(default: text)")
    parser.add_argument("--domain-key", default="meta.pile_set_name", help="(default: meta.pile_set_name)")
    parser.add_argument("--tokenizer-type", default=SENTENCEPIECE, help=f"(default: {SENTENCEPIECE})")
    parser.add_argument("--tokenizer-model", required=True, type=Path, metavar="FILE")
    parser.add_argument("--append-eod", action="store_true", help="end each document with the end-of-document id")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="encoding processes (default: 2)")
    parser.add_argument("--on-error", choices=("fail", "skip"), default="fail", help="bad lines (default: fail)")
    return parser


@dataclass
class Encoded:
    """What a worker makes of a batch of lines.

    Attributes:
        documents: (domain, ids, bytes of text) in the order of the lines.
        bad: descriptions of lines that hold no document.
        position: bytes of the inputs read when the batch was cut, for progress.
    """

    documents: list[tuple[str, NDArray, int]]
    bad: list[str]
    position: int


class Encoder:
    """What runs in a worker process."""

    def __init__(self, tokenizer: SentencePieceTokenizer, text_key: str, domain_key: str, append_eod: bool):
        self.tokenizer, self.text_key, self.domain_key = tokenizer, text_key, domain_key
        self.dtype = dtype_for(tokenizer.vocab_size)
        self.end = [tokenizer.eod] if append_eod else []

    def encode(self, lines: list[Line], position: int) -> Encoded:
        """Parses and encodes a batch of lines."""
        texts, domains, bad = [], [], []
        for line in lines:
            try:
                if line.data is None:
                    raise BadLine("the file breaks off here")
                text, domain = parse_document(line.data, self.text_key, self.domain_key)
            except BadLine as error:
                bad.append(f"{line.file}, line {line.number}: {error}")
                continue
            texts.append(text)
            domains.append(domain)
        documents = []
        for text, domain, ids in zip(texts, domains, self.tokenizer.encode_batch(texts), strict=True):
            ended = np.concatenate([ids, np.array(self.end, dtype=ids.dtype)]).astype(self.dtype)
            documents.append((domain, ended, len(text.encode("utf-8"))))
        return Encoded(documents, bad, position)


# The one encoder of a worker process: a pool hands each task to a module-level function.
_worker: list[Encoder] = []


def _start_worker(kind: str, model: Path, text_key: str, domain_key: str, append_eod: bool) -> None:
    _worker[:] = [Encoder(load_tokenizer(kind, model), text_key, domain_key, append_eod)]


def _encode(lines: list[Line], position: int) -> Encoded:
    return _worker[0].encode(lines, position)


def batches(paths: list[Path]) -> Iterator[tuple[list[Line], int]]:
    """The lines of all inputs in batches, with the bytes of the inputs read so far."""
    done, size, batch = 0, 0, []
    for path in paths:
        for line in read_lines(path):
            batch.append(line)
            size += len(line.data or b"")
            if size >= _BATCH_BYTES:
                yield batch, done + line.position
                size, batch = 0, []
        done += path.stat().st_size
    if batch:
        yield batch, done


def encode_all(args: argparse.Namespace) -> Iterator[Encoded]:
    """Encoded batches in the order of the input; a few batches a worker are under way at a time."""
    settings = (args.tokenizer_type, args.tokenizer_model, args.text_key, args.domain_key, args.append_eod)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(args.workers, mp_context=context, initializer=_start_worker, initargs=settings)
    with pool:
        under_way: deque[Future[Encoded]] = deque()
        for batch, position in batches(args.input):
            under_way.append(pool.submit(_encode, batch, position))
            if len(under_way) >= 4 * args.workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


@dataclass
class Output:
    """A domain's pair as it is written."""

    writer: IndexedDatasetWriter
    prefix: Path
    documents: int = 0
    bytes: int = 0


@dataclass
class Outputs:
    """The pairs of all domains, and what was wrong with the input.

    Attributes:
        known: prefixes that are settled: held-out pairs are named like the train pairs of their domains.
    """

    folder: Path
    split: str
    dtype: np.dtype
    known: dict[str, Path] = field(default_factory=dict)
    by_name: dict[str, Output] = field(default_factory=dict)
    bad: list[str] = field(default_factory=list)
    bad_total: int = 0

    def add(self, encoded: Encoded) -> None:
        """Appends a batch."""
        self.bad_total += len(encoded.bad)
        self.bad += encoded.bad[: _NAMED_BAD_LINES - len(self.bad)]
        for domain, ids, size in encoded.documents:
            output = self.by_name.get(domain) or self._open(domain)
            output.writer.add_document(ids)
            output.documents += 1
            output.bytes += size

    def _open(self, domain: str) -> Output:
        prefix = self.known.get(domain) or self._new_prefix(domain)
        try:
            writer = IndexedDatasetWriter(prefix, self.dtype)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            value = f"domain number {len(self.by_name) + 1}, {domain[:40]!r}: {error.strerror}"
            rule, remedy = "a key that holds one of a few names", "give the key of the domain, or raise ulimit -n"
            raise ConfigError(Fault("--domain-key", value, rule, remedy)) from error
        self.by_name[domain] = Output(writer, prefix)
        return self.by_name[domain]

    def _new_prefix(self, domain: str) -> Path:
        slug = re.sub(r"[^A-Za-z0-9._-]+", "_", domain)[:_SLUG_CHARACTERS].strip("._") or "domain"
        prefix = self.folder / f"{slug}_{self.split}"
        # Names that differ in case alone are one file on some systems.
        taken = {output.prefix.name.casefold() for output in self.by_name.values()}
        number = 2
        while prefix.name.casefold() in taken:
            prefix = self.folder / f"{slug}_{number}_{self.split}"
            number += 1
        return prefix

    def abort(self) -> None:
        """Removes all that was written."""
        for output in self.by_name.values():
            output.writer.abort()


def manifest_after(args: argparse.Namespace, outputs: Outputs, tokenizer: TokenizerInfo, path: Path) -> Manifest:
    """The manifest with this run's pairs: a new one for the train split, the extended one for the valid split."""
    if args.split == "train":
        domains = [
            Domain(name, output.prefix, None, output.writer.num_tokens, output.documents, output.bytes)
            for name, output in sorted(outputs.by_name.items())
        ]
        return Manifest(tuple(domains), tokenizer, path)
    manifest = load_manifest(path)
    unknown = sorted(set(outputs.by_name) - set(manifest.names))
    if unknown:
        raise ConfigError(
            Fault(
                "--input",
                "domains " + ", ".join(map(repr, unknown)),
                "held-out text of the train split's domains: " + ", ".join(map(repr, manifest.names)),
                "add these domains to the train split, or leave them out",
            )
        )
    domains = [
        replace(domain, valid=outputs.by_name[domain.name].prefix) if domain.name in outputs.by_name else domain
        for domain in manifest.domains
    ]
    return replace(manifest, domains=tuple(domains))


def check(args: argparse.Namespace, tokenizer: SentencePieceTokenizer, path: Path) -> None:
    """Raises a ConfigError with all that is wrong before anything is read."""
    faults = check_inputs(args.input)
    if args.workers < 1:
        faults.append(Fault("--workers", str(args.workers), "at least 1", "give a positive number"))
    if args.split == "valid":
        try:
            known = load_manifest(path).tokenizer
        except ConfigError as error:
            faults += [replace(fault, remedy="make the train split first") for fault in error.faults]
        else:
            if known is None or known.sha256 != tokenizer.sha256:
                faults.append(
                    Fault(
                        "--tokenizer-model",
                        f"{args.tokenizer_model} ({tokenizer.sha256[:12]})",
                        f"the tokenizer of {path} ({known.sha256[:12] if known else 'none'})",
                        "give that one, or make the train split again",
                    )
                )
    raise_if_any(faults)


def main() -> int:
    """Encodes the inputs and publishes pairs and manifest."""
    args = build_parser().parse_args()
    manifest_path = args.output_dir / "domains.json"
    tokenizer = load_tokenizer(args.tokenizer_type, args.tokenizer_model)
    check(args, tokenizer, manifest_path)
    make_folder(args.output_dir, "--output-dir")
    outputs = Outputs(args.output_dir, args.split, dtype_for(tokenizer.vocab_size))
    if args.split == "valid":
        for domain in load_manifest(manifest_path).domains:
            stem = domain.train.name.removesuffix("_train")
            outputs.known[domain.name] = args.output_dir / f"{stem}_valid"
    try:
        size = sum(path.stat().st_size for path in args.input)
        with tqdm(total=size, unit="B", unit_scale=True, desc=f"encoding {args.split}", mininterval=0.5) as bar:
            for encoded in encode_all(args):
                outputs.add(encoded)
                bar.update(encoded.position - bar.n)
        if outputs.bad_total and args.on_error == "fail":
            raise bad_lines_error(outputs.bad, outputs.bad_total)
        if not outputs.by_name:
            raise ConfigError(Fault("--input", "no documents", "text", "give files that hold documents"))
        copy = args.output_dir / f"tokenizer-{tokenizer.sha256[:12]}.model"
        info = TokenizerInfo(tokenizer.type, copy, tokenizer.sha256, tokenizer.vocab_size, tokenizer.eod)
        publish(args.tokenizer_model, copy, outputs, manifest_after(args, outputs, info, manifest_path))
    except BaseException:
        outputs.abort()
        raise
    report(outputs)
    return 0


def publish(model: Path, copy: Path, outputs: Outputs, manifest: Manifest) -> None:
    """Gives everything its final name; the manifest, which names the rest, last."""
    for output in outputs.by_name.values():
        output.writer.prepare()
    atomic_write_bytes(copy, model.read_bytes())
    if outputs.split == "train":
        # If we were stopped half way, an earlier manifest would give the new pairs the old sizes.
        manifest.path.unlink(missing_ok=True)
    for output in outputs.by_name.values():
        output.writer.publish()
    save_manifest(manifest)


def report(outputs: Outputs) -> None:
    """Prints what was written and what was left out."""
    width = max(map(len, chain(outputs.by_name, ["domain"])))
    print(f"{'domain':<{width}} {'documents':>11} {'tokens':>15} {'bytes':>15} {'bytes/token':>12}")
    for name, output in sorted(outputs.by_name.items()):
        tokens = output.writer.num_tokens
        per_token = output.bytes / max(1, tokens)
        print(f"{name:<{width}} {output.documents:>11,} {tokens:>15,} {output.bytes:>15,} {per_token:>12.2f}")
    if outputs.bad_total:
        print(f"left out {outputs.bad_total:,} bad lines, among them: " + "; ".join(outputs.bad))


if __name__ == "__main__":
    run_or_exit(main)
