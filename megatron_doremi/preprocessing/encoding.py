"""Blocks of documents into token ids, by worker processes, in the order of the input."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_doremi.data.indexed_dataset import dtype_for
from megatron_doremi.errors import ConfigError, Fault
from megatron_doremi.preprocessing.documents import Document, DocumentReader, SlowRule, count_timeouts, describe
from megatron_doremi.preprocessing.sources import BadFile, Block, Progress
from megatron_doremi.preprocessing.tokenizer import Tokenizer, load_tokenizer

NAMED_BAD_LINES = 10
# Of blocks that wait for a worker or are with one.
_UNDER_WAY_BYTES = 1 << 28


class WorkerDied(Exception):
    """A worker process ended by itself, most likely because the machine ran out of memory."""


@dataclass(frozen=True)
class Chunk:
    """Documents of one domain and split, in the order of the input.

    Attributes:
        ids: all their tokens, end to end, in the type in which they are stored.
        lengths: [n] int32 tokens of each.
        sizes: [n] int64 bytes of text of each.
        places: [n] int32 how many documents of the block come before each.
    """

    ids: NDArray
    lengths: NDArray[np.int32]
    sizes: NDArray[np.int64]
    places: NDArray[np.int32]

    def before(self, place: int) -> Chunk:
        """The documents with fewer than `place` others before them."""
        count = int(np.searchsorted(self.places, place))
        tokens = int(self.lengths[:count].sum(dtype=np.int64))
        return Chunk(self.ids[:tokens], self.lengths[:count], self.sizes[:count], self.places[:count])


@dataclass(frozen=True)
class EncodedBlock:
    """What a worker makes of a block.

    Attributes:
        chunks: by (domain, split).
        bad: descriptions of the first lines that hold no document.
        bad_total: how many there are, and files that cannot be read further.
        progress: how far the reading was with this block.
        bad_files: descriptions of what is wrong with files, each once.
        empty: texts that are empty, and were left out.
        slow: rules whose expression took too long, once for each time.
        characters: of all texts of the block.
        lost: how many of each character the tokenizer drops or does not know.
    """

    chunks: dict[tuple[str, str], Chunk]
    bad: list[str]
    bad_total: int
    progress: Progress
    bad_files: tuple[str, ...] = ()
    empty: int = 0
    slow: tuple[str, ...] = ()
    characters: int = 0
    lost: Counter[str] = field(default_factory=Counter)

    @property
    def documents(self) -> int:
        """Documents of all domains."""
        return sum(len(chunk.lengths) for chunk in self.chunks.values())

    @property
    def text_bytes(self) -> int:
        """Bytes of their text."""
        return sum(int(chunk.sizes.sum()) for chunk in self.chunks.values())

    def first(self, count: int) -> EncodedBlock:
        """The first `count` documents."""
        cut = {key: chunk.before(count) for key, chunk in self.chunks.items()}
        return replace(self, chunks={key: chunk for key, chunk in cut.items() if len(chunk.lengths)})


@dataclass(frozen=True)
class Encoder:
    """What runs in a worker.

    Attributes:
        append_eod: end each document with the tokenizer's end-of-document id.
    """

    tokenizer: Tokenizer
    reader: DocumentReader
    append_eod: bool

    def encode(self, block: Block, progress: Progress) -> EncodedBlock:
        """Parses and encodes a block."""
        documents: list[Document] = []
        bad: list[str] = []
        bad_files: dict[str, None] = {}
        slow: list[str] = []
        bad_total = empty = 0
        for number, document in self.reader.documents(block):
            if isinstance(document, Document):
                if document.text:
                    documents.append(document)
                else:
                    empty += 1
                continue
            bad_total += 1
            if isinstance(document, SlowRule):
                slow.append(document.rule)
            if isinstance(document, BadFile):
                bad_files[describe(block, number, document)] = None
            elif len(bad) < NAMED_BAD_LINES:
                bad.append(describe(block, number, document))
        texts = [document.text for document in documents]
        ids = self.tokenizer.encode_batch(texts)
        characters, lost = sum(map(len, texts)), self.tokenizer.lost_characters(texts)
        places: dict[tuple[str, str], list[int]] = {}
        for place, document in enumerate(documents):
            places.setdefault((document.domain, document.split), []).append(place)
        chunks = {key: self._chunk(documents, ids, chosen) for key, chosen in places.items()}
        return EncodedBlock(chunks, bad, bad_total, progress, tuple(bad_files), empty, tuple(slow), characters, lost)

    def _chunk(self, documents: list[Document], ids: list[NDArray[np.int32]], places: list[int]) -> Chunk:
        end = [np.array([self.tokenizer.eod], dtype=np.int32)] if self.append_eod else []
        parts = [part for place in places for part in (ids[place], *end)]
        return Chunk(
            np.concatenate(parts).astype(dtype_for(self.tokenizer.vocab_size)),
            np.array([len(ids[place]) + len(end) for place in places], dtype=np.int32),
            np.array([documents[place].size for place in places], dtype=np.int64),
            np.array(places, dtype=np.int32),
        )


@dataclass(frozen=True)
class TokenizerFiles:
    """What a worker needs to load the tokenizer that the main process has settled.

    Attributes:
        arguments: of `load_tokenizer`.
    """

    kind: str
    file: Path
    merges: Path | None = None
    eod: str | None = None
    allow_special: bool = False

    def load(self, fast: bool = True) -> Tokenizer:
        """The tokenizer. Raises ConfigError where it cannot be read."""
        return load_tokenizer(self.kind, self.file, self.merges, self.eod, fast, self.allow_special)


# The one encoder of a worker process: a pool hands each task to a module-level function.
_worker: list[Encoder] = []


def _start_worker(files: TokenizerFiles, fast: bool, reader: DocumentReader, append_eod: bool) -> None:
    # Ctrl-C reaches the whole group; the main process decides what becomes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _worker[:] = [Encoder(files.load(fast), reader, append_eod)]


def _leave_with_parent() -> None:
    """A main process that is killed cannot end its workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode(block: Block, progress: Progress) -> EncodedBlock:
    return _worker[0].encode(block, progress)


