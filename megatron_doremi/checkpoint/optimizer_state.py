"""The optimizer's state on disk without a layout: moments and master weights, parameter by parameter.

DeepSpeed's own files hold flat partitions, which only the layout that wrote them can read, and are pickles. Here each
rank writes, for every parameter, the piece of it whose state it owns (under ZeRO a range of its flattened part), and
an index says where each piece lies. A reader takes the pieces that cover what it owns at its own layout.

    optimizer/rank-00003.safetensors   "NAME/exp_avg", "NAME/exp_avg_sq" and, where the model trains in less than
                                       float32, "NAME/master": float32 vectors, one for each piece
    optimizer/index.json               the pieces of each parameter; written last
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from pydantic import Strict, model_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from megatron_doremi.checkpoint.weights import read_spec, writes_parameter
from megatron_doremi.errors import ConfigError, Fault
from megatron_doremi.model.unpipelined import is_partitioned
from megatron_doremi.parallel.parameters import ParameterSpec, shard, spec_of, unshard
from megatron_doremi.parallel.topology import Topology
from megatron_doremi.storage.files import atomic_write_text
from megatron_doremi.storage.formats import Count, Name, Positive, Schema, read_checked, sealed
from megatron_doremi.storage.tensor_file import TensorFile, to_host

MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "master"
_PIECES = "pieces"
_REMEDY = "delete this checkpoint to resume from an older one, or copy it again"


@dataclass(frozen=True)
class OwnedState:
    """What this rank owns of one parameter's state.

    Attributes:
        name: of the parameter in the whole model.
        parameter: this rank's part of it.
        start: first number of the piece within that part, flattened.
        tensors: {key: the piece}, vectors that share the optimizer's memory; MASTER only where the optimizer keeps
            weights of its own.
    """

    name: str
    parameter: nn.Parameter
    start: int
    tensors: dict[str, Tensor]

    @property
    def count(self) -> int:
        return len(self.tensors[MOMENTS[0]])


def flat_partitions(engine: DeepSpeedEngine) -> list[Tensor]:
    """The tensors that the optimizer itself moves: flat float32 partitions under ZeRO, else the parameters."""
    for attribute in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(engine.optimizer, attribute):
            return list(getattr(engine.optimizer, attribute))
    return [parameter for group in engine.basic_optimizer.param_groups for parameter in group["params"]]


def start_state(engine: DeepSpeedEngine, steps: int) -> None:
    """Gives the optimizer the state that it makes for itself at its first step, `steps` steps old, moments zero."""
    for flat in flat_partitions(engine):
        state = engine.basic_optimizer.state[flat]
        state["step"] = torch.tensor(float(steps), dtype=torch.float32, device=flat.device)
        for key in MOMENTS:
            state[key] = torch.zeros_like(flat)


def owned_state(engine: DeepSpeedEngine, data_rank: int) -> Iterator[OwnedState]:
    """What this rank owns, parameter by parameter; the state has to be there (a step taken, or `start_state`)."""
    optimizer, flats = engine.optimizer, flat_partitions(engine)
    for name, parameter in engine.module.model_parameters():
        master = True
        if is_partitioned(parameter):
            group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start, flat = data_rank * size, flats[group]
            count = min(size, parameter.ds_numel - start)
        elif optimizer is engine.basic_optimizer:
            offset, start, count, flat, master = 0, 0, parameter.numel(), parameter, False
        elif parameter._hp_mapping is None:
            continue
        else:
            piece = parameter._hp_mapping
            offset, start = piece.hp_fragment_address.start, piece.lp_fragment_address.start
            count, flat = piece.hp_fragment_address.numel, flats[piece.param_group_index]
        if count <= 0:
            # ZeRO 3 pads a parameter to equal pieces; the last ones may hold nothing but padding.
            continue
        state = engine.basic_optimizer.state[flat]
        whole = {key: state[key] for key in MOMENTS} | ({MASTER: flat} if master else {})
        tensors = {key: tensor.detach().view(-1).narrow(0, offset, count) for key, tensor in whole.items()}
        yield OwnedState(name, parameter, start, tensors)


def optimizer_file(engine: DeepSpeedEngine, topology: Topology) -> TensorFile:
    """This rank's part of the state, copied to the host; of what several ranks hold alike one has it."""
    sharded = engine.optimizer is not engine.basic_optimizer
    tensors: dict[str, Tensor] = {}
    pieces: dict[str, dict[str, Any]] = {}
    for owned in owned_state(engine, topology.data_rank):
        if not writes_parameter(owned.parameter, topology) or (topology.data_rank and not sharded):
            continue
        for key, tensor in owned.tensors.items():
            # In float32 the model's own weights say the same.
            if key != MASTER or owned.parameter.dtype != torch.float32:
                tensors[f"{owned.name}/{key}"] = to_host(tensor)
        spec = {**asdict(spec_of(owned.parameter)), "size": topology.tensor_size}
        pieces[owned.name] = {**spec, "piece": [topology.tensor_rank, owned.start, owned.count]}
    return TensorFile(f"rank-{topology.rank:05d}.safetensors", tensors, {_PIECES: json.dumps(pieces)})


