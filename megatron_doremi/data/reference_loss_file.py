"""One file of reference losses: the token losses of a chunk of a domain's windows, read row by row.

    DIR/losses/0003/000012.safetensors    domain 3, the scored windows among 12 * 4096 to 13 * 4096 - 1:
        recorded   [64] uint64            bit w % 64 of word w // 64 is set if window 12 * 4096 + w is recorded
        checksums  [n] uint32             CRC-32 of domain, window and row (`row_checksum`)
        losses     [n, seq] uint16        in units of 2^-11 nats, rows in the order of the windows

Header and bits take a few hundred bytes, so that a row costs three small reads whatever the file's size. The checksum
detects changed bytes and rows stored under another window's number.

Losses are quantized to a grid from 0 to 65535 * 2^-11 = 31.9995 nats and rounded to the nearest step: the error is at
most 2^-12 = .00024 nats. Larger losses are clipped to the end of the grid. Version 0.1 wrote float16 (windows [n] int64
ascending, losses [n, seq]), whose error is up to 2^-9 between 4 and 8 nats, eight times as much.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError
from safetensors.numpy import save

from megatron_doremi.errors import ConfigError, Fault, RunError
from megatron_doremi.storage.files import atomic_write_bytes, make_folder
from megatron_doremi.storage.folder_lock import open_locked
from megatron_doremi.storage.formats import Count, Schema

CHUNK_WINDOWS = 4096
STEPS_PER_NAT = 2048
_LAST_CODE = 65535
LARGEST_LOSS = _LAST_CODE / STEPS_PER_NAT
# The smallest loss that rounds to 0: a loss can only be negative by a rounding error.
SMALLEST_LOSS = -0.5 / STEPS_PER_NAT
# Size of the first read of a file: header and bits.
_FIRST_BYTES = 4096
_HEADER_BYTES = 1 << 16
_CELL = {"U64": 8, "I64": 8, "U32": 4, "U16": 2, "F16": 2}
REMEDY = "delete it and run --phase score again"
# (chunk, bits of its windows), chunks ascending.
Chunks = Iterator[tuple[int, int]]


class _Tensor(Schema):
    dtype: str
    shape: list[Count]
    data_offsets: list[Count]


class _Header(Schema):
    """The safetensors header of a file of losses, in either format."""

    metadata: dict[str, str] = Field(default={}, alias="__metadata__")
    losses: _Tensor
    recorded: _Tensor | None = None
    checksums: _Tensor | None = None
    windows: _Tensor | None = None


def chunk_path(folder: Path, domain: int, chunk: int) -> Path:
    """The path of the file of a chunk of a domain's windows."""
    return folder / "losses" / f"{domain:04d}" / f"{chunk:06d}.safetensors"


def to_codes(losses: NDArray[np.floating]) -> NDArray[np.uint16]:
    """Quantizes losses in nats (finite, non-negative) to the nearest step; losses above the grid to its last step."""
    return np.clip(np.rint(losses.astype(np.float64) * STEPS_PER_NAT), 0, _LAST_CODE).astype(np.uint16)


