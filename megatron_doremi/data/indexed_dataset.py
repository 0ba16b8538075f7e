"""Megatron-LM's indexed datasets, byte for byte: token ids in PREFIX.bin, where they lie in PREFIX.idx.

PREFIX.idx, little-endian: magic "MMIDIDX\\0\\0", uint64 version 1, uint8 type of ids, uint64 number of
sequences n, uint64 number of document bounds m, n int32 lengths in tokens, n int64 offsets in bytes, m int64
numbers of the sequence at which each document starts, the last one n. PREFIX.bin is the sequences, end to end,
so a whole dataset is also one stream of tokens.
"""

from __future__ import annotations

import contextlib
import errno
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

from megatron_doremi.errors import ConfigError, Fault
from megatron_doremi.storage.files import temporary_beside

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_RISING = "rising bounds from 0 to the number of sequences"
# Sequences of an index that is checked whole when it is opened, in parts of so many.
_CHECKED_ON_OPENING = 1 << 18
_PART = 1 << 16
_BYTES_AT_ONCE = 1 << 24
# Megatron-LM's codes; 6 and 7 are floats, which are no token ids.
_DTYPES: dict[int, np.dtype] = {
    code: np.dtype(name) for code, name in {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}.items()
}


def dtype_for(vocab_size: int) -> np.dtype:
    """The type in which Megatron-LM stores ids of a vocabulary."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def paths_of(prefix: Path) -> tuple[Path, Path]:
    """PREFIX.bin and PREFIX.idx."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


class IndexedDataset:
    """A dataset opened for reading. Ids are read when asked for; threads may share it.

    Attributes:
        prefix: path without .bin or .idx.
        dtype: type of the stored ids.
        sequence_lengths: [n] int32 tokens.
        pointers: [n] int64 byte at which each sequence starts.
        document_indices: [m] int64 number of the sequence at which each document starts; the last is n.
        num_tokens: tokens in the whole stream.
    """

    def __init__(self, prefix: Path, vocab_size: int = 0):
        """Opens and checks a pair. Raises ConfigError where it is missing, damaged or something else.

        Of an index with more than 262,144 sequences only its ends are read, so that a run on any amount of data starts
        at once; what does not line up between them is found by `check_index`, or where it is met.

        Args:
            vocab_size: ids read have to be below this; 0: any ids. An id that no rank's part of a cut vocabulary
                holds would not fail by itself: its embedding would be zero and its loss a plausible number.
        """
        self.prefix, self.vocab_size = prefix, vocab_size
        self._bin, self._idx = paths_of(prefix)
        try:
            self._open()
        except OSError as error:
            reason = str(error.strerror or error)
            raise self._error(Path(error.filename or self._idx), reason, "a pair that can be read") from error

    def _open(self) -> None:
        for path in (self._bin, self._idx):
            if not path.is_file():
                raise self._error(path, "no such file", "a .bin and .idx pair")
        self._read_index()
        expected, found = self.num_tokens * self.dtype.itemsize, self._bin.stat().st_size
        if found != expected:
            raise self._error(self._bin, f"{found:,} bytes", f"the {expected:,} bytes that {self._idx.name} speaks of")
        # Read, not mapped: a window is one request to the file system instead of a page fault or two with what it reads
        # ahead, and a file that is cut off under a run is an error instead of a signal.
        self._file = self._bin.open("rb", buffering=0)

    def _error(self, path: Path, value: str, rule: str, remedy: str = "copy the pair again") -> ConfigError:
        return ConfigError(Fault(str(path), value, rule, f"{remedy}, or make it with tools/preprocess_data.py"))

    def _read_index(self) -> None:
        size = self._idx.stat().st_size
        with self._idx.open("rb") as file:
            head = file.read(_HEADER.size)
        if len(head) < _HEADER.size or head[:9] != MAGIC:
            raise self._error(self._idx, "no index", "a file that starts with MMIDIDX, as Megatron-LM writes it")
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
        # What is longer is read where it is used, and as a whole by tools/inspect_data.py: a run starts at once.
        if sequences <= _CHECKED_ON_OPENING:
            self.check_index()
        if end < 0 or end % self.dtype.itemsize:
            raise self._error(self._idx, f"an end at byte {end:,}", "sequences that lie end to end")

    def check_index(self) -> None:
        """Reads the whole index, a part at a time. Raises ConfigError where sequences or documents do not line up."""
        tokens = bound = 0
        with self._idx.open("rb") as file:
            for first, count in _parts(self.num_sequences):
                lengths = _read(file, 4 * first, "<i4", count)
                pointers = _read(file, 4 * self.num_sequences + 8 * first, "<i8", count)
                if lengths.min() < 0:
                    raise self._error(
                        self._idx, f"a sequence of {lengths.min()} tokens", "lengths that are not negative"
                    )
                ends = tokens + np.cumsum(lengths, dtype=np.int64)
                if not np.array_equal(pointers, (ends - lengths) * self.dtype.itemsize):
                    raise self._error(self._idx, "offsets with gaps or overlaps", "sequences that lie end to end")
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
        """`count` tokens of the stream from token `start` on, int64.

        Raises:
            ConfigError: an id is outside the vocabulary.
        """
        assert 0 <= start <= start + count <= self.num_tokens, (self.prefix, start, count, self.num_tokens)
        size = self.dtype.itemsize
        data = b"".join(self.read_bytes(start * size, count * size))
        ids = np.frombuffer(data, self.dtype).astype(np.int64)
        if self.vocab_size and count and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            place = start + int(np.argmax((ids < 0) | (ids >= self.vocab_size)))
            value = f"id {ids[place - start]} at token {place:,}"
            rule, remedy = f"ids below the vocabulary's size, {self.vocab_size:,}", "give the --vocab-size of these ids"
            raise self._error(self._bin, value, rule, remedy)
        return ids

    def read_bytes(self, start: int, count: int) -> Iterator[bytes]:
        """`count` bytes of the ids from byte `start` on, in parts. Raises ConfigError where the file is shorter."""
        while count:
            data = os.pread(self._file.fileno(), min(count, _BYTES_AT_ONCE), start)
            if not data:
                raise self._error(self._bin, f"ends at byte {start:,}", "the size that it had at the start")
            yield data
            start, count = start + len(data), count - len(data)

    def document(self, number: int) -> NDArray[np.int64]:
        """The tokens of a document, all its sequences end to end, int64."""
        first, last = (int(bound) for bound in self.document_indices[number : number + 2])
        if not 0 <= first <= last <= self.num_sequences:
            raise self._error(self._idx, f"document {number:,} from sequence {first:,} to {last:,}", _RISING)
        if first == last:
            return np.empty(0, dtype=np.int64)
        start = int(self.pointers[first]) // self.dtype.itemsize
        count = int(self.sequence_lengths[first:last].sum(dtype=np.int64))
        if not 0 <= start <= start + count <= self.num_tokens:
            value = f"document {number:,} from token {start:,} to {start + count:,}"
            raise self._error(self._idx, value, f"places in the {self.num_tokens:,} tokens of the pair")
        return self.tokens(start, count)