def index_part(file: TensorFile) -> dict[str, Any]:
    """What the index has to know of one rank's file: its name, its keys, and its piece of each parameter."""
    keys = sorted({name.rsplit("/", 1)[1] for name in file.tensors})
    return {"file": file.name, "keys": keys, _PIECES: json.loads(file.metadata[_PIECES])}


def write_index(folder: Path, parts: Sequence[Mapping[str, Any]]) -> Path:
    """Writes the index of a folder from the `index_part` of every rank; returns its path."""
    parameters: dict[str, dict[str, Any]] = {}
    for part in parts:
        for name, entry in part[_PIECES].items():
            spec = {key: value for key, value in entry.items() if key != "piece"}
            parameters.setdefault(name, {**spec, "pieces": []})["pieces"].append([part["file"], *entry["piece"]])
    keys = sorted({key for part in parts for key in part["keys"]})
    entry = {"format": OptimizerIndex.FORMAT, "keys": keys, "parameters": parameters}
    atomic_write_text(folder / "index.json", json.dumps(sealed(entry)))
    return folder / "index.json"


class Piece(NamedTuple):
    """Where a piece of a parameter's state lies: the file, whose part of the parameter, and the range of that part."""

    file: str
    tensor_rank: int
    start: int
    length: int


class _ParameterEntry(Schema):
    """A parameter in index.json: how the layout that wrote it cut it, and where the pieces of its state lie."""

    shape: list[Positive]
    dim: int | None
    blocks: Positive
    padded: Count
    size: Positive
    # [file, tensor rank, start, length] each.
    pieces: list[Annotated[tuple[Name, Count, Count, Count], Strict(False)]]

    @model_validator(mode="after")
    def _tiles(self) -> _ParameterEntry:
        spec, size = read_spec(self.model_dump())
        numbers = math.prod(spec.local_shape(size))
        holders = range(size if spec.dim is not None else 1)
        pieces: dict[int, list[tuple[int, int]]] = {rank: [] for rank in holders}
        for file, rank, start, length in self.pieces:
            if rank not in pieces or Path(file).name != file:
                raise ValueError(f"no piece of this parameter can lie in {file!r} for tensor rank {rank}")
            pieces[rank].append((start, length))
        for rank, found in pieces.items():
            end = 0
            for start, length in sorted(found):
                if start != end:
                    raise ValueError(f"pieces of tensor rank {rank} overlap or leave a gap at number {min(start, end)}")
                end += length
            if end != numbers:
                raise ValueError(f"pieces of tensor rank {rank} hold {end:,} of {numbers:,} numbers")
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


