"""Tensors of one rank on their way to a file: copied to the host at once, written whenever there is time."""

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
    """A safetensors file that is still in memory.

    Attributes:
        name: of the file.
        tensors: contiguous, on the host, and nobody else's.
        metadata: of the file's header.
    """

    name: str
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]

    def write(self, folder: Path) -> None:
        """Writes the file and makes it durable. Raises OSError or SafetensorError where that cannot be."""
        path = folder / self.name
        save_file(dict(self.tensors), path, metadata=dict(self.metadata))
        make_durable(path)


def to_host(tensor: Tensor) -> Tensor:
    """A copy in the host's memory; from a GPU it is complete after the device is synchronized."""
    tensor = tensor.detach()
    # Page-locked memory takes a copy at the bus's full rate, and torch keeps what was freed for the next time.
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return copy.copy_(tensor, non_blocking=True)
