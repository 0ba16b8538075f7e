"""The UTF-8 content of a plain or compressed file, in parts of bounded size.

The first bytes of a file decide its format, not its name: plain text under a compressed name is read as text. Errors
distinguish truncated files, damaged files, and files that must be converted first.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import zstandard

# Bytes of a compressed file per read.
COMPRESSED_BYTES = 1 << 15
# Bytes of a plain file per read.
_PLAIN_BYTES = 1 << 21
# Bytes of content from which the encoding is guessed.
_SNIFFED_BYTES = 1 << 12
# Blocks of a zstd frame decompressed at once; a block holds at most 128 KiB.
_ZSTD_BLOCKS = 16
_BOM = b"\xef\xbb\xbf"
_ZSTD = b"\x28\xb5\x2f\xfd"
_GZIP = b"\x1f\x8b"
# UTF-32 comes first: its little-endian byte order mark starts with that of UTF-16.
_BYTE_ORDER_MARKS = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_OTHER_FORMATS = {
    b"BZh": "bzip2: decompress it with bunzip2",
    b"\xfd7zXZ\0": "xz: decompress it with unxz",
    b"PK\x03\x04": "a zip archive: unpack it",
    b"PAR1": "Parquet: name it *.parquet",
}
TRUNCATED = "the file is truncated here"
DAMAGED = "the file is damaged from here on"


class BrokenFile(Exception):
    """The content of a file is truncated or damaged from here on. The message says how."""


class UnreadableFile(BrokenFile):
    """A file is not in the expected format: a fault of the file, not of a line. The message says what to do."""


def text_parts(raw: BinaryIO, path: Path) -> Iterator[bytes]:
    """Yields the content of a file without its byte order mark, in parts of at most a few megabytes.

    Raises:
        BrokenFile: the content is truncated or damaged; everything before that point has been yielded.
        UnreadableFile: the file is in another format or encoding; raised before the first part.
        OSError: the disk fails.
    """
    parts, head, fault = _decompressed(raw, path), b"", None
    while len(head) < _SNIFFED_BYTES:
        try:
            part = next(parts, b"")
        except BrokenFile as error:
            fault = error
            break
        if not part:
            break
        head += part
    _check_encoding(head)
    head = head.removeprefix(_BOM)
    if head:
        yield head
    if fault is not None:
        raise fault
    yield from parts


def _decompressed(raw: BinaryIO, path: Path) -> Iterator[bytes]:
    head = raw.read(_SNIFFED_BYTES)
    raw.seek(0)
    name = path.name.lower()
    promised = "zstd" if name.endswith((".zst", ".zstd")) else "gzip" if name.endswith(".gz") else ""
    other_format = next((text for magic, text in _OTHER_FORMATS.items() if head.startswith(magic)), None)
    if other_format is not None:
        raise UnreadableFile(f"the file is {other_format}")
    # A file of one to three bytes may be a truncated header.
    if head.startswith(_GZIP) or (promised == "gzip" and head == _GZIP[:1]):
        yield from _gzip_members(raw)
    elif head.startswith(_ZSTD) or _is_skippable(head) or (promised == "zstd" and head and _ZSTD.startswith(head)):
        yield from _zstandard_frames(raw)
    else:
        if promised and not _is_text(head):
            raise UnreadableFile(f"the file is neither {promised} nor text: copy it again, or correct its suffix")
        while part := raw.read(_PLAIN_BYTES):
            yield part


def _is_skippable(head: bytes) -> bool:
    return len(head) >= 4 and head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5


def _is_text(head: bytes) -> bool:
    if any(head.startswith(mark) for mark in _BYTE_ORDER_MARKS) or _wide_encoding(head):
        return True  # text in another encoding, which _check_encoding reports
    text = head.decode("utf-8", errors="replace")
    not_text = sum(character == "\ufffd" or (character < " " and character not in "\t\n\r") for character in text)
    return not_text <= len(text) // 10


def _gzip_members(raw: BinaryIO) -> Iterator[bytes]:
    # Small reads: all content before a truncation is yielded before the error is raised.
    stream = gzip.GzipFile(fileobj=raw)
    while True:
        try:
            part = stream.read1(COMPRESSED_BYTES)
        except EOFError:
            raise BrokenFile(TRUNCATED) from None
        except (zlib.error, gzip.BadGzipFile) as error:
            raise BrokenFile(f"{DAMAGED} (gzip: {error})") from error
        if not part:
            return
        yield part


def _zstandard_frames(raw: BinaryIO) -> Iterator[bytes]:
    """Yields the content of all frames. Detects a truncated frame, which zstandard's own reader does not."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=_max_window())
    splitter = _FrameSplitter()
    frame, at_frame_start = decompressor.decompressobj(), True
    while data := raw.read(COMPRESSED_BYTES):
        for piece in splitter.pieces(data):
            while piece:
                try:
                    part = frame.decompress(piece)
                except (zstandard.ZstdError, MemoryError) as error:
                    raise _zstandard_fault(error) from error
                at_frame_start, piece = False, b""
                if frame.eof:
                    piece = frame.unused_data
                    frame, at_frame_start = decompressor.decompressobj(), True
                if part:
                    yield part
    if not at_frame_start:
        raise BrokenFile(TRUNCATED)


