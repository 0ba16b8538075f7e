"""Writing tensors: those of a rank, copied to host memory first and written later; or many, one at a time."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path

import torch
from torch import Tensor

from megatron_doremi.storage.files import sync_and_close


@dataclass(frozen=True)
class TensorFile:
    """The content of a safetensors file, in host memory.

    Attributes:
        name: file name.
        tensors: contiguous host tensors that share no memory with others.
        metadata: of the file's header.
    """

    name: str
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]

    def write(self, folder: Path) -> str:
        """Writes the file, makes it durable and returns its SHA-256, in hex. Raises OSError on failure."""
        entries = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors.items()}
        return write_tensors(folder / self.name, entries, self.tensors.values(), self.metadata)


def to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory. From a GPU the copy is asynchronous: synchronize the device before reading the copy."""
    tensor = tensor.detach()
    # Copies to pinned memory run at full bus bandwidth; torch caches freed pinned memory for the next copy.
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return copy.copy_(tensor, non_blocking=True)


# Bytes that are hashed and written at a time: they are still in the cache when they are written.
_BLOCK = 1 << 20
# safetensors' names of the types that models are stored in.
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def tensor_bytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Bytes of a tensor in a file."""
    return math.prod(shape) * dtype.itemsize


def write_tensors(
    path: Path,
    entries: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    tensors: Iterable[Tensor],
    metadata: Mapping[str, str],
) -> str:
    """Writes a safetensors file one tensor after the other, so that memory holds one at a time, and makes it durable.

    The library's own writer takes all tensors of a file at once.

    Args:
        entries: dtype and shape of each tensor by name, in the order of `tensors`.
        tensors: made when their turn comes; each is cast to the dtype of its entry.

    Returns:
        the file's SHA-256, in hex.

    Raises:
        OSError: the disk is full or fails; names the file.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in entries.items():
        start, end = end, end + tensor_bytes(dtype, shape)
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    # The data begin at a multiple of 8 bytes.
    text += b" " * (-len(text) % 8)
    try:
        return _write(path, struct.pack("<Q", len(text)) + text, entries, tensors)
    except OSError as error:
        # A failed write names no file.
        error.filename = str(path)
        raise


def _write(
    path: Path, header: bytes, entries: Mapping[str, tuple[torch.dtype, Sequence[int]]], tensors: Iterable[Tensor]
) -> str:
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        _write_block(file, digest, memoryview(header))
        for (name, (dtype, shape)), tensor in zip(entries.items(), tensors, strict=True):
            assert tuple(tensor.shape) == tuple(shape), (name, tensor.shape, shape)
            flat = tensor.detach().to("cpu", dtype).contiguous().view(-1)
            data = flat.view(torch.uint8).numpy().data
            for start in range(0, len(data), _BLOCK):
                _write_block(file, digest, data[start : start + _BLOCK])
        sync_and_close(file)
    return digest.hexdigest()


def _write_block(file: RawIOBase, digest: hashlib._Hash, data: memoryview) -> None:
    digest.update(data)
    while data:
        # Less may be written than is given.
        data = data[file.write(data) or 0 :]
