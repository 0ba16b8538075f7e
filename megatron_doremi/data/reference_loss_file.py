"""One file of recorded token losses: a chunk of a domain's windows, read row by row.

    DIR/losses/0003/000012.safetensors    domain 3, windows 12 * 4096 to 13 * 4096 - 1, those that were scored:
        recorded   [64] uint64            bit w % 64 of number w // 64 is set where window 12 * 4096 + w is recorded
        checksums  [n] uint32             CRC-32 of domain, window and row (`row_checksum`)
        losses     [n, seq] uint16        in steps of 2^-11 nats, rows in the order of windows

A header and the bits are a few hundred bytes, so that a row costs three small reads whatever the file's size. The
checksum finds bytes that changed and rows under another window's number.

Losses lie on a fixed grid from 0 to 65535 * 2^-11 = 31.9995 nats and are rounded to the nearest step: off by at most
2^-12 = .00024 nats. float16, which version 0.1 wrote (`OLD`: windows [n] int64 rising, losses [n, seq]), is off by
up to 2^-9 between 4 and 8 nats, eight times as much. Losses above the grid take its last value.
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
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError
from safetensors.numpy import save

from megatron_doremi.errors import ConfigError, Fault, RunError
from megatron_doremi.storage.files import atomic_write_bytes, make_folder
from megatron_doremi.storage.formats import Count, Schema

CHUNK_WINDOWS = 4096
STEPS_PER_NAT = 2048
_LAST_CODE = 65535
LARGEST_LOSS = _LAST_CODE / STEPS_PER_NAT
# What rounds to 0: a loss cannot be negative but by rounding.
SMALLEST_LOSS = -0.5 / STEPS_PER_NAT
# What the first read of a file takes: header and bits.
_FIRST_BYTES = 4096
_HEADER_BYTES = 1 << 16
_CELL = {"U64": 8, "I64": 8, "U32": 4, "U16": 2, "F16": 2}
REMEDY = "delete it and run --phase score again"
# (chunk, bits of its windows), chunks rising.
Chunks = Iterator[tuple[int, int]]


class _Tensor(Schema):
    dtype: str
    shape: list[Count]
    data_offsets: list[Count]


class _Header(Schema):
    """The header of a safetensors file of ours, of either format."""

    metadata: dict[str, str] = Field(default={}, alias="__metadata__")
    losses: _Tensor
    recorded: _Tensor | None = None
    checksums: _Tensor | None = None
    windows: _Tensor | None = None


def chunk_path(folder: Path, domain: int, chunk: int) -> Path:
    """The file of a chunk of a domain's windows."""
    return folder / "losses" / f"{domain:04d}" / f"{chunk:06d}.safetensors"


def to_codes(losses: NDArray[np.floating]) -> NDArray[np.uint16]:
    """Losses in nats, finite and not negative, to the nearest step; those above the grid to its last value."""
    return np.clip(np.rint(losses.astype(np.float64) * STEPS_PER_NAT), 0, _LAST_CODE).astype(np.uint16)


