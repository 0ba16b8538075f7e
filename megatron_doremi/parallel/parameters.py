"""Parameters with a spec: full shape, sharding over the tensor-parallel group, initialization.

The spec does not depend on the layout, except for padding. It determines the initial values (a function of seed and
name alone, so that every layout starts from the same model), the shard that a rank holds, and the full tensor to which
the shards of any layout are joined.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_doremi.parallel.groups import TensorGroup


@dataclass(frozen=True)
class ParameterSpec:
    """A parameter of the unsharded model.

    Attributes:
        shape: of the full tensor, without padding.
        dim: the dimension that is sharded over the tensor-parallel group; None if the parameter is replicated.
        blocks: the sharded dimension consists of this many equal blocks, each sharded separately (2 for a fused gate
            and up projection, so that each rank gets a shard of both).
        padded: length of the sharded dimension with padding, which is zero and not part of the model; 0: no padding.
        std: standard deviation of the initial values; 0: all are `constant`.
        constant: the initial value if std is 0.
    """

    shape: tuple[int, ...]
    dim: int | None = None
    blocks: int = 1
    padded: int = 0
    std: float = 0.0
    constant: float = 0.0

    @property
    def padded_length(self) -> int:
        """Length of the sharded dimension, with padding."""
        assert self.dim is not None
        return self.padded or self.shape[self.dim]

    def is_same_parameter(self, other: ParameterSpec) -> bool:
        """Whether both describe the same parameter of a model; padding, which depends on the layout, is ignored."""
        return (self.shape, self.dim, self.blocks) == (other.shape, other.dim, other.blocks)

    def local_shape(self, size: int) -> tuple[int, ...]:
        """Shape of the shard of one of `size` ranks."""
        if self.dim is None:
            return self.shape
        assert self.padded_length % (size * self.blocks) == 0, (self, size)
        shape = list(self.shape)
        shape[self.dim] = self.padded_length // size
        return tuple(shape)


def make_parameter(spec: ParameterSpec, tp_group: TensorGroup) -> nn.Parameter:
    """An uninitialized parameter that holds this rank's shard of `spec`."""
    parameter = nn.Parameter(torch.empty(spec.local_shape(tp_group.size)))
    parameter.spec = spec  # type: ignore[attr-defined]
    return parameter


def spec_of(parameter: Tensor) -> ParameterSpec:
    """The spec that `make_parameter` attached."""
    return parameter.spec  # type: ignore[attr-defined]


def shard(full: Tensor, spec: ParameterSpec, size: int, rank: int) -> Tensor:
    """The shard of `full` (shape spec.shape) that rank `rank` of `size` holds."""
    if spec.dim is None:
        return full
    padding = spec.padded_length - spec.shape[spec.dim]
    if padding:
        shape = list(spec.shape)
        shape[spec.dim] = padding
        full = torch.cat([full, full.new_zeros(shape)], dim=spec.dim)
    parts = [block.chunk(size, dim=spec.dim)[rank] for block in full.chunk(spec.blocks, dim=spec.dim)]
    return torch.cat(parts, dim=spec.dim) if len(parts) > 1 else parts[0]


def unshard(shards: Sequence[Tensor], spec: ParameterSpec) -> Tensor:
    """The full tensor, without padding, from the shards of all ranks in order."""
    if spec.dim is None:
        return shards[0]
    split = [each.chunk(spec.blocks, dim=spec.dim) for each in shards]
    blocks = [torch.cat([each[block] for each in split], dim=spec.dim) for block in range(spec.blocks)]
    return torch.cat(blocks, dim=spec.dim).narrow(spec.dim, 0, spec.shape[spec.dim])


def initial_values(spec: ParameterSpec, name: str, seed: int) -> Tensor:
    """The full tensor at the start of training, float32, as a function of seed and name alone."""
    if spec.std == 0.0:
        return torch.full(spec.shape, spec.constant)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(spec.shape).normal_(0.0, spec.std, generator=generator)


@torch.no_grad()
def initialize(module: nn.Module, prefix: str, seed: int, tp_group: TensorGroup) -> None:
    """Fills the parameters of the layer named `prefix` with this rank's shards of their initial values."""
    for name, parameter in module.named_parameters():
        spec = spec_of(parameter)
        parameter.copy_(shard(initial_values(spec, f"{prefix}.{name}", seed), spec, tp_group.size, tp_group.rank))
