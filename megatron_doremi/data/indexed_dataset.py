"""Megatron-LM's indexed datasets, byte for byte: token ids in PREFIX.bin, their index in PREFIX.idx.

PREFIX.idx, little-endian: magic "MMIDIDX\\0\\0", uint64 version 1, uint8 dtype code, uint64 number of sequences n,
uint64 number of document bounds m, n int32 sequence lengths in tokens, n int64 sequence offsets in bytes, m int64
document bounds: the index of each document's first sequence, and n. PREFIX.bin is the sequences, concatenated, so that
a dataset is also one stream of tokens.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_doremi.data.document_spans import DocumentSpans, document_spans
from megatron_doremi.errors import ConfigError, Fault
from megatron_doremi.storage.files import open_at, sync_and_close, temporary_beside

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_RISING = "rising bounds from 0 to the number of sequences"
# An index of at most this many sequences is checked in full when it is opened; it is read in parts.
_CHECKED_ON_OPENING = 1 << 18
_PART = 1 << 16
_BYTES_AT_ONCE = 1 << 24
# Megatron-LM's dtype codes; 6 and 7 are floats, which cannot hold token ids.
_DTYPES: dict[int, np.dtype] = {
    code: np.dtype(name) for code, name in {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}.items()
}


def dtype_for(vocab_size: int) -> np.dtype:
    """The dtype in which Megatron-LM stores the ids of a vocabulary."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def paths_of(prefix: Path) -> tuple[Path, Path]:
    """PREFIX.bin and PREFIX.idx."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


class IndexedDataset:
    """A dataset opened for reading. Reads ids on demand; threads may share it.

    Attributes:
        prefix: path without .bin or .idx.
        dtype: dtype of the stored ids.
        sequence_lengths: [n] int32, tokens of each sequence.
        pointers: [n] int64, byte offset of each sequence.
        document_indices: [m] int64, index of each document's first sequence; the last is n.
        num_tokens: tokens in the stream.
    """

    def __init__(self, prefix: Path, vocab_size: int = 0):
        """Opens and checks a pair. Raises ConfigError if it is missing, damaged or in another format.

        Of an index with more than 262,144 sequences only the ends are checked, so that a run on any amount of data
        starts at once. Inconsistencies between them are found by `check_index`, or when the entries are used.

        Args:
            vocab_size: ids have to be smaller; 0 accepts any. With a sharded vocabulary, an id outside of it would not
                fail by itself: its embedding would be zero and its loss plausible.
        """
        self.prefix, self.vocab_size, self.first_document = prefix, vocab_size, 0
        self._bin, self._idx = paths_of(prefix)
        try:
            self._open()
        except OSError as error:
            reason = str(error.strerror or error)
            raise self._error(Path(error.filename or self._idx), reason, "a readable pair") from error

    def _open(self) -> None:
        for path in (self._bin, self._idx):
            if not path.is_file():
                remedy = "move the pair with its manifest, whose paths are relative to its folder"
                raise self._error(path, "no such file", "a .bin and .idx pair", remedy)
        self._read_index()
        expected, actual = self.num_tokens * self.dtype.itemsize, self._bin.stat().st_size
        if actual != expected:
            raise self._error(self._bin, f"{actual:,} bytes", f"the {expected:,} bytes listed in {self._idx.name}")
        # Read, not memory-mapped: a window costs one request to the file system instead of page faults with read-ahead,
        # and truncating the file during a run raises an error instead of SIGBUS.
        self._file = self._bin.open("rb", buffering=0)

    def _error(self, path: Path, value: str, rule: str, remedy: str = "copy the pair again") -> ConfigError:
        return ConfigError(Fault(str(path), value, rule, f"{remedy}, or make it with tools/preprocess_data.py"))

    def _read_index(self) -> None:
        size = self._idx.stat().st_size
        with self._idx.open("rb") as file:
            head = file.read(_HEADER.size)
        if len(head) < _HEADER.size or head[:9] != MAGIC:
            raise self._error(self._idx, "not an index", "a file that starts with MMIDIDX, as Megatron-LM writes it")
        _, version, code, sequences, bounds = _HEADER.unpack(head)
        if version != VERSION:
            raise self._error(self._idx, f"version {version}", f"version {VERSION}")
        if code not in _DTYPES:
            raise self._error(self._idx, f"type code {code}", f"integers, one of the codes {sorted(_DTYPES)}")
        expected = _HEADER.size + 12 * sequences + 8 * bounds
        if size != expected:
            raise self._error(self._idx, f"{size:,} bytes", f"the {expected:,} bytes of its {sequences:,} sequences")
        self.dtype = _DTYPES[code]
        body = np.memmap(self._idx, mode="r", offset=0, dtype=np.uint8)[_HEADER.size :]
        self.sequence_lengths: NDArray[np.int32] = body[: 4 * sequences].view("<i4")
        self.pointers: NDArray[np.int64] = body[4 * sequences : 12 * sequences].view("<i8")
        self.document_indices: NDArray[np.int64] = body[12 * sequences :].view("<i8")
        if not bounds or self.document_indices[0] != 0 or self.document_indices[-1] != sequences:
            raise self._error(self._idx, "documents out of order", _RISING)
        end = int(self.pointers[-1]) + int(self.sequence_lengths[-1]) * self.dtype.itemsize if sequences else 0
        self.num_tokens = end // self.dtype.itemsize
        # Longer indexes are read on demand, and in full by tools/inspect_data.py, so that a run starts at once.
        if sequences <= _CHECKED_ON_OPENING:
            self.check_index()
        if end < 0 or end % self.dtype.itemsize:
            raise self._error(self._idx, f"an end at byte {end:,}", "contiguous sequences")

    def check_index(self) -> None:
        """Checks the full index, part by part. Raises ConfigError if sequences or documents are inconsistent."""
        tokens = bound = 0
        with self._idx.open("rb") as file:
            for first, count in _parts(self.num_sequences):
                lengths = _read(file, 4 * first, "<i4", count)
                pointers = _read(file, 4 * self.num_sequences + 8 * first, "<i8", count)
                if lengths.min() < 0:
                    raise self._error(self._idx, f"a sequence of {lengths.min()} tokens", "non-negative lengths")
                ends = tokens + np.cumsum(lengths, dtype=np.int64)
                if not np.array_equal(pointers, (ends - lengths) * self.dtype.itemsize):
                    raise self._error(self._idx, "offsets with gaps or overlaps", "contiguous sequences")
                tokens = int(ends[-1])
            for first, count in _parts(len(self.document_indices)):
                documents = _read(file, 12 * self.num_sequences + 8 * first, "<i8", count)
                if documents[0] < bound or (np.diff(documents) < 0).any():
                    raise self._error(self._idx, "documents out of order", _RISING)
                bound = int(documents[-1])

    @property
    def num_sequences(self) -> int:
        return len(self.sequence_lengths)

    @property
    def num_documents(self) -> int:
        return len(self.document_indices) - 1

    def tokens(self, start: int, count: int) -> NDArray[np.int64]:
        """[count] tokens of the stream, starting at token `start`, int64. Raises ConfigError for an invalid id."""
        assert 0 <= start <= start + count <= self.num_tokens, (self.prefix, start, count, self.num_tokens)
        size = self.dtype.itemsize
        data = b"".join(self.read_bytes(start * size, count * size))
        ids = np.frombuffer(data, self.dtype).astype(np.int64)
        if self.vocab_size and count and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            place = start + int(np.argmax((ids < 0) | (ids >= self.vocab_size)))
            value = f"id {ids[place - start]} at token {place:,}"
            rule, remedy = f"ids below the vocabulary size, {self.vocab_size:,}", "give the --vocab-size of these ids"
            raise self._error(self._bin, value, rule, remedy)
        return ids

    def read_bytes(self, start: int, count: int) -> Iterator[bytes]:
        """`count` bytes of the ids, starting at byte `start`, in parts. Raises ConfigError if the file is shorter."""
        while count:
            data = os.pread(self._file.fileno(), min(count, _BYTES_AT_ONCE), start)
            if not data:
                raise self._error(self._bin, f"ends at byte {start:,}", "the size that it had when it was opened")
            yield data
            start, count = start + len(data), count - len(data)

    def document(self, number: int) -> NDArray[np.int64]:
        """The tokens of a document, its sequences concatenated, int64."""
        first, last = (int(bound) for bound in self.document_indices[number : number + 2])
        if not 0 <= first <= last <= self.num_sequences:
            raise self._error(self._idx, f"document {number:,} from sequence {first:,} to {last:,}", _RISING)
        if first == last:
            return np.empty(0, dtype=np.int64)
        start = int(self.pointers[first]) // self.dtype.itemsize
        count = int(self.sequence_lengths[first:last].sum(dtype=np.int64))
        if not 0 <= start <= start + count <= self.num_tokens:
            value = f"document {number:,} from token {start:,} to {start + count:,}"
            raise self._error(self._idx, value, f"bounds within the {self.num_tokens:,} tokens of the pair")
        return self.tokens(start, count)

    def documents_at(self, start: int, stop: int) -> DocumentSpans:
        """The documents of tokens [start, stop), by a few entries of the index. Raises ConfigError if it is damaged."""
        index = self.pointers, self.document_indices, self.dtype.itemsize, self.num_tokens
        try:
            return document_spans(*index, start, stop)
        except ValueError as error:
            raise self._error(self._idx, str(error), _RISING) from error


def _parts(size: int) -> Iterator[tuple[int, int]]:
    """(first, count) of each part when `size` entries are read in parts."""
    for first in range(0, size, _PART):
        yield first, min(_PART, size - first)


def _read(file: BinaryIO, offset: int, dtype: str, count: int) -> NDArray:
    """[count] entries at a byte offset after the header; read, not memory-mapped, so that they do not stay resident."""
    file.seek(_HEADER.size + offset)
    return np.fromfile(file, dtype, count)


@dataclass(frozen=True)
class WrittenSize:
    """How much of a pair has been written."""

    tokens: int = 0
    sequences: int = 0
    documents: int = 0


class IndexedDatasetWriter:
    """Writes a pair document by document. The final names do not exist before `publish`.

    As a context manager it calls `finalize`, or removes its files after an exception. To publish several pairs
    together, call `prepare` on all of them before the first `publish`.

    Lengths and bounds are kept in temporary files until the index is written, so that memory use does not grow with
    the number of documents, and a later writer can resume where an earlier one was killed.
    """

    def __init__(self, prefix: Path, dtype: np.dtype, partial: Path | None = None, written: WrittenSize | None = None):
        """Starts a pair, or resumes one.

        Args:
            partial: prefix of the unfinished files, on the same file system; None: hidden files next to the final ones.
            written: the size at which to resume the files of an earlier writer with the same `partial`; anything that
                it wrote after that is discarded.

        Raises:
            OSError: the disk fails, or the earlier files are missing or shorter than `written`.
        """
        self._bin, self._idx = paths_of(prefix)
        partial = partial or temporary_beside(prefix)
        self._ids, self._lengths, self._bounds, self._index = (
            Path(f"{partial}.{part}.tmp") for part in ("bin", "lengths", "bounds", "idx")
        )
        self._code = next(code for code, known in _DTYPES.items() if known == dtype)
        self.dtype = dtype
        self.written = written or WrittenSize()
        self._prepared = False
        sizes = (self.written.tokens * dtype.itemsize, 4 * self.written.sequences, 8 * self.written.documents)
        self._files = [
            open_at(path, None if written is None else size)
            for path, size in zip((self._ids, self._lengths, self._bounds), sizes, strict=True)
        ]

    @property
    def num_tokens(self) -> int:
        """Tokens written so far."""
        return self.written.tokens

    def add_document(self, *sequences: NDArray | Sequence[int]) -> None:
        """Appends a document of one or more sequences of token ids."""
        arrays = [np.asarray(sequence) for sequence in sequences]
        limits = np.iinfo(self.dtype)
        for ids in arrays:
            assert ids.size == 0 or (ids.min() >= limits.min and ids.max() <= limits.max), "ids do not fit the type"
        data = b"".join(ids.astype(self.dtype).tobytes() for ids in arrays)
        lengths = np.array([len(ids) for ids in arrays], dtype="<i4")
        self._append(data, lengths, np.array([len(arrays)], dtype="<i8"))

    def add_documents(self, ids: NDArray, lengths: NDArray[np.int32]) -> None:
        """Appends documents of one sequence each.

        Args:
            ids: the concatenated tokens of all documents, in this pair's dtype.
            lengths: [documents] tokens of each document.
        """
        assert ids.dtype == self.dtype, "ids must have the pair's dtype"
        assert len(ids) == lengths.sum(), "lengths must add up to the number of ids"
        self._append(ids.tobytes(), lengths, np.arange(1, len(lengths) + 1, dtype="<i8"))

    def add_dataset(self, dataset: IndexedDataset) -> Iterator[int]:
        """Appends another pair of the same dtype, a few megabytes at a time; yields the bytes of each step."""
        assert dataset.dtype == self.dtype, "pairs must have one dtype"
        for first, count in _parts(dataset.num_documents):
            bounds = dataset.document_indices[first : first + count + 1]
            lengths = dataset.sequence_lengths[int(bounds[0]) : int(bounds[-1])]
            start = int(dataset.pointers[int(bounds[0])]) if len(lengths) else 0
            size = int(lengths.sum(dtype=np.int64)) * self.dtype.itemsize
            for part in dataset.read_bytes(start, size):
                self._files[0].write(part)
                yield len(part)
            self._append(b"", lengths, bounds[1:] - bounds[0], size // self.dtype.itemsize)

    def _append(self, data: bytes, lengths: NDArray, ends: NDArray, tokens: int = 0) -> None:
        """Appends sequences and, for each document, the end of its range among these sequences."""
        old = self.written
        for file, part in zip(
            self._files, (data, _packed(lengths, "<i4"), _packed(ends + old.sequences, "<i8")), strict=True
        ):
            file.write(part)
        tokens += len(data) // self.dtype.itemsize
        self.written = WrittenSize(old.tokens + tokens, old.sequences + len(lengths), old.documents + len(ends))

    def flush(self) -> WrittenSize:
        """Flushes Python's buffers to the operating system; returns how much has been written."""
        for file in self._files:
            file.flush()
        return self.written

    def sync(self) -> None:
        """Makes the flushed data durable; another thread may continue to write."""
        for file in self._files:
            os.fsync(file.fileno())

    def finalize(self) -> None:
        """Makes both files durable and publishes them."""
        self.prepare()
        self.publish()

    def prepare(self) -> None:
        """Completes both files under their temporary names, durably. All steps that can fill the disk happen here."""
        for file in self._files:
            sync_and_close(file)
        sequences, documents = self.written.sequences, self.written.documents
        with self._index.open("wb") as file, self._lengths.open("rb") as lengths, self._bounds.open("rb") as bounds:
            file.write(_HEADER.pack(MAGIC, VERSION, self._code, sequences, documents + 1))
            shutil.copyfileobj(lengths, file)
            end = 0
            for first, count in _parts(sequences):
                lengths.seek(4 * first)
                ends = end + np.cumsum(np.frombuffer(lengths.read(4 * count), "<i4"), dtype=np.int64)
                file.write(_packed(np.concatenate([[end], ends[:-1]]) * self.dtype.itemsize, "<i8"))
                end = int(ends[-1])
            file.write(struct.pack("<q", 0))
            shutil.copyfileobj(bounds, file)
            sync_and_close(file)
        self._prepared = True

    def move_to(self, prefix: Path) -> None:
        """Changes the prefix of the published pair."""
        self._bin, self._idx = paths_of(prefix)

    def publish(self) -> None:
        """Gives both files their final names: first the ids, then the index that refers to them."""
        assert self._prepared, "call prepare first"
        self._ids.replace(self._bin)
        self._index.replace(self._idx)
        self._lengths.unlink()
        self._bounds.unlink()

    def close(self) -> None:
        """Closes the unfinished files; a later writer may resume them."""
        for file in self._files:
            with contextlib.suppress(OSError):  # on a full disk the last bytes cannot be flushed
                file.close()

    def abort(self) -> None:
        """Removes the unfinished files."""
        self.close()
        for path in (self._ids, self._lengths, self._bounds, self._index):
            path.unlink(missing_ok=True)

    def __enter__(self) -> IndexedDatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abort()
            return
        try:
            self.finalize()
        except BaseException:
            self.abort()
            raise


def _packed(values: NDArray, dtype: str) -> bytes:
    return values.astype(dtype, copy=False).tobytes()