def from_codes(codes: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Losses in nats of codes; exact, so that `to_codes` restores the codes."""
    return codes.astype(np.float32) / np.float32(STEPS_PER_NAT)


def clipped(losses: NDArray[np.floating]) -> int:
    """Number of losses above the grid."""
    return int((losses > LARGEST_LOSS).sum())


def row_checksum(domain: int, window: int, row: bytes) -> int:
    """CRC-32 of a row together with its domain's and its window's number."""
    return zlib.crc32(row, zlib.crc32(struct.pack("<QQ", domain, window)))


def damaged(path: Path, value: str, rule: str = "a file of token losses") -> ConfigError:
    """The error of an invalid file of losses."""
    return ConfigError(Fault(str(path), value, rule, REMEDY))


@dataclass(frozen=True)
class LossFile:
    """An open file of a chunk. Its header and bits are valid; each row is checked when it is read.

    Attributes:
        domain, chunk: their indices.
        bits: the recorded windows; bit w stands for window chunk * 4096 + w.
        old: whether version 0.1 wrote the file.
        checksums_at, losses_at: byte offsets of the tensors.
        clipped: number of losses that were clipped to the end of the grid.
    """

    path: Path
    domain: int
    chunk: int
    descriptor: int
    seq_length: int
    bits: int
    old: bool
    checksums_at: int
    losses_at: int
    clipped: int

    @staticmethod
    def open(folder: Path, domain: int, chunk: int, seq_length: int, old: bool = False) -> LossFile | None:
        """Opens and checks a chunk's file; None if it does not exist.

        Raises:
            ConfigError: the file cannot be read, is damaged, or has another format or sequence length.
        """
        path = chunk_path(folder, domain, chunk)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise damaged(path, str(error.strerror)) from error
        try:
            if hasattr(os, "posix_fadvise"):
                # Otherwise the system reads up to 128 KiB of unneeded rows ahead.
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
            return _opened(path, domain, chunk, descriptor, seq_length, old)
        except OSError as error:
            os.close(descriptor)
            raise damaged(path, str(error.strerror)) from error
        except BaseException:
            os.close(descriptor)
            raise

    def close(self) -> None:
        """Closes the file."""
        os.close(self.descriptor)

    def __enter__(self) -> LossFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def windows(self) -> NDArray[np.int64]:
        """[n] the recorded windows, ascending."""
        return self.chunk * CHUNK_WINDOWS + np.flatnonzero(unpack(self.bits))

    def losses(self, window: int) -> NDArray[np.float32] | None:
        """[seq] losses of a window in nats; None if it is not recorded.

        Raises:
            ConfigError: the row is damaged.
            RunError: the file can no longer be read.
        """
        position = window - self.chunk * CHUNK_WINDOWS
        if not self.bits >> position & 1:
            return None
        row = (self.bits & ((1 << position) - 1)).bit_count()
        size = 2 * self.seq_length
        data = self._read(self.losses_at + row * size, size)
        if self.old:
            return self._checked(np.frombuffer(data, "<f2"), window)
        checksum = row_checksum(self.domain, window, data)
        if checksum != int.from_bytes(self._read(self.checksums_at + 4 * row, 4), "little"):
            raise damaged(self.path, f"the checksum {checksum} of window {window:,}", "unchanged rows")
        return from_codes(np.frombuffer(data, "<u2"))

    def _checked(self, row: NDArray[np.float16], window: int) -> NDArray[np.float32]:
        bad = ~(np.isfinite(row) & (row >= 0))
        if bad.any():
            value = f"window {window:,} with a loss of {row[int(np.argmax(bad))]}"
            raise damaged(self.path, value, "finite, non-negative losses")
        return row.astype(np.float32)

    def _read(self, offset: int, size: int) -> bytes:
        try:
            data = os.pread(self.descriptor, size, offset)
        except OSError as error:
            raise RunError(f"{self.path} cannot be read: {error.strerror}") from error
        if len(data) < size:
            raise damaged(self.path, f"ends at byte {offset + len(data):,}", "the size that it had when it was opened")
        return data


def _opened(path: Path, domain: int, chunk: int, descriptor: int, seq_length: int, old: bool) -> LossFile:
    size, head = os.fstat(descriptor).st_size, os.pread(descriptor, _FIRST_BYTES, 0)
    length = int.from_bytes(head[:8], "little") if len(head) >= 8 else 0
    if not 2 <= length <= min(_HEADER_BYTES, size - 8):
        raise damaged(path, "no header" if size else "an empty file")
    if len(head) < 8 + length:
        head = os.pread(descriptor, 8 + length, 0)
    try:
        header = _Header.model_validate_json(head[8 : 8 + length])
    except ValidationError as error:
        detail = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise damaged(path, f"header: {'.'.join(map(str, detail['loc']))} {detail['msg']}"[:120]) from error
    offsets = _offsets(path, header, seq_length, old, size - 8 - length)
    bits_at, data = 8 + length + offsets["windows" if old else "recorded"], head
    count = header.losses.shape[0]
    bits_size = 8 * count if old else CHUNK_WINDOWS // 8
    if len(head) < bits_at + bits_size:
        data = bytes(bits_at) + os.pread(descriptor, bits_size, bits_at)
    stored = data[bits_at : bits_at + bits_size]
    bits = _bits_of(path, chunk, np.frombuffer(stored, "<i8")) if old else int.from_bytes(stored, "little")
    if bits.bit_count() != count:
        raise damaged(path, f"{bits.bit_count()} windows and {count} rows", "a row for each window")
    clipped_text = header.metadata.get("clipped", "0")
    return LossFile(
        path,
        domain,
        chunk,
        descriptor,
        seq_length,
        bits,
        old,
        8 + length + offsets.get("checksums", 0),
        8 + length + offsets["losses"],
        int(clipped_text) if clipped_text.isascii() and clipped_text.isdigit() and len(clipped_text) < 19 else 0,
    )


def _offsets(path: Path, header: _Header, seq_length: int, old: bool, size: int) -> dict[str, int]:
    """The byte offset of each tensor after the header. Raises ConfigError unless they are the format's, contiguous."""
    count = header.losses.shape[0] if header.losses.shape else 0
    kind = "F16" if old else "U16"
    if header.losses.dtype != kind or header.losses.shape != [count, seq_length] or not 1 <= count <= CHUNK_WINDOWS:
        raise damaged(
            path,
            f"losses of type {header.losses.dtype} and shape {header.losses.shape}",
            f"losses of type {kind} and shape [n, {seq_length}] with n from 1 to {CHUNK_WINDOWS}",
        )
    new = {"recorded": ("U64", [CHUNK_WINDOWS // 64]), "checksums": ("U32", [count])}
    expected = {**({"windows": ("I64", [count])} if old else new), "losses": (kind, [count, seq_length])}
    offsets, end = {}, 0
    for name, (dtype, shape) in expected.items():
        offsets[name] = end
        end += _CELL[dtype] * int(np.prod(shape))
        tensor: _Tensor | None = getattr(header, name)
        if tensor is None or (tensor.dtype, tensor.shape, tensor.data_offsets) != (dtype, shape, [offsets[name], end]):
            given = f"of type {tensor.dtype}, {tensor.shape} at {tensor.data_offsets}" if tensor else "is missing"
            raise damaged(path, f"{name} {given}", f"{dtype}, {shape} at {[offsets[name], end]}")
    if end != size:
        raise damaged(path, f"{size:,} bytes of data", f"the {end:,} bytes of its header")
    return offsets


def _bits_of(path: Path, chunk: int, windows: NDArray[np.int64]) -> int:
    positions = windows - chunk * CHUNK_WINDOWS
    if len(windows) and ((np.diff(windows) <= 0).any() or positions[0] < 0 or positions[-1] >= CHUNK_WINDOWS):
        raise damaged(path, "windows out of order or of another chunk", "ascending windows of this chunk")
    flags = np.zeros(CHUNK_WINDOWS, np.uint8)
    flags[positions] = 1
    return pack(flags)


def pack(flags: NDArray[np.uint8]) -> int:
    """Bits of the [4096] flags of a chunk's windows."""
    return int.from_bytes(np.packbits(flags, bitorder="little").tobytes(), "little")


def unpack(bits: int) -> NDArray[np.uint8]:
    """[4096] flags of the bits of a chunk's windows."""
    data = bits.to_bytes(CHUNK_WINDOWS // 8, "little")
    return np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")


def all_chunks(size: int) -> Chunks:
    """All windows of a domain of `size` windows, by chunk."""
    for chunk, first in enumerate(range(0, size, CHUNK_WINDOWS)):
        yield chunk, (1 << min(CHUNK_WINDOWS, size - first)) - 1


def chunks_of(windows: Iterable[NDArray[np.int64]], size: int) -> Chunks:
    """Groups windows of a domain, in any order, by chunk. Takes `size` bytes, the domain's number of windows."""
    flags = np.zeros(-(-size // CHUNK_WINDOWS) * CHUNK_WINDOWS, np.uint8)
    for part in windows:
        flags[part] = 1
    packed = np.packbits(flags.reshape(-1, CHUNK_WINDOWS), axis=1, bitorder="little")
    for chunk in np.flatnonzero(packed.any(axis=1)).tolist():
        yield chunk, int.from_bytes(packed[chunk].tobytes(), "little")


def add_windows(
    folder: Path, domain: int, chunk: int, windows: NDArray[np.int64], losses: NDArray[np.floating]
) -> None:
    """Adds scored windows to a chunk's file, which is replaced atomically by a rename.

    Overlapping jobs may add to the same chunk: a lock serializes them, and each keeps the rows of the others. On a file
    system without flock the file is read again if another job has replaced it. Rows that are lost between this check
    and the rename are reported as missing by `ReferenceLosses.check`, and the next --phase score adds them.

    Args:
        windows: [n] windows of this chunk, ascending. Windows that are recorded already keep their losses.
        losses: [n, seq] in nats, finite, non-negative.

    Raises:
        ConfigError: the existing file is damaged.
    """
    path = chunk_path(folder, domain, chunk)
    make_folder(path.parent, "--save")
    with _only_writer(path.with_name(f".{path.stem}.lock")):
        done = False
        while not done:
            before = _version(path)
            data = _with_windows(folder, domain, chunk, windows, losses)
            done = data is None or atomic_write_bytes(path, data, functools.partial(_is_version, path, before))


@contextlib.contextmanager
def _only_writer(path: Path) -> Iterator[None]:
    """Holds a lock file, and removes it afterward. Does nothing on a file system without locks."""

    def take(descriptor: int) -> None:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)

    descriptor = open_locked(path, take)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _version(path: Path) -> os.stat_result | None:
    """Identifies the current version of a file; None if there is none."""
    try:
        # A network file system asks its server when a file is opened.
        with path.open("rb") as file:
            return os.fstat(file.fileno())
    except FileNotFoundError:
        return None


def _is_version(path: Path, version: os.stat_result | None) -> bool:
    current = _version(path)
    if current is None or version is None:
        return current is version
    return os.path.samestat(current, version) and current.st_mtime_ns == version.st_mtime_ns


def _with_windows(
    folder: Path, domain: int, chunk: int, windows: NDArray[np.int64], losses: NDArray[np.floating]
) -> bytes | None:
    """The content of a chunk's file after adding windows; None if it already holds all of them."""
    with LossFile.open(folder, domain, chunk, losses.shape[1]) or contextlib.nullcontext() as file:
        if file is not None:
            new = unpack(file.bits)[windows - chunk * CHUNK_WINDOWS] == 0
            windows, losses = windows[new], losses[new]
            if not len(windows):
                return None
        codes, clipped_count = to_codes(losses), clipped(losses)
        sums = [row_checksum(domain, w, row.tobytes()) for w, row in zip(windows.tolist(), codes, strict=True)]
        checksums = np.array(sums, np.uint32)
        if file is not None:
            count = file.bits.bit_count()
            old_codes = file._read(file.losses_at, 2 * count * file.seq_length)
            codes = np.concatenate([np.frombuffer(old_codes, "<u2").reshape(count, -1), codes])
            checksums = np.concatenate([np.frombuffer(file._read(file.checksums_at, 4 * count), "<u4"), checksums])
            windows = np.concatenate([file.windows(), windows])
            clipped_count += file.clipped
    order = np.argsort(windows, kind="stable")
    flags = np.zeros(CHUNK_WINDOWS, np.uint8)
    flags[windows - chunk * CHUNK_WINDOWS] = 1
    assert flags.sum() == len(windows), "windows must be unique and of this chunk"
    tensors = {
        "recorded": np.packbits(flags, bitorder="little").view("<u8"),
        "checksums": checksums[order],
        "losses": np.ascontiguousarray(codes[order]),
    }
    return save(tensors, metadata={"clipped": str(clipped_count)})