def _zstandard_fault(error: Exception) -> BrokenFile:
    message = str(error)
    if isinstance(error, MemoryError) or "memory" in message.lower():
        window = _max_window() >> 20
        return UnreadableFile(
            f"the file was compressed with a window larger than the {window:,} MiB that this machine's free memory "
            "allows: compress it again with zstd --long=27, or use a machine with more memory"
        )
    if "ictionary" in message:
        return UnreadableFile("the file was compressed with a zstd dictionary: compress it again without one")
    return BrokenFile(f"{DAMAGED} (zstd: {message})")


def _max_window() -> int:
    """Returns the largest window that we accept, in bytes: the largest power of two within half of the free memory, at
    least zstd's usual 128 MiB, at most its limit of 2 GiB."""
    limit = 1 << 31
    while limit > 1 << 27 and limit > _free_memory() // 2:
        limit >>= 1
    return limit


def _free_memory() -> int:
    free = 1 << 62
    try:
        available = re.search(r"MemAvailable: *([0-9]+) kB", Path("/proc/meminfo").read_text(encoding="ascii"))
        free = int(available.group(1)) << 10 if available else free
        cgroup = Path("/sys/fs/cgroup")
        limit = (cgroup / "memory.max").read_text(encoding="ascii").strip()
        if limit.isdecimal():
            free = min(free, int(limit) - int((cgroup / "memory.current").read_text(encoding="ascii")))
    except (OSError, ValueError):
        pass  # not Linux, or no control groups
    return free


class _FrameSplitter:
    """Splits compressed bytes into pieces of a few blocks, so that no piece decompresses to more than a few megabytes.

    A block of four bytes may hold 128 KiB, so the compressed size bounds nothing. This class only follows the headers
    of frames and blocks (RFC 8878, section 3.1.1). Verifying the bytes is the decompressor's job: in a damaged file the
    sizes of the pieces change, nothing else.
    """

    def __init__(self) -> None:
        self._partial_header = b""
        self._next_header = 0  # its offset within the partial header and the bytes to come
        self._in_frame = self._checksum = self._lost = False
        self._blocks = 0

    def pieces(self, data: bytes) -> Iterator[bytes]:
        """Yields `data` in pieces."""
        buffer, before, start = self._partial_header + data, len(self._partial_header), 0
        while self._next_header < len(buffer) and not self._lost:
            size = self._size(buffer[self._next_header : self._next_header + 8])
            if not size:
                break
            self._next_header += size
            if self._blocks >= _ZSTD_BLOCKS:
                self._blocks = 0
                end = min(self._next_header, len(buffer)) - before
                yield data[start:end]
                start = end
        yield data[start:]
        self._partial_header = buffer[self._next_header :] if not self._lost else b""
        self._next_header = max(0, self._next_header - len(buffer))

    def _size(self, header: bytes) -> int:
        """Returns the bytes of the frame header or block that starts here, or 0 if `header` is too short to tell."""
        if self._in_frame:
            if len(header) < 3:
                return 0
            word = int.from_bytes(header[:3], "little")
            self._blocks += 1
            self._in_frame = not word & 1
            size = 3 + (1 if word >> 1 & 3 == 1 else word >> 3)
            return size + (4 if self._checksum and not self._in_frame else 0)
        if _is_skippable(header):
            return 8 + int.from_bytes(header[4:], "little") if len(header) == 8 else 0
        if len(header) < 5:
            return 0
        self._lost = not header.startswith(_ZSTD)
        flags = header[4]
        single = flags >> 5 & 1
        self._in_frame, self._checksum = True, bool(flags >> 2 & 1)
        return 5 + (1 - single) + (0, 1, 2, 4)[flags & 3] + (single, 2, 4, 8)[flags >> 6]


def _wide_encoding(head: bytes) -> str:
    """Detects UTF-16 without a byte order mark by its zeros: every second byte of ASCII text is 0."""
    pairs = len(head) // 2
    for zeros, name in ((1, "UTF-16LE"), (0, "UTF-16BE")):
        if pairs >= 4 and head[zeros::2].count(0) > 0.4 * pairs and head[1 - zeros :: 2].count(0) < 0.1 * pairs:
            return name
    return ""


def _check_encoding(head: bytes) -> None:
    marked = next((name for mark, name in _BYTE_ORDER_MARKS.items() if head.startswith(mark)), None)
    name = marked or _wide_encoding(head)
    if name:
        raise UnreadableFile(f"the file looks like {name}: {conversion(name)}")


def conversion(encoding: str) -> str:
    """Returns the remedy for text in an encoding other than UTF-8."""
    return f"convert it with iconv -f {encoding} -t UTF-8 FILE > NEW"


def not_utf8(data: bytes) -> str:
    """Describes bytes that are not UTF-8, with a guess of their encoding."""
    runs = re.findall(rb"[\x80-\xff]+", data)
    letters = [run for run in runs if len(run) == 1 and run[0] >= 0xC0]
    if len(letters) > len(runs) // 2:
        return f"the file looks like Latin-1 or Windows-1252, not UTF-8: {conversion('WINDOWS-1252')}"
    return "not UTF-8"
