"""The optimizer's state on disk, layout-independent: moments and master weights, parameter by parameter.

DeepSpeed's own files hold flat partitions, which only the layout that wrote them can read, and are pickles. Here each
rank writes, for every parameter, the piece whose state it owns (under ZeRO a range of its flattened shard), and an
index records where each piece is. A reader takes the pieces that cover what it owns at its own layout.

    optimizer/rank-00003.safetensors   "NAME/exp_avg", "NAME/exp_avg_sq" and, where the model trains in less than
                                       float32, "NAME/master": float32 vectors, one for each piece
    optimizer/index.json               sharding and pieces of each parameter; written last
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from pydantic import Strict, model_validator
from torch import Tensor, nn

from megatron_doremi.checkpoint.filling import fill
from megatron_doremi.checkpoint.resharding import (
    ShardedFolder,
    ShardingEntry,
    ranges,
    sharding_entry,
    writes_parameter,
)
from megatron_doremi.parallel.deepspeed_internals import flat_partitions, owned_piece, torch_state, wraps_optimizer
from megatron_doremi.parallel.parameters import ParameterSpec
from megatron_doremi.parallel.topology import Topology
from megatron_doremi.storage.files import atomic_write_text
from megatron_doremi.storage.formats import Count, Name, Schema, read_checked, sealed
from megatron_doremi.storage.tensor_file import TensorFile, to_host

MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "master"
_PIECES = "pieces"
_RULE = "the complete state of every parameter"
_REMEDY = "delete this checkpoint to resume from an older one, or copy it again"


@dataclass(frozen=True)
class OwnedState:
    """The piece of one parameter's optimizer state that this rank owns.

    Attributes:
        name: of the parameter in the full model.
        parameter: this rank's shard of it.
        start: first element of the piece within that shard, flattened.
        tensors: {key: the piece}, vectors that share the optimizer's memory; MASTER only if the optimizer keeps
            master weights.
    """

    name: str
    parameter: nn.Parameter
    start: int
    tensors: dict[str, Tensor]

    @property
    def count(self) -> int:
        return len(self.tensors[MOMENTS[0]])


def start_state(engine: DeepSpeedEngine, steps: int) -> None:
    """Creates the state that the optimizer creates at its first step, with zero moments and a step count of `steps`."""
    for flat in flat_partitions(engine):
        state = torch_state(engine, flat)
        state["step"] = torch.tensor(float(steps), dtype=torch.float32, device=flat.device)
        for key in MOMENTS:
            state[key] = torch.zeros_like(flat)


def owned_state(engine: DeepSpeedEngine, data_rank: int) -> Iterator[OwnedState]:
    """The state that this rank owns, by parameter; it must exist (after an optimizer step or `start_state`)."""
    flats = flat_partitions(engine)
    for name, parameter in engine.module.model_parameters():
        piece = owned_piece(engine, parameter, data_rank, flats)
        if piece is None:
            continue
        state = torch_state(engine, piece.flat)
        full = {key: state[key] for key in MOMENTS} | ({MASTER: piece.flat} if piece.is_master else {})
        yield OwnedState(name, parameter, piece.start, {key: piece.of(tensor) for key, tensor in full.items()})


def optimizer_file(engine: DeepSpeedEngine, topology: Topology) -> TensorFile:
    """Copies the state that this rank owns to host memory; if several ranks hold copies, only one writes."""
    sharded = wraps_optimizer(engine)
    tensors: dict[str, Tensor] = {}
    pieces: dict[str, dict[str, Any]] = {}
    for owned in owned_state(engine, topology.data_rank):
        if not writes_parameter(owned.parameter, topology) or (topology.data_rank and not sharded):
            continue
        for key, tensor in owned.tensors.items():
            # Float32 weights are their own master weights.
            if key != MASTER or owned.parameter.dtype != torch.float32:
                tensors[f"{owned.name}/{key}"] = to_host(tensor)
        piece = [topology.tensor_rank, owned.start, owned.count]
        pieces[owned.name] = {**sharding_entry(owned.parameter, topology), "piece": piece}
    return TensorFile(f"rank-{topology.rank:05d}.safetensors", tensors, {_PIECES: json.dumps(pieces)})


def index_part(file: TensorFile) -> dict[str, Any]:
    """The part of the index that describes one rank's file: its name, its keys, its piece of each parameter."""
    keys = sorted({name.rsplit("/", 1)[1] for name in file.tensors})
    return {"file": file.name, "keys": keys, _PIECES: json.loads(file.metadata[_PIECES])}


def write_index(folder: Path, parts: Sequence[Mapping[str, Any]]) -> Path:
    """Writes the index of a folder from the `index_part` of every rank; returns its path."""
    parameters: dict[str, dict[str, Any]] = {}
    for part in parts:
        for name, described in part[_PIECES].items():
            sharding = {key: value for key, value in described.items() if key != "piece"}
            parameter = parameters.setdefault(name, {**sharding, "pieces": []})
            parameter["pieces"].append([part["file"], *described["piece"]])
    keys = sorted({key for part in parts for key in part["keys"]})
    index = {"format": OptimizerIndex.FORMAT, "keys": keys, "parameters": parameters}
    atomic_write_text(folder / "index.json", json.dumps(sealed(index)))
    return folder / "index.json"


class _Piece(NamedTuple):
    """Where a piece of a parameter's state is: a range of the flattened shard that a tensor rank held."""

    file: str
    tensor_rank: int
    start: int
    length: int