class OptimizerFolder:
    """The state that the `optimizer_file` of every rank left in a folder, of whatever layout."""

    def __init__(self, folder: Path):
        """Reads the index. Raises ConfigError with everything that is wrong with it."""
        self.folder = folder
        index = read_checked(folder / "index.json", f"optimizer state in {folder}: index.json", OptimizerIndex, _REMEDY)
        self.keys = frozenset(index.keys)
        self._specs: dict[str, tuple[ParameterSpec, int]] = {}
        self._pieces: dict[str, list[Piece]] = {}
        for name, entry in index.parameters.items():
            self._specs[name] = read_spec(entry.model_dump())
            self._pieces[name] = [Piece(*piece) for piece in entry.pieces]

    def check_files(self) -> None:
        """Raises ConfigError where a file lacks a piece of the index, or holds it in another type or size."""
        wanted: dict[str, list[tuple[str, int]]] = defaultdict(list)
        for name, pieces in self._pieces.items():
            for piece in pieces:
                wanted[piece.file] += [(f"{name}/{key}", piece.length) for key in sorted(self.keys)]
        for file_name, tensors in sorted(wanted.items()):
            try:
                with safe_open(self.folder / file_name, framework="pt") as file:
                    for tensor, length in tensors:
                        entry = file.get_slice(tensor)
                        if entry.get_dtype() != "F32" or entry.get_shape() != [length]:
                            found = f"{entry.get_dtype()} {entry.get_shape()}"
                            raise self._error(f"{file_name}: {tensor} is {found}, not F32 [{length}]")
            except (SafetensorError, OSError, TypeError, ValueError) as error:
                raise self._error(f"{file_name}: {error}") from error

    def _error(self, value: str) -> ConfigError:
        return ConfigError(
            Fault(
                f"optimizer state in {self.folder}",
                value,
                "the complete state of every parameter",
                _REMEDY,
            )
        )

    def part(self, name: str, key: str, spec: ParameterSpec, topology: Topology, start: int, count: int) -> Tensor:
        """A piece of the state of this rank's part of a parameter.

        Args:
            spec: the parameter's, at this layout; its padding may differ from that of the layout that wrote.
            start, count: of the piece within the flattened part.

        Returns:
            [count] float32.

        Raises:
            ConfigError: the folder lacks the parameter, or a part of it.
        """
        if name not in self._specs or not self._specs[name][0].is_of_one_model(spec):
            found = f"shape {self._specs[name][0].shape}" if name in self._specs else "missing"
            raise self._error(f"{name}: {found}, where the model has {spec.shape}")
        written, size = self._specs[name]
        if spec.dim is None or size == topology.tensor_size:
            return self._read(name, key, 0 if spec.dim is None else topology.tensor_rank, start, count)
        shape = written.local_shape(size)
        numbers = torch.Size(shape).numel()
        whole = unshard([self._read(name, key, rank, 0, numbers).view(shape) for rank in range(size)], written)
        own = shard(whole, spec, topology.tensor_size, topology.tensor_rank)
        return own.reshape(-1).narrow(0, start, count)

    def _read(self, name: str, key: str, tensor_rank: int, start: int, count: int) -> Tensor:
        """Joins the pieces of one tensor rank that cover a range."""
        result, covered = torch.empty(count), 0
        for piece in self._pieces[name]:
            low, high = max(start, piece.start), min(start + count, piece.start + piece.length)
            if piece.tensor_rank != tensor_rank or low >= high:
                continue
            try:
                with safe_open(self.folder / piece.file, framework="pt") as file:
                    found = file.get_slice(f"{name}/{key}")[low - piece.start : high - piece.start]
                result[low - start : high - start] = found
            except (SafetensorError, OSError, RuntimeError, TypeError, ValueError) as error:
                raise self._error(f"{piece.file}: {error}") from error
            covered += high - low
        if covered != count:
            raise self._error(f"{name}/{key}: {covered:,} of {count:,} numbers")
        return result
