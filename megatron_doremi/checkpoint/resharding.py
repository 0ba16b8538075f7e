"""Reading tensors at another layout than the one that wrote them; shared by weights and optimizer state.

Files hold the shards of the layout that wrote them and record how each parameter was sharded. A reader takes, from each
of them, the numbers that its own shard holds, a block at a time: memory holds neither a file nor a full tensor.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import model_validator
from torch import Tensor, nn

from megatron_doremi.errors import ConfigError, Fault
from megatron_doremi.parallel.deepspeed_internals import is_tied_copy
from megatron_doremi.parallel.parameters import ParameterSpec, Span, shard_spans, spec_of
from megatron_doremi.parallel.topology import Topology
from megatron_doremi.storage.formats import Count, Positive, Schema
from megatron_doremi.storage.tensor_reader import BLOCK, UNREADABLE_TENSORS, TensorFolder, TensorReader

# Reads (tensor rank, start, count): a range of the flattened shard that a rank of the writing layout held.
ReadShard = Callable[[int, int, int], Tensor]
# Numbers of a row that are read on their own; fewer are read with what lies between them and those of the next row.
_LONG_ROW = 1 << 11


class ShardingEntry(Schema):
    """How a parameter was sharded, as files record it.

    Attributes:
        shape, dim, blocks, padded: as in `ParameterSpec`.
        size: number of tensor-parallel ranks.
    """

    shape: list[Positive]
    dim: int | None
    blocks: Positive
    padded: Count
    size: Positive

    @model_validator(mode="after")
    def _splits_evenly(self) -> ShardingEntry:
        if self.dim is not None:
            if not 0 <= self.dim < len(self.shape):
                raise ValueError(f"dim must be a dimension of shape {self.shape}")
            length = self.padded or self.shape[self.dim]
            if length < self.shape[self.dim] or length % (self.size * self.blocks):
                raise ValueError(f"dimension {self.dim} must split evenly into size x blocks")
        return self

    def spec(self) -> ParameterSpec:
        """The parameter at the layout that wrote it, without its initial values."""
        return ParameterSpec(tuple(self.shape), self.dim, self.blocks, self.padded)

    def local_shape(self) -> tuple[int, ...]:
        """Shape of one shard."""
        return self.spec().local_shape(self.size)


def sharding_entry(parameter: nn.Parameter, topology: Topology) -> dict[str, Any]:
    """The record of a parameter in a file; see `spec_entry`."""
    return spec_entry(spec_of(parameter), topology.tensor_size)


def spec_entry(spec: ParameterSpec, tensor_size: int) -> dict[str, Any]:
    """A `ShardingEntry` of a parameter on `tensor_size` ranks, and how the parameter was initialized."""
    return {
        "shape": list(spec.shape),
        "dim": spec.dim,
        "blocks": spec.blocks,
        "padded": spec.padded,
        "std": spec.std,
        "constant": spec.constant,
        "size": tensor_size,
    }


def writes_parameter(parameter: nn.Parameter, topology: Topology) -> bool:
    """Whether this rank writes its shard of a parameter: if several ranks of a replica hold copies, one writes."""
    return not is_tied_copy(parameter) and (spec_of(parameter).dim is not None or topology.tensor_rank == 0)


def read_reshaped(
    written: ParameterSpec, size: int, spec: ParameterSpec, topology: Topology, start: int, count: int, read: ReadShard
) -> Tensor:
    """Reads a range of this rank's flattened shard of a parameter that another layout wrote.

    Args:
        written: the parameter's, at the layout that wrote it; its padding may differ.
        size: tensor parallel ranks of that layout.
        spec: the parameter's, at this layout.

    Returns:
        [count]; padding is 0.
    """
    shape = spec.local_shape(topology.tensor_size)
    if spec.dim is None:
        return read(0, start, count)
    if size == topology.tensor_size and shape == written.local_shape(size):
        return read(topology.tensor_rank, start, count)
    inner = math.prod(shape[spec.dim + 1 :])
    spans = [
        Span(each.local * inner, each.rank, each.other * inner, each.length * inner)
        for each in shard_spans(spec, topology.tensor_size, topology.tensor_rank, written, size)
    ]
    row, other_row = shape[spec.dim] * inner, written.local_shape(size)[spec.dim] * inner
    parts = []
    # A part of the first row, rows, a part of the last row: [first row, rows, first column, columns].
    while count:
        first, column = divmod(start, row)
        rows, columns = (1, min(row - column, count)) if column or count < row else (count // row, row)
        parts.append(_read_rows(spans, other_row, first, rows, column, columns, read).view(-1))
        start, count = start + rows * columns, count - rows * columns
    return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.empty(0)


def _read_rows(
    spans: list[Span], other_row: int, first: int, rows: int, column: int, columns: int, read: ReadShard
) -> Tensor:
    """[rows, columns] of a shard, seen as rows that all shards have: this one's consist of `spans` of theirs."""
    result: Tensor | None = None
    for span in spans:
        low, high = max(column, span.local), min(column + columns, span.local + span.length)
        if low >= high:
            continue
        width, other = high - low, span.other + low - span.local
        at_once = rows if width == other_row else 1 if width >= _LONG_ROW else max(1, BLOCK // other_row)
        for done in range(0, rows, at_once):
            taken = min(at_once, rows - done)
            values = read(span.rank, (first + done) * other_row + other, (taken - 1) * other_row + width)
            if result is None:
                result = values.new_zeros(rows, columns)
            part = values.as_strided((taken, width), (other_row, 1))
            result[done : done + taken, low - column : high - column] = part
    return torch.zeros(rows, columns) if result is None else result


class ShardedFolder:
    """Sharded tensors in a folder of safetensors files; base of `WeightsFolder` and `OptimizerFolder`."""

    def __init__(self, folder: Path, subject: str, remedy: str):
        """
        Args:
            subject: content of the files, for messages.
            remedy: what the user can do if the files are damaged.
        """
        self.folder, self._subject, self._remedy = folder, f"{subject} in {folder}", remedy
        self._files_opened = TensorFolder(folder)
        self._sharding: dict[str, ShardingEntry] = {}

    def _error(self, value: str, rule: str) -> ConfigError:
        return ConfigError(Fault(self._subject, value, rule, self._remedy))

    @contextlib.contextmanager
    def _opened(self, file_name: str, rule: str) -> Iterator[TensorReader]:
        """A file's header. Raises ConfigError for whatever is wrong with its content."""
        try:
            yield self._files_opened.opened(file_name)
        except UNREADABLE_TENSORS as error:
            raise self._error(f"{file_name}: {error}", rule) from error

    def _read_file(self, file_name: str, name: str, start: int, count: int, rule: str) -> Tensor:
        """[count] numbers of a flattened tensor of a file. Raises ConfigError for whatever is wrong with it."""
        try:
            return self._files_opened.read(file_name, name, start, count)
        except UNREADABLE_TENSORS as error:
            raise self._error(f"{file_name}: {error}", rule) from error

    def _read_local(
        self, name: str, spec: ParameterSpec, topology: Topology, start: int, count: int, read: ReadShard
    ) -> Tensor:
        """Reads a range of this rank's flattened shard of a tensor, at this rank's layout.

        Args:
            name: of the parameter.
            spec: the parameter's, at this layout; its padding may differ from that of the layout that wrote it.

        Returns:
            [count].

        Raises:
            ConfigError: the parameter is missing, or of another shape.
        """
        written = self._sharding.get(name)
        if written is None or not written.spec().is_same_parameter(spec):
            actual = "missing" if written is None else f"shape {written.spec().shape}"
            raise self._error(f"{name}: {actual}", f"shape {spec.shape}, as in the model")
        return read_reshaped(written.spec(), written.size, spec, topology, start, count, read)


def ranges(start: int, count: int) -> Iterator[tuple[int, int]]:
    """(start, count) of consecutive blocks of a range of numbers."""
    for low in range(start, start + count, BLOCK):
        yield low, min(BLOCK, start + count - low)
