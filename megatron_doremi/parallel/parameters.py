"""Parameters with a spec: full shape, sharding over the tensor-parallel group, initialization.

The spec does not depend on the layout, except for padding. It determines the initial values (a function of seed and
name alone, so that every layout starts from the same model), the shard that a rank holds, and the full tensor to which
the shards of any layout are joined.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megatron_doremi.parallel.groups import TensorGroup

# Initial values that are drawn at a time; a multiple of 16.
_DRAWN = 1 << 18
_MAX_THREADS = 16


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


class Span(NamedTuple):
    """Consecutive indices of the sharded dimension, in a rank's shard and in that of a rank of another layout.

    Attributes:
        local: the first in this shard.
        rank: the other layout's.
        other: the first in its shard.
        length: number of indices.
    """

    local: int
    rank: int
    other: int
    length: int


def shard_spans(spec: ParameterSpec, size: int, rank: int, other: ParameterSpec, other_size: int) -> list[Span]:
    """Where the shard that rank `rank` of `size` holds lies in the shards of `other_size` ranks, in order.

    Args:
        other: the same parameter at the other layout; its padding may differ. Padding is in no span.
    """
    assert spec.dim is not None
    spans = []
    for local, first, length in _ranges(spec, size, rank):
        for other_rank in range(other_size):
            for start, other_first, other_length in _ranges(other, other_size, other_rank):
                low = max(first, other_first)
                high = min(first + length, other_first + other_length, spec.shape[spec.dim])
                if low < high:
                    spans.append(Span(local + low - first, other_rank, start + low - other_first, high - low))
    return sorted(spans)


def _ranges(spec: ParameterSpec, size: int, rank: int) -> Iterator[tuple[int, int, int]]:
    """(first index in the shard, first index in the padded full tensor, length) of each block of a rank's shard."""
    block = spec.padded_length // spec.blocks
    length = block // size
    for number in range(spec.blocks):
        yield number * length, number * block + rank * length, length


def initial_values(spec: ParameterSpec, name: str, seed: int) -> Tensor:
    """The full tensor at the start of training, float32, as a function of seed and name alone."""
    if spec.std == 0.0:
        return torch.full(spec.shape, spec.constant)
    return torch.empty(spec.shape).normal_(0.0, spec.std, generator=_generator(name, seed))


@torch.no_grad()
def fill_initial_shard(out: Tensor, spec: ParameterSpec, name: str, seed: int, size: int, rank: int) -> None:
    """Fills `out` with the shard of `initial_values` that rank `rank` of `size` holds; memory holds a block beside it.

    torch draws 16 numbers at a time: blocks of a multiple of 16 are the numbers of one draw. A number of a uniform
    distribution takes the generator as far as one of a normal distribution, and is drawn sooner.

    Args:
        out: of the shard's shape, of any type.
    """
    unsharded = replace(spec, padded=0)
    whole = Span(0, 0, 0, spec.shape[0] if spec.shape else 1)
    spans = [whole] if spec.dim is None else shard_spans(spec, size, rank, unsharded, 1)
    dim = spec.dim or 0
    outer, inner = math.prod(spec.shape[:dim]), math.prod(spec.shape[dim + 1 :])
    row = math.prod(spec.shape[dim:])
    out.zero_()
    rows, generator = out.view(outer, -1), _generator(name, seed)
    # Blocks are parts of the only row, or complete rows.
    block = _DRAWN if outer == 1 else row * max(16, _DRAWN // row // 16 * 16)
    end = max((span.other + span.length for span in spans), default=0) * inner
    for first, count in _draws(outer * row, block):
        if outer == 1 and first >= end:
            return
        low, column = divmod(first, row)
        taken, width = (1, count) if outer == 1 else (count // row, row)
        copies = [copy for span in spans if (copy := _overlap(span, inner, column, width))]
        values = torch.empty(count)
        if spec.std == 0.0:
            values.fill_(spec.constant)
        elif copies:
            values.normal_(0.0, spec.std, generator=generator)
        else:
            values.uniform_(generator=generator)
        for to, at, length in copies:
            rows[low : low + taken, to : to + length] = values.view(taken, width)[:, at : at + length]


def _draws(total: int, block: int) -> Iterator[tuple[int, int]]:
    """(first number, number of them) of each draw; the last takes fewer than 16 that would remain with it."""
    first = 0
    while first < total:
        count = total - first if total - first < block + 16 else block
        yield first, count
        first += count


def _overlap(span: Span, inner: int, column: int, width: int) -> tuple[int, int, int] | None:
    """(first column of the shard, first column of a draw, columns) of what a draw of columns holds of a span."""
    start = span.other * inner
    low, high = max(column, start), min(column + width, start + span.length * inner)
    return (span.local * inner + low - start, low - column, high - low) if low < high else None


def _generator(name: str, seed: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def initialize(layers: Iterable[tuple[str, nn.Module]], seed: int, tp_group: TensorGroup) -> None:
    """Fills the parameters of named layers with this rank's shards of their initial values, on all cores."""
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1), thread_name_prefix="initial-values") as pool:
        drawn = [
            pool.submit(
                fill_initial_shard,
                parameter,
                spec_of(parameter),
                f"{prefix}.{name}",
                seed,
                tp_group.size,
                tp_group.rank,
            )
            for prefix, layer in layers
            for name, parameter in layer.named_parameters()
        ]
        for each in drawn:
            each.result()
