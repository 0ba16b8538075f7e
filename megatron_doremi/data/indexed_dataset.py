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
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from megatron_doremi.errors import ConfigError, Fault

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
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
    """A dataset opened for reading. Ids are mapped into memory and read when asked for.

    Attributes:
        prefix: path without .bin or .idx.
        dtype: type of the stored ids.
        sequence_lengths: [n] int32 tokens.
        document_indices: [m] int64 number of the sequence at which each document starts; the last is n.
        num_tokens: tokens in the whole stream.
    """

    def __init__(self, prefix: Path, vocab_size: int = 0):
        """Opens and checks a pair. Raises ConfigError where it is missing, damaged or something else.

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
        self._ids: NDArray = np.empty(0, self.dtype)
        if expected:
            self._ids = np.memmap(self._bin, dtype=self.dtype, mode="r")

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
        pointers: NDArray[np.int64] = body[4 * sequences : 12 * sequences].view("<i8")
        self.document_indices: NDArray[np.int64] = body[12 * sequences :].view("<i8")
        self._check(pointers)

    def _check(self, pointers: NDArray[np.int64]) -> None:
        lengths, documents = self.sequence_lengths, self.document_indices
        if len(lengths) and lengths.min() < 0:
            raise self._error(self._idx, f"a sequence of {lengths.min()} tokens", "lengths that are not negative")
        ends = np.cumsum(lengths, dtype=np.int64)
        self.num_tokens = int(ends[-1]) if len(ends) else 0
        if not np.array_equal(pointers[1:], ends[:-1] * self.dtype.itemsize) or (len(pointers) and pointers[0] != 0):
            raise self._error(self._idx, "offsets with gaps or overlaps", "sequences that lie end to end")
        if len(documents) == 0 or documents[0] != 0 or documents[-1] != len(lengths) or (np.diff(documents) < 0).any():
            raise self._error(self._idx, "documents out of order", "rising bounds from 0 to the number of sequences")

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
        ids = self._ids[start : start + count].astype(np.int64)
        if self.vocab_size and count and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            place = start + int(np.argmax((ids < 0) | (ids >= self.vocab_size)))
            value = f"id {ids[place - start]} at token {place:,}"
            raise self._error(self._bin, value, f"ids below the vocabulary's size, {self.vocab_size:,}")
        return ids

    def document(self, number: int) -> NDArray[np.int64]:
        """The tokens of a document, all its sequences end to end, int64."""
        first, last = (int(bound) for bound in self.document_indices[number : number + 2])
        start = int(self.sequence_lengths[:first].sum(dtype=np.int64))
        return self.tokens(start, int(self.sequence_lengths[first:last].sum(dtype=np.int64)))


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