def encode_all(
    blocks: Iterator[tuple[Block, Progress]],
    files: TokenizerFiles,
    fast: bool,
    reader: DocumentReader,
    append_eod: bool,
    workers: int,
) -> Generator[EncodedBlock, None, None]:
    """Encoded blocks, in order; a few a worker are under way at a time.

    Raises:
        WorkerDied: the machine killed a worker.
        ConfigError: an expression of the rules takes too long again and again, or a file's columns are wrong.
    """
    context = multiprocessing.get_context("spawn")
    settings = (files, fast, reader, append_eod)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=settings)
    under_way: deque[tuple[Future[EncodedBlock], int]] = deque()
    slow: Counter[str] = Counter()

    def oldest() -> EncodedBlock:
        encoded = under_way.popleft()[0].result()
        count_timeouts(slow, encoded.slow)
        return encoded

    try:
        for block, progress in blocks:
            under_way.append((pool.submit(_encode, block, progress), block.size))
            # Of blocks that are one huge document, fewer.
            while len(under_way) >= 4 * workers or (
                under_way and sum(size for _, size in under_way) > _UNDER_WAY_BYTES
            ):
                yield oldest()
        while under_way:
            yield oldest()
    except BrokenProcessPool as error:
        raise WorkerDied from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def bad_lines_error(bad: list[str], total: int, remedy: str) -> ConfigError:
    """The error of inputs with bad lines.

    Args:
        bad: descriptions of files and of the first lines.
        total: how many there were.
    """
    more = "" if total <= len(bad) else f", and {total - len(bad):,} more"
    value = f"{total:,} bad lines: " + "; ".join(bad) + more
    return ConfigError(Fault("--input", value, "lines that each hold a document", remedy))
