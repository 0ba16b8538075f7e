"""A rank's tensors for one file: copied to host memory first, written later in the background."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_doremi.storage.files import make_durable


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

    def write(self, folder: Path) -> None:
        """Writes the file and makes it durable. Raises OSError or SafetensorError on failure."""
        path = folder / self.name
        save_file(dict(self.tensors), path, metadata=dict(self.metadata))
        make_durable(path)


def to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory. From a GPU the copy is asynchronous: synchronize the device before reading the copy."""
    tensor = tensor.detach()
    # Copies to pinned memory run at full bus bandwidth; torch caches freed pinned memory for the next copy.
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return copy.copy_(tensor, non_blocking=True)
