"""Reading ranges of the tensors of safetensors files, by plain reads into memory of the size that is asked for.

Mapping a file into memory would count its pages as memory of the process, end the process where the file is truncated
meanwhile, and read a parallel file system page by page.
"""

from __future__ import annotations

import json
import math
import os
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_doremi.errors import MALFORMED
from megatron_doremi.storage.tensor_file import DTYPES

# Whatever is wrong with a file's content.
UNREADABLE_TENSORS = (SafetensorError, OSError, RuntimeError, *MALFORMED)
# Numbers of a tensor that are read at a time. Each thread's allocator keeps several such blocks.
BLOCK = 1 << 19
# Files that a folder's readers keep open; they open others for each read.
_KEPT_OPEN = 256


@dataclass(frozen=True)
class Place:
    """A tensor in a file.

    Attributes:
        dtype: its name in safetensors, such as "F32".
        offset: its first byte in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int


class TensorReader:
    """A safetensors file, whose header was read.

    Attributes:
        metadata: of the header.
        places: of the tensors by name.
    """

    def __init__(self, path: Path):
        """Reads the header. Raises one of `UNREADABLE_TENSORS` if the file is damaged."""
        self._path = path
        # The library checks that the header is consistent and the file as long as it says.
        with safe_open(path, framework="pt"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self.places = {
            name: Place(entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
            for name, entry in header.items()
        }

    def read(self, descriptor: int, name: str, start: int, count: int) -> Tensor:
        """[count] numbers of a flattened tensor, from number `start` on.

        Raises:
            OSError, KeyError, ValueError: the file ends before them, or they are not in it, or not of a type of
                `DTYPES`.
        """
        place = self.places[name]
        dtype = DTYPES[place.dtype]
        if not 0 <= start <= start + count <= math.prod(place.shape):
            raise ValueError(f"{name} has {math.prod(place.shape):,} numbers, not {start + count:,}")
        result = torch.empty(count, dtype=dtype)
        if count:
            memory = result.view(torch.uint8).numpy().data
            read_exactly(descriptor, memory, place.offset + start * dtype.itemsize)
        return result


def read_exactly(descriptor: int, memory: memoryview, offset: int) -> None:
    """Fills `memory` from a file. Raises OSError if the file ends before."""
    while memory:
        count = os.preadv(descriptor, [memory], offset)
        if not count:
            raise OSError(f"the file ends at byte {offset:,}, before the tensors that its header names")
        memory, offset = memory[count:], offset + count


class TensorFolder:
    """The safetensors files of a folder, opened when they are needed. Threads may share it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._readers: dict[str, TensorReader] = {}
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()
        weakref.finalize(self, _close, self._descriptors)

    def opened(self, file_name: str) -> TensorReader:
        """A file's reader. Raises one of `UNREADABLE_TENSORS` if the file is missing or damaged."""
        with self._lock:
            reader = self._readers.get(file_name)
            if reader is None:
                reader = self._readers[file_name] = TensorReader(self.folder / file_name)
            return reader

    def read(self, file_name: str, name: str, start: int, count: int) -> Tensor:
        """See `TensorReader.read`."""
        reader = self.opened(file_name)
        with self._lock:
            descriptor, kept = self._descriptors.get(file_name), len(self._descriptors) < _KEPT_OPEN
            if descriptor is None and kept:
                descriptor = self._descriptors[file_name] = _open(self.folder / file_name)
        if descriptor is not None:
            return reader.read(descriptor, name, start, count)
        descriptor = _open(self.folder / file_name)
        try:
            return reader.read(descriptor, name, start, count)
        finally:
            os.close(descriptor)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _close(descriptors: dict[str, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)
