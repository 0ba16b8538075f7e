"""Where the weights of a model come from: a checkpoint of this program at any layout, or a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from megatron_doremi.parallel.parameters import ParameterSpec
from megatron_doremi.parallel.topology import Topology


class Weights(Protocol):
    """Parameters of this program by name, read one at a time: `WeightsFolder` or `HuggingFaceWeights`."""

    def names(self) -> set[str]:
        """Names of the parameters."""

    def spec(self, name: str) -> ParameterSpec:
        """A parameter's full shape, and how it is sharded."""

    def dtype(self, name: str) -> torch.dtype:
        """The type in which a parameter is stored."""

    def full(self, name: str) -> Tensor:
        """A parameter, unsharded and without padding."""

    def local_shard(self, name: str, spec: ParameterSpec, topology: Topology) -> Tensor:
        """The shard of a parameter that a rank of `topology` holds."""

    def blocks(
        self, name: str, spec: ParameterSpec, topology: Topology, start: int, count: int
    ) -> Iterator[tuple[int, Tensor]]:
        """A range of the flattened shard of a parameter that a rank of `topology` holds, a block at a time.

        Yields:
            (first number of the block, its values) in order.

        Raises:
            ConfigError: the parameter is missing or of another shape, or a file is damaged.
        """
