"""Splits content into blocks of complete records: lines, elements of a JSON array, or CSV records.

Run time is linear in the size of the content, regardless of the length of records. Memory holds at most one block and
the record after it.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator

from megatron_doremi.preprocessing.decompression import TRUNCATED, BrokenFile

# Target size of a block: large enough to hide the transfer to a worker and back.
BLOCK_BYTES = 1 << 21
# Maximum size of a record; a longer one is a mistake, such as a missing newline.
RECORD_BYTES = 1 << 28
# Terminates each array element in a block; this byte cannot occur in JSON.
ELEMENT_END = b"\0"
_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
_STRUCTURE = re.compile(rb'[\[\]{},"]')


class LongLine:
    """Stands for a skipped line of more than `RECORD_BYTES`."""


def _with_end(parts: Iterator[bytes]) -> Iterator[tuple[bytes, BrokenFile | None]]:
    """Yields (part, None) for each part, then (b"", fault): None if the content is complete, else why it is broken."""
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
    """Yields blocks of complete lines. Raises BrokenFile when `parts` does, and drops the incomplete last line."""
    buffer, end, too_long = bytearray(), 0, False
    for part, fault in _with_end(parts):
        rest = part
        if too_long:
            line_end = part.find(b"\n") + 1
            if part and not line_end:
                continue
            rest, too_long = part[line_end:], False
            yield LongLine()
        last_line_end = rest.rfind(b"\n") + 1
        if last_line_end:
            end = len(buffer) + last_line_end
        buffer += rest
        if not part and fault is None:
            end = len(buffer)  # the last line of a file may have no newline
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
    """Yields blocks of the elements of one JSON array, each terminated by `ELEMENT_END`.

    Only brackets and strings are tracked; parsing the elements is the caller's job. Raises BrokenFile when `parts`
    does, and if the array is not closed or text follows it.
    """
    scanner = _ArrayScanner()
    for part, fault in _with_end(parts):
        scanner.add(part)
        if scanner.end and (len(scanner.buffer) >= BLOCK_BYTES or not part):
            yield scanner.take()
        if len(scanner.buffer) > RECORD_BYTES:
            raise BrokenFile(f"an element exceeds {RECORD_BYTES >> 20} MiB: a quote or bracket may be missing")
        if fault is not None:
            raise fault
    if not scanner.closed:
        raise BrokenFile(f"{TRUNCATED}: its array is not closed")
    if scanner.text_after:
        raise BrokenFile("text follows the end of the array")


class _ArrayScanner:
    """Tracks the brackets and strings of an array; scans every byte once.

    Attributes:
        buffer: the elements read so far; those before `end` are complete.
        closed: whether the array's closing bracket was read.
        text_after: whether anything but white space follows it.
    """

    def __init__(self) -> None:
        self.buffer, self.end, self.closed, self.text_after = bytearray(), 0, False, False
        self._depth, self._in_string, self._escape, self._has_elements = 0, False, b"", False

    def take(self) -> bytes:
        """Removes and returns the complete elements."""
        data, self.end = _take(self.buffer, self.end), 0
        return data

    def add(self, part: bytes) -> None:
        """Appends content."""
        if self.closed:
            self.text_after = self.text_after or bool(part.strip())
            return
        # JSON allows no NUL. Its replacement is just as invalid, so the element stays a parse error.
        part = self._escape + part.replace(ELEMENT_END, b"\1")
        base, position, self._escape = len(self.buffer), 0, b""
        self.buffer += part
        while position < len(part) and not self.closed:
            if self._in_string:
                match = _STRING.match(part, position)
                position = match.end() if match else position
                if part[position : position + 1] == b"\\":  # the escaped character is in the next part
                    self._escape = part[position:]
                    del self.buffer[base + position :]
                    return
                self._in_string = position == len(part)
                position += 1
                continue
            match = _STRUCTURE.search(part, position)
            if match is None:
                return
            position = match.end()
            self._track(match.group(), base + position)
        if self.closed:
            self.text_after = self.text_after or bool(part[position:].strip())
            del self.buffer[base + position :]

    def _track(self, symbol: bytes, end: int) -> None:
        """Updates the state for a structural character that ends at `end` in the buffer."""
        if symbol == b'"':
            self._in_string = True
        elif symbol in b"[{":
            self._depth += 1
            if self._depth == 1:
                self.buffer[end - 1 : end] = b" "
        elif symbol in b"]}":
            self._depth -= 1
            self.closed, self.text_after = self._depth == 0, self._depth == 0 and symbol == b"}"
        if self._depth == 1 and symbol == b",":
            self._has_elements = True
            self._end_element(end)
        # An empty array holds only white space, which is not an element.
        elif self.closed and (self._has_elements or self.buffer[: end - 1].strip()):
            self._end_element(end)

    def _end_element(self, end: int) -> None:
        self.buffer[end - 1 : end] = ELEMENT_END
        self.end = end


def csv_blocks(parts: Iterator[bytes]) -> Iterator[bytes]:
    """Yields the header record, then blocks of complete records. Raises BrokenFile when `parts` does."""
    pending: list[bytes] = []
    size, header = 0, True
    records = csv_records(_lines(parts))
    while True:
        fault = None
        try:
            data, _ = next(records, (b"", None))
        except BrokenFile as error:
            data, fault = b"", error
        pending.append(data)
        size += len(data)
        if size and (size >= BLOCK_BYTES or header or not data):
            yield b"".join(pending)
            pending, size, header = [], 0, False
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
                raise BrokenFile(f"a line exceeds {RECORD_BYTES >> 20} MiB")
    if rest:
        yield b"".join(rest)


def csv_records(lines: Iterable[bytes]) -> Iterator[tuple[bytes, list[str] | csv.Error]]:
    """Yields (bytes, fields or error) for each record, which may span several lines.

    Fields are decoded as Latin-1, which maps every byte to a character: separators are ASCII, so the encoding of the
    text does not matter here.
    """
    csv.field_size_limit(RECORD_BYTES)
    record_lines: list[bytes] = []

    def decoded_lines() -> Iterator[str]:
        size = 0
        for line in lines:
            size = size + len(line) if record_lines else len(line)
            if size > RECORD_BYTES:
                raise BrokenFile(f"a record exceeds {RECORD_BYTES >> 20} MiB: a quote may be missing")
            record_lines.append(line)
            yield line.decode("latin-1")

    source = decoded_lines()
    reader = csv.reader(source, strict=True)
    while True:
        fields: list[str] | csv.Error
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # A reader cannot continue after an error; a new one starts at the next line.
            fields, reader = error, csv.reader(source, strict=True)
        data = b"".join(record_lines)
        record_lines.clear()
        yield data, fields
