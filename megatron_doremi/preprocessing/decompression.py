"""The UTF-8 content of a file, plain or compressed, in parts of bounded size.

What a file is, its first bytes decide, not its name: plain text under a compressed name is read as text. A file that
ends early, a file that is damaged, and one that another program would have to convert first are told apart.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import zstandard

# Bytes of a compressed file that are decompressed at once.
COMPRESSED_BYTES = 1 << 15
# Bytes of a plain file that are read at once.
_PLAIN_BYTES = 1 << 21
# Bytes of content from which the encoding is guessed.
_SNIFFED_BYTES = 1 << 12
# Blocks of a zstd frame that are decompressed at once, at most 128 KiB each.
_ZSTD_BLOCKS = 16
_BOM = b"\xef\xbb\xbf"
_ZSTD = b"\x28\xb5\x2f\xfd"
_GZIP = b"\x1f\x8b"
# UTF-32's marks come first: its little-endian one starts like that of UTF-16.
_MARKS = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_FOREIGN = {
    b"BZh": "bzip2: decompress it with bunzip2",
    b"\xfd7zXZ\0": "xz: decompress it with unxz",
    b"PK\x03\x04": "a zip archive: unpack it",
    b"PAR1": "Parquet: name it *.parquet",
}
TRUNCATED = "the file breaks off here"


class BrokenFile(Exception):
    """A file's content ends before its time, or is damaged from here on. Says why."""


class UnreadableFile(BrokenFile):
    """A file that holds something else than it should; the fault concerns the file and no line. Says what to do."""


def text_parts(raw: BinaryIO, path: Path) -> Iterator[bytes]:
    """The content of a file without its byte order mark, in parts of at most a few megabytes.

    Raises:
        BrokenFile: where the content breaks off; all before it was handed out.
        UnreadableFile: before the first part.
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
    foreign = next((what for magic, what in _FOREIGN.items() if head.startswith(magic)), None)
    if foreign is not None:
        raise UnreadableFile(f"the file is {foreign}")
    # A file of one to three bytes may be the beginning of either.
    if head.startswith(_GZIP) or (promised == "gzip" and head == _GZIP[:1]):
        yield from _gzip_members(raw)
    elif head.startswith(_ZSTD) or _is_skippable(head) or (promised == "zstd" and head and _ZSTD.startswith(head)):
        yield from _zstandard_frames(raw)
    else:
        if promised and not _is_text(head):
            raise UnreadableFile(f"the file is neither {promised} nor text: copy it again, or give it its true name")
        while part := raw.read(_PLAIN_BYTES):
            yield part


def _is_skippable(head: bytes) -> bool:
    return len(head) >= 4 and head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5


def _is_text(head: bytes) -> bool:
    if any(head.startswith(mark) for mark in _MARKS) or _wide_encoding(head):
        return True  # said as what it is once the encoding is checked
    text = head.decode("utf-8", errors="replace")
    strange = sum(character == "\ufffd" or (character < " " and character not in "\t\n\r") for character in text)
    return strange <= len(text) // 10


def _gzip_members(raw: BinaryIO) -> Iterator[bytes]:
    # Reads a little at a time: what came before a break is handed out before the break is met.
    stream = gzip.GzipFile(fileobj=raw)
    while True:
        try:
            part = stream.read1(COMPRESSED_BYTES)
        except EOFError:
            raise BrokenFile(TRUNCATED) from None
        except (zlib.error, gzip.BadGzipFile) as error:
            raise BrokenFile(f"the file is damaged from here on (gzip: {error})") from error
        if not part:
            return
        yield part


def _zstandard_frames(raw: BinaryIO) -> Iterator[bytes]:
    """The content of all frames; complains of a frame that breaks off, which zstandard's own reader does not."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=_largest_window())
    cutter = _ZstandardCutter()
    frame, fresh = decompressor.decompressobj(), True
    while data := raw.read(COMPRESSED_BYTES):
        for piece in cutter.pieces(data):
            while piece:
                try:
                    part = frame.decompress(piece)
                except (zstandard.ZstdError, MemoryError) as error:
                    raise _zstandard_fault(error) from error
                fresh, piece = False, b""
                if frame.eof:
                    piece = frame.unused_data
                    frame, fresh = decompressor.decompressobj(), True
                if part:
                    yield part
    if not fresh:
        raise BrokenFile(TRUNCATED)


