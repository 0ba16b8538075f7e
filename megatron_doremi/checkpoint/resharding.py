"""Reading tensors at another layout than the one that wrote them; shared by weights and optimizer state.

Files hold the shards of the layout that wrote them and record how each parameter was sharded. If the sharding is the
same, a reader takes its shard as it is; otherwise it joins the shards and splits the full tensor again.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import model_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from megatron_doremi.errors import MALFORMED, ConfigError, Fault
from megatron_doremi.parallel.deepspeed_internals import is_tied_copy
from megatron_doremi.parallel.parameters import ParameterSpec, shard, spec_of, unshard
from megatron_doremi.parallel.topology import Topology
from megatron_doremi.storage.formats import Count, Positive, Schema


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


class ShardedFolder:
    """Sharded tensors in a folder of safetensors files; base of `WeightsFolder` and `OptimizerFolder`."""

    def __init__(self, folder: Path, subject: str, remedy: str):
        """
        Args:
            subject: content of the files, for messages.
            remedy: what the user can do if the files are damaged.
        """
        self.folder, self._subject, self._remedy = folder, f"{subject} in {folder}", remedy
        self._sharding: dict[str, ShardingEntry] = {}

    def _error(self, value: str, rule: str) -> ConfigError:
        return ConfigError(Fault(self._subject, value, rule, self._remedy))

    @contextlib.contextmanager
    def _opened(self, file_name: str, rule: str) -> Iterator[Any]:
        """Opens a file for reading. Raises ConfigError for whatever is wrong with its content."""
        try:
            with safe_open(self.folder / file_name, framework="pt") as file:
                yield file
        except (SafetensorError, OSError, RuntimeError, *MALFORMED) as error:
            raise self._error(f"{file_name}: {error}", rule) from error

    def _read_local(
        self,
        name: str,
        spec: ParameterSpec,
        topology: Topology,
        start: int,
        count: int,
        read: Callable[[int, int, int], Tensor],
    ) -> Tensor:
        """Reads a range of this rank's flattened shard of a tensor, at this rank's layout.

        Args:
            name: of the parameter.
            spec: the parameter's, at this layout; its padding may differ from that of the layout that wrote it.
            read: reads (tensor rank, start, count) of the flattened shard that a rank of the writing layout held.

        Returns:
            [count].

        Raises:
            ConfigError: the parameter is missing, or of another shape.
        """
        written = self._sharding.get(name)
        if written is None or not written.spec().is_same_parameter(spec):
            actual = "missing" if written is None else f"shape {written.spec().shape}"
            raise self._error(f"{name}: {actual}", f"shape {spec.shape}, as in the model")
        if spec.dim is None:
            return read(0, start, count)
        shape = written.local_shape()
        if written.size == topology.tensor_size and shape == spec.local_shape(topology.tensor_size):
            return read(topology.tensor_rank, start, count)
        shards = [read(rank, 0, math.prod(shape)).view(shape) for rank in range(written.size)]
        local = shard(unshard(shards, written.spec()), spec, topology.tensor_size, topology.tensor_rank)
        return local.reshape(-1).narrow(0, start, count)