def _parts(size: int) -> Iterator[tuple[int, int]]:
    """(first, count) of each part of `size` entries."""
    for first in range(0, size, _PART):
        yield first, min(_PART, size - first)


def _read(file: BinaryIO, place: int, dtype: str, count: int) -> NDArray:
    """Entries from byte `place` after the header on; read, not mapped, so that they do not stay in memory."""
    file.seek(_HEADER.size + place)
    return np.fromfile(file, dtype, count)


@dataclass(frozen=True)
class Written:
    """How much of a pair is written."""

    tokens: int = 0
    sequences: int = 0
    documents: int = 0


class IndexedDatasetWriter:
    """Writes a pair document by document; nothing stands under the final names before `publish`.

    A context manager: left without an exception it finalizes, else it removes what it wrote. Whoever writes
    several pairs that belong together prepares all of them before it publishes the first.

    Lengths and bounds wait in files of their own for the index, so that a writer takes no memory, however many
    documents there are, and can go on where an earlier one was killed.
    """

    def __init__(self, prefix: Path, dtype: np.dtype, partial: Path | None = None, written: Written | None = None):
        """Starts a pair, or goes on with one.

        Args:
            partial: prefix of the unfinished files, on the same file system; None: hidden ones beside the final ones.
            written: where an earlier writer with the same `partial` stood; what it wrote after that is cut off.

        Raises:
            OSError: among others where the earlier files are missing or shorter than `written` says.
        """
        self._bin, self._idx = paths_of(prefix)
        partial = partial or temporary_beside(prefix)
        self._ids, self._lengths, self._bounds, self._index = (
            Path(f"{partial}.{part}.tmp") for part in ("bin", "lengths", "bounds", "idx")
        )
        self._code = next(code for code, known in _DTYPES.items() if known == dtype)
        self.dtype = dtype
        self.written = written or Written()
        self._prepared = False
        sizes = (self.written.tokens * dtype.itemsize, 4 * self.written.sequences, 8 * self.written.documents)
        self._files = [
            _open_at(path, None if written is None else size)
            for path, size in zip((self._ids, self._lengths, self._bounds), sizes, strict=True)
        ]

    @property
    def num_tokens(self) -> int:
        """Tokens written so far."""
        return self.written.tokens

    def add_document(self, *sequences: NDArray | Sequence[int]) -> None:
        """Appends a document of one or several sequences of token ids."""
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
            ids: all their tokens, end to end, in the type of this pair.
            lengths: [documents] tokens of each.
        """
        assert ids.dtype == self.dtype, "ids in the pair's type"
        assert len(ids) == lengths.sum(), "lengths that fit"
        self._append(ids.tobytes(), lengths, np.arange(1, len(lengths) + 1, dtype="<i8"))

    def add_dataset(self, dataset: IndexedDataset) -> Iterator[int]:
        """Appends another pair of the same type, some megabytes at a time; yields the bytes of each."""
        assert dataset.dtype == self.dtype, "pairs of one type"
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
        """Appends sequences and, for each document, the number of its last sequence's successor among them."""
        before = self.written
        for file, part in zip(
            self._files, (data, _as(lengths, "<i4"), _as(ends + before.sequences, "<i8")), strict=True
        ):
            file.write(part)
        tokens += len(data) // self.dtype.itemsize
        self.written = Written(before.tokens + tokens, before.sequences + len(lengths), before.documents + len(ends))

    def flush(self) -> Written:
        """Hands all to the operating system; returns what there is."""
        for file in self._files:
            file.flush()
        return self.written

    def sync(self) -> None:
        """Makes what was flushed durable; another thread may write on."""
        for file in self._files:
            os.fsync(file.fileno())

    def finalize(self) -> None:
        """Makes both files durable and publishes them."""
        self.prepare()
        self.publish()

    def prepare(self) -> None:
        """Completes both files under their temporary names, durably: what can fail on a full disk."""
        for file in self._files:
            _sync_and_close(file)
        sequences, documents = self.written.sequences, self.written.documents
        with self._index.open("wb") as file, self._lengths.open("rb") as lengths, self._bounds.open("rb") as bounds:
            file.write(_HEADER.pack(MAGIC, VERSION, self._code, sequences, documents + 1))
            shutil.copyfileobj(lengths, file)
            end = 0
            for first, count in _parts(sequences):
                lengths.seek(4 * first)
                ends = end + np.cumsum(np.frombuffer(lengths.read(4 * count), "<i4"), dtype=np.int64)
                file.write(_as(np.concatenate([[end], ends[:-1]]) * self.dtype.itemsize, "<i8"))
                end = int(ends[-1])
            file.write(struct.pack("<q", 0))
            shutil.copyfileobj(bounds, file)
            _sync_and_close(file)
        self._prepared = True

    def move_to(self, prefix: Path) -> None:
        """Changes the prefix under which the pair will be published."""
        self._bin, self._idx = paths_of(prefix)

    def publish(self) -> None:
        """Gives both files their final names, the ids before the index that speaks of them."""
        assert self._prepared, "prepare comes first"
        self._ids.replace(self._bin)
        self._index.replace(self._idx)
        self._lengths.unlink()
        self._bounds.unlink()

    def close(self) -> None:
        """Closes the unfinished files, for a later writer to go on with."""
        for file in self._files:
            with contextlib.suppress(OSError):  # a full disk, on which the last bytes cannot be flushed
                file.close()

    def abort(self) -> None:
        """Removes what was written."""
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


def _open_at(path: Path, size: int | None) -> BinaryIO:
    """A new file, or an earlier one cut to a size that it has at least."""
    if size is None:
        return path.open("wb")
    file = path.open("r+b")
    if file.seek(0, os.SEEK_END) < size:
        file.close()
        raise OSError(errno.EIO, f"shorter than the {size:,} bytes that were written", str(path))
    file.truncate(size)
    file.seek(size)
    return file


def _as(values: NDArray, dtype: str) -> bytes:
    return values.astype(dtype, copy=False).tobytes()


def _sync_and_close(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