def _zstandard_fault(error: Exception) -> BrokenFile:
    said = str(error)
    if isinstance(error, MemoryError) or "memory" in said.lower():
        window = _largest_window() >> 20
        return UnreadableFile(
            f"the file was compressed with a window of more than the {window:,} MiB that this machine's free memory "
            "allows: compress it again with zstd --long=27, or use a machine with more memory"
        )
    if "ictionary" in said:
        return UnreadableFile("the file was compressed with a zstd dictionary: compress it again without one")
    return BrokenFile(f"the file is damaged from here on (zstd: {said})")


def _largest_window() -> int:
    """Bytes: zstd's own limit of 2 GiB, or the power of two in half of the free memory; at least the usual 128 MiB."""
    limit = 1 << 31
    while limit > 1 << 27 and limit > _free_memory() // 2:
        limit >>= 1
    return limit


def _free_memory() -> int:
    free = 1 << 62
    try:
        found = re.search(r"MemAvailable: *([0-9]+) kB", Path("/proc/meminfo").read_text(encoding="ascii"))
        free = int(found.group(1)) << 10 if found else free
        group = Path("/sys/fs/cgroup")
        most = (group / "memory.max").read_text(encoding="ascii").strip()
        if most.isdecimal():
            free = min(free, int(most) - int((group / "memory.current").read_text(encoding="ascii")))
    except (OSError, ValueError):
        pass  # another system, or no control groups
    return free


class _ZstandardCutter:
    """Cuts compressed bytes into pieces of a few blocks, so that no piece decompresses to more than some megabytes.

    It walks over the headers of frames and blocks alone (RFC 8878, section 3.1.1); a block of four bytes may hold
    128 KiB. The decompressor checks what the bytes say: of a file that is damaged only the sizes of pieces change.
    """

    def __init__(self) -> None:
        self._rest = b""  # the beginning of a header
        self._place = 0  # of the next header, counted from the start of what comes next
        self._in_frame = self._checksum = self._lost = False
        self._blocks = 0

    def pieces(self, data: bytes) -> Iterator[bytes]:
        """`data` in pieces."""
        buffer, before, start = self._rest + data, len(self._rest), 0
        while self._place < len(buffer) and not self._lost:
            size = self._size(buffer[self._place : self._place + 8])
            if not size:
                break
            self._place += size
            if self._blocks >= _ZSTD_BLOCKS:
                self._blocks = 0
                end = min(self._place, len(buffer)) - before
                yield data[start:end]
                start = end
        yield data[start:]
        self._rest = buffer[self._place :] if not self._lost else b""
        self._place = max(0, self._place - len(buffer))

    def _size(self, header: bytes) -> int:
        """Bytes of what starts here, a frame's header or a block; 0 where more bytes have to be seen."""
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
    """UTF-16 without a mark: every second byte of ASCII text is 0."""
    pairs = len(head) // 2
    for place, name in ((1, "UTF-16LE"), (0, "UTF-16BE")):
        if pairs >= 4 and head[place::2].count(0) > 0.4 * pairs and head[1 - place :: 2].count(0) < 0.1 * pairs:
            return name
    return ""


def _check_encoding(head: bytes) -> None:
    marked = next((name for mark, name in _MARKS.items() if head.startswith(mark)), None)
    name = marked or _wide_encoding(head)
    if name:
        raise UnreadableFile(f"the file looks like {name}: {conversion(name)}")


def conversion(encoding: str) -> str:
    """The remedy for text in another encoding than UTF-8."""
    return f"convert it with iconv -f {encoding} -t UTF-8 FILE > NEW"


def not_utf8(data: bytes) -> str:
    """What bytes that are not UTF-8 look like."""
    runs = re.findall(rb"[\x80-\xff]+", data)
    letters = [run for run in runs if len(run) == 1 and run[0] >= 0xC0]
    if len(letters) > len(runs) // 2:
        return f"the file looks like Latin-1 or Windows-1252, not UTF-8: {conversion('WINDOWS-1252')}"
    return "not UTF-8"