def _place(piece: _Piece) -> tuple[int, int]:
    return piece.tensor_rank, piece.start


class _ParameterEntry(ShardingEntry):
    """A parameter in index.json: how it was sharded, and where the pieces of its state are."""

    # [file, tensor rank, start, length] each: a range of the flattened shard of that tensor rank.
    pieces: list[Annotated[tuple[Name, Count, Count, Count], Strict(False)]]

    @model_validator(mode="after")
    def _pieces_tile_each_shard(self) -> _ParameterEntry:
        size = math.prod(self.local_shape())
        ranges: dict[int, list[tuple[int, int]]] = {rank: [] for rank in range(1 if self.dim is None else self.size)}
        for file, rank, start, length in self.pieces:
            if rank not in ranges or Path(file).name != file:
                raise ValueError(f"no piece of this parameter can lie in {file!r} for tensor rank {rank}")
            ranges[rank].append((start, length))
        for rank, pieces in ranges.items():
            end = 0
            for start, length in sorted(pieces):
                if start != end:
                    raise ValueError(
                        f"pieces of tensor rank {rank} overlap or leave a gap at element {min(start, end)}"
                    )
                end += length
            if end != size:
                raise ValueError(f"pieces of tensor rank {rank} hold {end:,} of {size:,} elements")
        return self


class OptimizerIndex(Schema):
    """index.json of a checkpoint's optimizer folder."""

    FORMAT: ClassVar[str] = "megatron-doremi-optimizer/1"
    FORMAT_OPTIONAL: ClassVar[bool] = True
    SEALED: ClassVar[bool] = True
    SEAL_OPTIONAL: ClassVar[bool] = True

    keys: list[Literal["exp_avg", "exp_avg_sq", "master"]]
    parameters: dict[Name, _ParameterEntry]

    @model_validator(mode="after")
    def _moments(self) -> OptimizerIndex:
        if not set(MOMENTS) <= set(self.keys):
            raise ValueError(f"keys must hold {' and '.join(MOMENTS)}")
        return self


class OptimizerFolder(ShardedFolder):
    """The files that `optimizer_file` of every rank left in a folder, at any layout, and their index."""

    def __init__(self, folder: Path):
        """Reads the index. Raises ConfigError with every fault of it."""
        super().__init__(folder, "optimizer state", _REMEDY)
        index = read_checked(folder / "index.json", f"{self._subject}: index.json", OptimizerIndex, _REMEDY)
        self.keys = frozenset(index.keys)
        self._sharding = dict(index.parameters)
        # In the order of tensor ranks and, within each, of their starts.
        self._pieces = {
            name: sorted((_Piece(*piece) for piece in parameter.pieces), key=lambda p: (*_place(p), p.length))
            for name, parameter in index.parameters.items()
        }

    def check_files(self, part: int = 0, parts: int = 1) -> None:
        """Raises ConfigError if a piece of the index is missing from its file, or has another type or size there.

        Args:
            part, parts: looks at every `parts`-th file, starting with number `part`.
        """
        expected: dict[str, list[tuple[str, int]]] = defaultdict(list)
        for name, pieces in self._pieces.items():
            for piece in pieces:
                expected[piece.file] += [(f"{name}/{key}", piece.length) for key in sorted(self.keys)]
        for file_name, tensors in sorted(expected.items())[part::parts]:
            with self._opened(file_name, _RULE) as file:
                for tensor, length in tensors:
                    stored = file.places[tensor]
                    if stored.dtype != "F32" or stored.shape != (length,):
                        description = f"{stored.dtype} {list(stored.shape)}"
                        raise self._error(f"{file_name}: {tensor} is {description}, not F32 [{length}]", _RULE)

    def local_range(
        self, name: str, key: str, spec: ParameterSpec, topology: Topology, start: int, count: int
    ) -> Tensor:
        """A range of the state of this rank's flattened shard of a parameter.

        Args:
            key: one of `keys`.
            spec: the parameter's, at this layout.

        Returns:
            [count] float32.

        Raises:
            ConfigError: the parameter, or a part of the range, is missing.
        """
        result = torch.empty(count)
        fill(result, start, partial(self.blocks, name, key, spec, topology))
        return result

    def blocks(
        self, name: str, key: str, spec: ParameterSpec, topology: Topology, start: int, count: int
    ) -> Iterator[tuple[int, Tensor]]:
        """The same, a block at a time: (first number of the block, its values) in order."""
        for first, number in ranges(start, count):
            yield first, self._read_local(name, spec, topology, first, number, partial(self._read, name, key))

    def _read(self, name: str, key: str, tensor_rank: int, start: int, count: int) -> Tensor:
        """Joins the pieces of one tensor rank of the writing layout that cover a range of its flattened shard."""
        result, covered = torch.empty(count), 0
        pieces = self._pieces[name]
        # The last that begins at `start` or before, and those after it.
        first = bisect.bisect_right(pieces, (tensor_rank, start), key=_place) - 1
        for piece in itertools.islice(pieces, max(0, first), None):
            if _place(piece) >= (tensor_rank, start + count):
                break
            low, high = max(start, piece.start), min(start + count, piece.start + piece.length)
            if piece.tensor_rank != tensor_rank or low >= high:
                continue
            values = self._read_file(piece.file, f"{name}/{key}", low - piece.start, high - low, _RULE)
            if high - low == count:
                return values
            result[low - start : high - start] = values
            covered += high - low
        if covered != count:
            raise self._error(f"{name}/{key}: {covered:,} of {count:,} elements", _RULE)
        return result