def from_codes(codes: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Losses in nats; exact, and `to_codes` gives the codes back."""
    return codes.astype(np.float32) / np.float32(STEPS_PER_NAT)


def clipped(losses: NDArray[np.floating]) -> int:
    """How many losses lie above the grid."""
    return int((losses > LARGEST_LOSS).sum())


def row_checksum(domain: int, window: int, row: bytes) -> int:
    """CRC-32 of a row under its domain's and its window's number."""
    return zlib.crc32(row, zlib.crc32(struct.pack("<QQ", domain, window)))


def damaged(path: Path, value: str, rule: str = "a file of token losses") -> ConfigError:
    """The error of a file of losses that cannot be used."""
    return ConfigError(Fault(str(path), value, rule, REMEDY))


@dataclass(frozen=True)
class LossFile:
    """An open file of a chunk, checked but for its rows, which are checked as they are read.

    Attributes:
        domain, chunk: their numbers.
        bits: of the windows that are recorded; bit w is window chunk * 4096 + w.
        old: whether version 0.1 wrote it.
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
        """Opens and checks a chunk's file; None where there is none.

        Raises:
            ConfigError: it cannot be read, or is none of this format and sequence length.
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
                # Without it the system reads ahead from the header on, up to 128 KiB of rows that nobody wants.
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
        """[n] the recorded windows, rising."""
        return self.chunk * CHUNK_WINDOWS + np.flatnonzero(unpack(self.bits))

    def losses(self, window: int) -> NDArray[np.float32] | None:
        """[seq] losses of a window in nats; None where it is not recorded.

        Raises:
            ConfigError: the row is damaged.
            RunError: the file cannot be read any more.
        """
        place = window - self.chunk * CHUNK_WINDOWS
        if not self.bits >> place & 1:
            return None
        row = (self.bits & ((1 << place) - 1)).bit_count()
        size = 2 * self.seq_length
        data = self._read(self.losses_at + row * size, size)
        if self.old:
            return self._checked(np.frombuffer(data, "<f2"), window)
        found = row_checksum(self.domain, window, data)
        if found != int.from_bytes(self._read(self.checksums_at + 4 * row, 4), "little"):
            raise damaged(self.path, f"the checksum {found} of window {window:,}", "rows as they were written")
        return from_codes(np.frombuffer(data, "<u2"))

    def _checked(self, row: NDArray[np.float16], window: int) -> NDArray[np.float32]:
        bad = ~(np.isfinite(row) & (row >= 0))
        if bad.any():
            value = f"window {window:,} with a loss of {row[int(np.argmax(bad))]}"
            raise damaged(self.path, value, "losses that are finite and not negative")
        return row.astype(np.float32)

    def _read(self, place: int, size: int) -> bytes:
        try:
            data = os.pread(self.descriptor, size, place)
        except OSError as error:
            raise RunError(f"{self.path} cannot be read: {error.strerror}") from error
        if len(data) < size:
            raise damaged(self.path, f"ends at byte {place + len(data):,}", "the size that it had when it was opened")
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
    places = _places(path, header, seq_length, old, size - 8 - length)
    bits_at, data = 8 + length + places["windows" if old else "recorded"], head
    count = header.losses.shape[0]
    wanted = 8 * count if old else CHUNK_WINDOWS // 8
    if len(head) < bits_at + wanted:
        data = bytes(bits_at) + os.pread(descriptor, wanted, bits_at)
    stored = data[bits_at : bits_at + wanted]
    bits = _bits_of(path, chunk, np.frombuffer(stored, "<i8")) if old else int.from_bytes(stored, "little")
    if bits.bit_count() != count:
        raise damaged(path, f"{bits.bit_count()} windows and {count} rows", "a row for each window")
    cut = header.metadata.get("clipped", "0")
    return LossFile(
        path,
        domain,
        chunk,
        descriptor,
        seq_length,
        bits,
        old,
        8 + length + places.get("checksums", 0),
        8 + length + places["losses"],
        int(cut) if cut.isascii() and cut.isdigit() and len(cut) < 19 else 0,
    )


def _places(path: Path, header: _Header, seq_length: int, old: bool, size: int) -> dict[str, int]:
    """Where each tensor begins after the header, once they are found to be those of the format, end to end."""
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
    places, end = {}, 0
    for name, (dtype, shape) in expected.items():
        places[name] = end
        end += _CELL[dtype] * int(np.prod(shape))
        found: Any = getattr(header, name)
        if found is None or (found.dtype, found.shape, found.data_offsets) != (dtype, shape, [places[name], end]):
            value = "is missing" if found is None else f"of type {found.dtype}, {found.shape} at {found.data_offsets}"
            raise damaged(path, f"{name} {value}", f"{dtype}, {shape} at {[places[name], end]}")
    if end != size:
        raise damaged(path, f"{size:,} bytes of data", f"the {end:,} bytes of its header")
    return places


def _bits_of(path: Path, chunk: int, windows: NDArray[np.int64]) -> int:
    places = windows - chunk * CHUNK_WINDOWS
    if len(windows) and ((np.diff(windows) <= 0).any() or places[0] < 0 or places[-1] >= CHUNK_WINDOWS):
        raise damaged(path, "windows out of order or of another chunk", "rising windows of this chunk")
    flags = np.zeros(CHUNK_WINDOWS, np.uint8)
    flags[places] = 1
    return pack(flags)


def pack(flags: NDArray[np.uint8]) -> int:
    """[4096] flags of a chunk's windows to bits."""
    return int.from_bytes(np.packbits(flags, bitorder="little").tobytes(), "little")


def unpack(bits: int) -> NDArray[np.uint8]:
    """Bits of a chunk's windows to [4096] flags."""
    data = bits.to_bytes(CHUNK_WINDOWS // 8, "little")
    return np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")


def all_chunks(size: int) -> Chunks:
    """All windows of a domain that has `size` of them."""
    for chunk, first in enumerate(range(0, size, CHUNK_WINDOWS)):
        yield chunk, (1 << min(CHUNK_WINDOWS, size - first)) - 1


def chunks_of(windows: Iterable[NDArray[np.int64]], size: int) -> Chunks:
    """Windows in any order, of a domain that has `size` of them, by chunk; takes a byte a window of the domain."""
    flags = np.zeros(-(-size // CHUNK_WINDOWS) * CHUNK_WINDOWS, np.uint8)
    for part in windows:
        flags[part] = 1
    packed = np.packbits(flags.reshape(-1, CHUNK_WINDOWS), axis=1, bitorder="little")
    for chunk in np.flatnonzero(packed.any(axis=1)).tolist():
        yield chunk, int.from_bytes(packed[chunk].tobytes(), "little")


def add_windows(
    folder: Path, domain: int, chunk: int, windows: NDArray[np.int64], losses: NDArray[np.floating]
) -> None:
    """Adds scored windows to a chunk's file, which is replaced as one by a rename.

    Jobs that overlap may add to one chunk: they take turns, and each keeps what the others have recorded. On a file
    system without flock the file is read again where another job has replaced it; rows that are lost in the instant
    between that look and the rename are missing to `ReferenceLosses.check`, and the next --phase score adds them.

    Args:
        windows: [n] of this chunk, rising; those that are recorded already stay as they are.
        losses: [n, seq] nats, finite and not negative.

    Raises:
        ConfigError: the file that is there is damaged.
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
    """Holds a file that others lock too, and removes it; where the file system has no locks, does nothing."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            # The holder before removes it when it is done; then this one is nobody's.
            if _is_version(path, os.fstat(descriptor)):
                break
        except OSError:
            break
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _version(path: Path) -> os.stat_result | None:
    """Tells a file from one that has replaced it; None where there is none."""
    try:
        # Opened: that is when a network file system asks its server.
        with path.open("rb") as file:
            return os.fstat(file.fileno())
    except FileNotFoundError:
        return None


def _is_version(path: Path, version: os.stat_result | None) -> bool:
    found = _version(path)
    if found is None or version is None:
        return found is version
    return os.path.samestat(found, version) and found.st_mtime_ns == version.st_mtime_ns


def _with_windows(
    folder: Path, domain: int, chunk: int, windows: NDArray[np.int64], losses: NDArray[np.floating]
) -> bytes | None:
    """What a chunk's file holds with further windows; None where it has them all."""
    with LossFile.open(folder, domain, chunk, losses.shape[1]) or contextlib.nullcontext() as file:
        if file is not None:
            new = unpack(file.bits)[windows - chunk * CHUNK_WINDOWS] == 0
            windows, losses = windows[new], losses[new]
            if not len(windows):
                return None
        codes, cut = to_codes(losses), clipped(losses)
        sums = [row_checksum(domain, w, row.tobytes()) for w, row in zip(windows.tolist(), codes, strict=True)]
        checksums = np.array(sums, np.uint32)
        if file is not None:
            count = file.bits.bit_count()
            known = file._read(file.losses_at, 2 * count * file.seq_length)
            codes = np.concatenate([np.frombuffer(known, "<u2").reshape(count, -1), codes])
            checksums = np.concatenate([np.frombuffer(file._read(file.checksums_at, 4 * count), "<u4"), checksums])
            windows, cut = np.concatenate([file.windows(), windows]), cut + file.clipped
    order = np.argsort(windows, kind="stable")
    flags = np.zeros(CHUNK_WINDOWS, np.uint8)
    flags[windows - chunk * CHUNK_WINDOWS] = 1
    assert flags.sum() == len(windows), "windows of this chunk, each once"
    tensors = {
        "recorded": np.packbits(flags, bitorder="little").view("<u8"),
        "checksums": checksums[order],
        "losses": np.ascontiguousarray(codes[order]),
    }
    return save(tensors, metadata={"clipped": str(cut)})
