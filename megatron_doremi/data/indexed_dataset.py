"""Megatron-LM's indexed datasets, byte for byte: token ids in PREFIX.bin, where they lie in PREFIX.idx.

PREFIX.idx, little-endian: magic "MMIDIDX\\0\\0", uint64 version 1, uint8 type of ids, uint64 number of
sequences n, uint64 number of document bounds m, n int32 lengths in tokens, n int64 offsets in bytes, m int64
numbers of the sequence at which each document starts, the last one n. PREFIX.bin is the sequences, end to end,
so a whole dataset is also one stream of tokens.
"""

from __future__ import annotations

import contextlib
import os
import struct
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_doremi.errors import ConfigError, Fault

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_RISING = "rising bounds from 0 to the number of sequences"
# Sequences of an index that is checked whole when it is opened, in parts of so many.
_CHECKED_ON_OPENING = 1 << 18
_PART = 1 << 16
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

    def _error(self, path: Path, value: str, rule: str) -> ConfigError:
        return ConfigError(
            Fault(str(path), value, rule, "copy the pair again, or make it with tools/preprocess_data.py")
        )

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
        self._pointers: NDArray[np.int64] = body[4 * sequences : 12 * sequences].view("<i8")
        self.document_indices: NDArray[np.int64] = body[12 * sequences :].view("<i8")
        if not bounds or self.document_indices[0] != 0 or self.document_indices[-1] != sequences:
            raise self._error(self._idx, "documents out of order", _RISING)
        end = int(self._pointers[-1]) + int(self.sequence_lengths[-1]) * self.dtype.itemsize if sequences else 0
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
        data = os.pread(self._file.fileno(), count * size, start * size)
        if len(data) < count * size:
            raise self._error(
                self._bin, f"ends at byte {start * size + len(data):,}", "the size that it had at the start"
            )
        ids = np.frombuffer(data, self.dtype).astype(np.int64)
        if self.vocab_size and count and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            place = start + int(np.argmax((ids < 0) | (ids >= self.vocab_size)))
            value = f"id {ids[place - start]} at token {place:,}"
            raise self._error(self._bin, value, f"ids below the vocabulary's size, {self.vocab_size:,}")
        return ids

    def document(self, number: int) -> NDArray[np.int64]:
        """The tokens of a document, all its sequences end to end, int64."""
        first, last = (int(bound) for bound in self.document_indices[number : number + 2])
        if not 0 <= first <= last <= self.num_sequences:
            raise self._error(self._idx, f"document {number:,} from sequence {first:,} to {last:,}", _RISING)
        if first == last:
            return np.empty(0, dtype=np.int64)
        start = int(self._pointers[first]) // self.dtype.itemsize
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


class IndexedDatasetWriter:
    """Writes a pair document by document; nothing stands under the final names before `publish`.

    A context manager: left without an exception it finalizes, else it removes what it wrote. Whoever writes
    several pairs that belong together prepares all of them before it publishes the first.
    """

    def __init__(self, prefix: Path, dtype: np.dtype):
        self._bin, self._idx = paths_of(prefix)
        self._temporary = [path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in (self._bin, self._idx)]
        self._code = next(code for code, known in _DTYPES.items() if known == dtype)
        self.dtype = dtype
        # Machine numbers: a list of Python's takes ten times the memory, gigabytes for 100M documents.
        self._lengths = array("i")
        self._bounds = array("q", [0])
        self._prepared = False
        self.num_tokens = 0
        self._file = self._temporary[0].open("wb")

    def add_document(self, *sequences: NDArray | Sequence[int]) -> None:
        """Appends a document of one or several sequences of token ids."""
        for sequence in sequences:
            ids = np.asarray(sequence)
            limits = np.iinfo(self.dtype)
            assert ids.size == 0 or (ids.min() >= limits.min and ids.max() <= limits.max), "ids do not fit the type"
            self._file.write(ids.astype(self.dtype).tobytes())
            self._lengths.append(len(ids))
            self.num_tokens += len(ids)
        self._bounds.append(len(self._lengths))

    def finalize(self) -> None:
        """Makes both files durable and publishes them."""
        self.prepare()
        self.publish()

    def prepare(self) -> None:
        """Completes both files under their temporary names, durably: what can fail on a full disk."""
        _sync_and_close(self._file)
        lengths = np.array(self._lengths, dtype="<i4")
        pointers = np.zeros(len(lengths), dtype="<i8")
        np.cumsum(lengths[:-1], out=pointers[1:], dtype=np.int64)
        with self._temporary[1].open("wb") as file:
            file.write(_HEADER.pack(MAGIC, VERSION, self._code, len(lengths), len(self._bounds)))
            file.write(lengths.tobytes())
            file.write((pointers * self.dtype.itemsize).astype("<i8").tobytes())
            file.write(np.array(self._bounds, dtype="<i8").tobytes())
            _sync_and_close(file)
        self._prepared = True

    def publish(self) -> None:
        """Gives both files their final names, the ids before the index that speaks of them."""
        assert self._prepared, "prepare comes first"
        for temporary, final in zip(self._temporary, (self._bin, self._idx), strict=True):
            temporary.replace(final)

    def abort(self) -> None:
        """Removes what was written."""
        with contextlib.suppress(OSError):  # a full disk, on which the last bytes cannot be flushed
            self._file.close()
        for path in self._temporary:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()

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


def _sync_and_close(file: object) -> None:
    file.flush()  # type: ignore[attr-defined]
    os.fsync(file.fileno())  # type: ignore[attr-defined]
    file.close()  # type: ignore[attr-defined]
