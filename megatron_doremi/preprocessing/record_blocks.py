"""Content into blocks of whole records: lines, the elements of a JSON array, the records of a CSV file.

Every byte is looked at a bounded number of times, whatever the length of a record, and no more than a block and the
record behind it is held.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator

from megatron_doremi.preprocessing.decompression import TRUNCATED, BrokenFile

# Of a block: enough to hide its way to a worker and back.
BLOCK_BYTES = 1 << 21
# The longest record; what holds more than this is not a document but a mistake, such as a missing newline.
RECORD_BYTES = 1 << 28
# Ends each element of an array in a block: JSON holds no such byte.
ELEMENT_END = b"\0"
_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
_STRUCTURE = re.compile(rb'[\[\]{},"]')


class LongLine:
    """A line of more than `RECORD_BYTES`, which was left out."""


def _and_end(parts: Iterator[bytes]) -> Iterator[tuple[bytes, BrokenFile | None]]:
    """The parts, and an empty one at the end, with the fault if the content is broken there."""
    while True:
        try:
            part = next(parts, b"")
        except BrokenFile as error:
            yield b"", error
            return
        yield part, None
        if not part:
            return


def line_blocks(parts: Iterator[bytes]) -> Iterator[bytes | LongLine]:
    """Blocks of whole lines. Raises BrokenFile where `parts` does: nobody knows how the last line continued."""
    buffer, end, too_long = bytearray(), 0, False
    for part, fault in _and_end(parts):
        rest = part
        if too_long:
            first = part.find(b"\n") + 1
            if part and not first:
                continue
            rest, too_long = part[first:], False
            yield LongLine()
        found = rest.rfind(b"\n") + 1
        if found:
            end = len(buffer) + found
        buffer += rest
        if not part and fault is None:
            end = len(buffer)  # the last line of a file needs no newline
        if end and (len(buffer) >= BLOCK_BYTES or not part):
            yield _take(buffer, end)
            end = 0
        if len(buffer) > RECORD_BYTES:
            buffer.clear()
            too_long = True
        if fault is not None:
            raise fault


def _take(buffer: bytearray, end: int) -> bytes:
    with memoryview(buffer) as view:
        data = bytes(view[:end])
    del buffer[:end]
    return data


def element_blocks(parts: Iterator[bytes]) -> Iterator[bytes]:
    """Blocks of the elements of one JSON array, each ended by `ELEMENT_END`.

    The elements themselves are not looked into: brackets and strings are followed, and the rest is left to those who
    parse. Raises BrokenFile where the content breaks off, where the array is not closed, or where text follows it.
    """
    scanner = _ArrayScanner()
    for part, fault in _and_end(parts):
        scanner.add(part)
        if scanner.end and (len(scanner.buffer) >= BLOCK_BYTES or not part):
            yield scanner.take()
        if len(scanner.buffer) > RECORD_BYTES:
            raise BrokenFile(f"an element has more than {RECORD_BYTES >> 20} MiB: a quote or bracket may be missing")
        if fault is not None:
            raise fault
    if not scanner.closed:
        raise BrokenFile(f"{TRUNCATED}: its array is not closed")
    if scanner.more:
        raise BrokenFile("text follows the end of the array")


class _ArrayScanner:
    """Follows the brackets and strings of an array; every byte is seen once.

    Attributes:
        buffer: elements, those before `end` complete.
        closed: the array's end was seen.
        more: something other than white space follows it.
    """

    def __init__(self) -> None:
        self.buffer, self.end, self.closed, self.more = bytearray(), 0, False, False
        self._depth, self._in_string, self._escape, self._elements = 0, False, b"", False

    def take(self) -> bytes:
        """The complete elements."""
        data, self.end = _take(self.buffer, self.end), 0
        return data

    def add(self, part: bytes) -> None:
        """Appends content."""
        if self.closed:
            self.more = self.more or bool(part.strip())
            return
        # NUL is not allowed in JSON, and neither is what stands for it here.
        part = self._escape + part.replace(ELEMENT_END, b"\1")
        base, place, self._escape = len(self.buffer), 0, b""
        self.buffer += part
        while place < len(part) and not self.closed:
            if self._in_string:
                match = _STRING.match(part, place)
                place = match.end() if match else place
                if part[place : place + 1] == b"\\":  # what it escapes comes with the next part
                    self._escape = part[place:]
                    del self.buffer[base + place :]
                    return
                self._in_string = place == len(part)
                place += 1
                continue
            match = _STRUCTURE.search(part, place)
            if match is None:
                return
            place = match.end()
            self._see(match.group(), base + place)
        if self.closed:
            self.more = self.more or bool(part[place:].strip())
            del self.buffer[base + place :]

    def _see(self, sign: bytes, after: int) -> None:
        if sign == b'"':
            self._in_string = True
        elif sign in b"[{":
            self._depth += 1
            if self._depth == 1:
                self.buffer[after - 1 : after] = b" "
        elif sign in b"]}":
            self._depth -= 1
            self.closed, self.more = self._depth == 0, self._depth == 0 and sign == b"}"
        if self._depth == 1 and sign == b",":
            self._elements = True
            self._complete(after)
        # An array without elements holds nothing but white space.
        elif self.closed and (self._elements or self.buffer[: after - 1].strip()):
            self._complete(after)

    def _complete(self, after: int) -> None:
        self.buffer[after - 1 : after] = ELEMENT_END
        self.end = after


def csv_blocks(parts: Iterator[bytes]) -> Iterator[bytes]:
    """The header's record, then blocks of whole records. Raises BrokenFile where `parts` does."""
    held: list[bytes] = []
    size, header = 0, True
    records = csv_records(_lines(parts))
    while True:
        fault = None
        try:
            data, _ = next(records, (b"", None))
        except BrokenFile as error:
            data, fault = b"", error
        held.append(data)
        size += len(data)
        if size and (size >= BLOCK_BYTES or header or not data):
            yield b"".join(held)
            held, size, header = [], 0, False
        if fault is not None:
            raise fault
        if not data:
            return


def _lines(parts: Iterator[bytes]) -> Iterator[bytes]:
    rest: list[bytes] = []
    size = 0
    for part in parts:
        for line in io.BytesIO(part):
            rest.append(line)
            size += len(line)
            if line.endswith(b"\n"):
                yield b"".join(rest)
                rest, size = [], 0
            elif size > RECORD_BYTES:
                raise BrokenFile(f"a line has more than {RECORD_BYTES >> 20} MiB")
    if rest:
        yield b"".join(rest)


def csv_records(lines: Iterable[bytes]) -> Iterator[tuple[bytes, list[str] | csv.Error]]:
    """(its bytes, fields as Latin-1, or what is wrong) of each record, which may be several lines.

    Latin-1 stands for any encoding of which ASCII is a part: what separates fields and records is ASCII.
    """
    csv.field_size_limit(RECORD_BYTES)
    seen: list[bytes] = []

    def feed() -> Iterator[str]:
        size = 0
        for line in lines:
            size = size + len(line) if seen else len(line)
            if size > RECORD_BYTES:
                raise BrokenFile(f"a record has more than {RECORD_BYTES >> 20} MiB: a quote may be missing")
            seen.append(line)
            yield line.decode("latin-1")

    fed = feed()
    reader = csv.reader(fed, strict=True)
    while True:
        fields: list[str] | csv.Error
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # A new reader starts at the next line.
            fields, reader = error, csv.reader(fed, strict=True)
        data = b"".join(seen)
        seen.clear()
        yield data, fields
