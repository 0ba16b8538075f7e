"""Encodes blocks of documents into token ids in worker processes, in the order of the input."""

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
from megatron_doremi.tokenization.tokenizer import Tokenizer, load_tokenizer

# Bad lines that messages list; the others are only counted.
NAMED_BAD_LINES = 10
# Limit on the blocks that are queued for a worker or being encoded.
_MAX_PENDING_BYTES = 1 << 28


class WorkerDied(Exception):
    """A worker process was killed, most likely because the machine ran out of memory."""


@dataclass(frozen=True)
class Chunk:
    """Documents of one domain and split, in the order of the input.

    Attributes:
        ids: [sum of lengths] the concatenated tokens, in the dtype in which they are stored.
        lengths: [n] int32, tokens of each document.
        sizes: [n] int64, bytes of UTF-8 text of each document.
        positions: [n] int32, ascending: the index of each document among all documents of its block.
    """

    ids: NDArray
    lengths: NDArray[np.int32]
    sizes: NDArray[np.int64]
    positions: NDArray[np.int32]

    def before(self, position: int) -> Chunk:
        """Returns the documents whose index in the block is less than `position`."""
        count = int(np.searchsorted(self.positions, position))
        tokens = int(self.lengths[:count].sum(dtype=np.int64))
        return Chunk(self.ids[:tokens], self.lengths[:count], self.sizes[:count], self.positions[:count])


@dataclass(frozen=True)
class EncodedBlock:
    """A block after encoding.

    Attributes:
        chunks: the encoded documents by (domain, split).
        bad: descriptions of the first bad lines.
        bad_total: number of bad lines, plus files that are unreadable, truncated or damaged.
        progress: the progress of the reader after this block.
        bad_files: descriptions of the faults of files, without duplicates.
        empty: number of skipped empty texts.
        slow: one description per timeout of a domain rule.
        characters: characters in all texts of the block.
        lost: how often each character occurs that the tokenizer drops or does not know.
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
        """Number of documents, over all domains."""
        return sum(len(chunk.lengths) for chunk in self.chunks.values())

    @property
    def text_bytes(self) -> int:
        """Bytes of UTF-8 text, over all domains."""
        return sum(int(chunk.sizes.sum()) for chunk in self.chunks.values())

    def first(self, count: int) -> EncodedBlock:
        """Returns the block with only its first `count` documents."""
        kept = {key: chunk.before(count) for key, chunk in self.chunks.items()}
        return replace(self, chunks={key: chunk for key, chunk in kept.items() if len(chunk.lengths)})


@dataclass(frozen=True)
class Encoder:
    """Parses and encodes blocks; each worker has one.

    Attributes:
        append_eod: append the tokenizer's end-of-document id to each document.
    """

    tokenizer: Tokenizer
    reader: DocumentReader
    append_eod: bool

    def encode(self, block: Block, progress: Progress) -> EncodedBlock:
        """Returns the encoded documents and the faults of a block."""
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
        positions: dict[tuple[str, str], list[int]] = {}
        for position, document in enumerate(documents):
            positions.setdefault((document.domain, document.split), []).append(position)
        chunks = {key: self._chunk(documents, ids, in_chunk) for key, in_chunk in positions.items()}
        return EncodedBlock(chunks, bad, bad_total, progress, tuple(bad_files), empty, tuple(slow), characters, lost)

    def _chunk(self, documents: list[Document], ids: list[NDArray[np.int32]], positions: list[int]) -> Chunk:
        end = [np.array([self.tokenizer.eod], dtype=np.int32)] if self.append_eod else []
        parts = [part for position in positions for part in (ids[position], *end)]
        return Chunk(
            np.concatenate(parts).astype(dtype_for(self.tokenizer.vocab_size)),
            np.array([len(ids[position]) + len(end) for position in positions], dtype=np.int32),
            np.array([documents[position].size for position in positions], dtype=np.int64),
            np.array(positions, dtype=np.int32),
        )


@dataclass(frozen=True)
class TokenizerFiles:
    """The arguments of `load_tokenizer`: every worker loads the tokenizer for itself."""

    kind: str
    file: Path
    merges: Path | None = None
    eod: str | None = None
    allow_special: bool = False

    def load(self, fast: bool = True) -> Tokenizer:
        """Loads the tokenizer. Raises ConfigError if it cannot be read."""
        return load_tokenizer(self.kind, self.file, self.merges, self.eod, fast, self.allow_special)


# The encoder of this worker process. It is global because a process pool calls module-level functions.
_worker: list[Encoder] = []


def _start_worker(files: TokenizerFiles, fast: bool, reader: DocumentReader, append_eod: bool) -> None:
    # Ctrl-C signals the whole process group; only the main process handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _worker[:] = [Encoder(files.load(fast), reader, append_eod)]


def _exit_with_parent() -> None:
    """Ends this worker when the main process dies: a main process that is killed cannot do it."""
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
    """Yields the encoded blocks in order. Up to four blocks per worker are pending at a time, fewer if they are large.

    Args:
        fast: let tiktoken's core encode if possible.

    Raises:
        WorkerDied: a worker was killed.
        ConfigError: the regular expression of a rule timed out too often, or a file has the wrong columns.
    """
    context = multiprocessing.get_context("spawn")
    settings = (files, fast, reader, append_eod)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=settings)
    pending: deque[tuple[Future[EncodedBlock], int]] = deque()
    timeouts: Counter[str] = Counter()

    def oldest() -> EncodedBlock:
        encoded = pending.popleft()[0].result()
        count_timeouts(timeouts, encoded.slow)
        return encoded

    try:
        for block, progress in blocks:
            pending.append((pool.submit(_encode, block, progress), block.size))
            while len(pending) >= 4 * workers or (pending and sum(size for _, size in pending) > _MAX_PENDING_BYTES):
                yield oldest()
        while pending:
            yield oldest()
    except BrokenProcessPool as error:
        raise WorkerDied from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def bad_lines_error(bad: list[str], total: int, remedy: str) -> ConfigError:
    """Returns the error for inputs with bad lines. For the arguments see `describe_bad_lines`."""
    return ConfigError(Fault("--input", describe_bad_lines(bad, total), "a document on each line", remedy))


def describe_bad_lines(bad: list[str], total: int) -> str:
    """Describes bad lines in a message.

    Args:
        bad: descriptions of bad files and of the first bad lines.
        total: number of bad lines and files.
    """
    more = "" if total <= len(bad) else f", and {total - len(bad):,} more"
    return f"{total:,} bad line{'' if total == 1 else 's'}: " + "; ".join(bad) + more
