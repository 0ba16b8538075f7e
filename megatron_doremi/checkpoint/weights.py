"""Model weights on disk, layout-independent: any tensor, pipeline and data parallel size reads what any other wrote.

Each (stage, tensor rank) of one replica writes its shards into a safetensors file, under the parameters' names in the
full model; the file's header records how each parameter was sharded. Nothing is a pickle: a file of unknown origin is
data.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_doremi.checkpoint.filling import fill
from megatron_doremi.checkpoint.resharding import (
    ShardedFolder,
    ShardingEntry,
    ranges,
    sharding_entry,
    spec_entry,
    writes_parameter,
)
from megatron_doremi.model.unpipelined import GPT
from megatron_doremi.parallel.deepspeed_internals import gathered
from megatron_doremi.parallel.parameters import ParameterSpec
from megatron_doremi.parallel.topology import Topology
from megatron_doremi.storage.formats import check_entry
from megatron_doremi.storage.tensor_file import DTYPES, TensorFile, to_host

# Key of the header's metadata that holds {parameter name: ShardingEntry}, as JSON.
_SHARDING = "cut"


def weights_file(module: GPT, topology: Topology) -> TensorFile | None:
    """Copies this rank's shards of the weights to host memory; a collective call.

    Returns:
        None on replicas other than the first, which write no weights.
    """
    tensors: dict[str, Tensor] = {}
    sharding: dict[str, dict[str, object]] = {}
    for layer_name, layer in module.named_layers():
        with gathered(layer.parameters()):
            for name, parameter in layer.named_parameters(layer_name):
                if topology.data_rank == 0 and writes_parameter(parameter, topology):
                    tensors[name] = to_host(parameter)
                    sharding[name] = sharding_entry(parameter, topology)
    if topology.data_rank:
        return None
    name = f"model-pipe{topology.pipe_rank:03d}-tensor{topology.tensor_rank:03d}.safetensors"
    return TensorFile(name, tensors, {_SHARDING: json.dumps(sharding)})


def sharding_metadata(specs: Mapping[str, ParameterSpec]) -> dict[str, str]:
    """The metadata of a weights file that holds parameters unsharded and without padding."""
    return {_SHARDING: json.dumps({name: spec_entry(replace(spec, padded=0), 1) for name, spec in specs.items()})}


class WeightsFolder(ShardedFolder):
    """The files that `weights_file` of every rank left in a folder, at any layout."""

    def __init__(self, folder: Path):
        """Reads the headers. Raises ConfigError if a shard of a parameter is missing or malformed."""
        super().__init__(folder, "weights", "take another checkpoint, or copy the folder again")
        # Names of the files that hold each parameter's shards, in the order of tensor ranks.
        self._files: dict[str, list[str]] = defaultdict(list)
        self._dtypes: dict[str, torch.dtype] = {}
        for path in sorted(folder.glob("*.safetensors")):
            self._read_header(path.name)
        if not self._files:
            raise self._error("no weights", "files model-*.safetensors")
        for name, files in self._files.items():
            expected = 1 if self._sharding[name].dim is None else self._sharding[name].size
            if len(files) != expected:
                raise self._error(f"{len(files)} of {expected} shards of {name}", "every rank's file")

    def _read_header(self, file_name: str) -> None:
        with self._opened(file_name, "a safetensors file of this program") as file:
            for name, entry in json.loads(file.metadata[_SHARDING]).items():
                sharding = check_entry(entry, f"{self._subject}: {file_name}: {name}", ShardingEntry, self._remedy)
                if self._sharding.setdefault(name, sharding) != sharding:
                    raise self._error(f"{file_name}: {name}", "the same sharding as in the other files")
                self._files[name].append(file_name)
                stored, shape = file.places[name], sharding.local_shape()
                if stored.dtype not in DTYPES or stored.shape != shape:
                    value = f"{file_name}: {name} is {stored.dtype} of shape {list(stored.shape)}"
                    raise self._error(value, f"one of {', '.join(DTYPES)}, of shape {list(shape)}")
                self._dtypes[name] = DTYPES[stored.dtype]

    def names(self) -> set[str]:
        """Names of the parameters in the folder."""
        return set(self._sharding)

    def spec(self, name: str) -> ParameterSpec:
        """A parameter as the layout that wrote it sharded it."""
        return self._sharding[name].spec()

    def dtype(self, name: str) -> torch.dtype:
        """The type in which a parameter is stored."""
        return self._dtypes[name]

    def full(self, name: str) -> Tensor:
        """A parameter, unsharded and without padding."""
        spec = self.spec(name)
        return self.local_shard(name, replace(spec, padded=0), Topology())

    def local_shard(self, name: str, spec: ParameterSpec, topology: Topology) -> Tensor:
        """This rank's shard of a parameter. Raises ConfigError if the parameter is missing or of another shape."""
        shape = spec.local_shape(topology.tensor_size)
        result = torch.empty(math.prod(shape), dtype=self.dtype(name) if name in self._dtypes else None)
        fill(result, 0, partial(self.blocks, name, spec, topology))
        return result.view(shape)

    def blocks(
        self, name: str, spec: ParameterSpec, topology: Topology, start: int, count: int
    ) -> Iterator[tuple[int, Tensor]]:
        """See `Weights.blocks`."""
        for first, number in ranges(start, count):
            yield first, self._read_local(name, spec, topology, first, number, partial(self._read, name))

    def _read(self, name: str, tensor_rank: int, start: int, count: int) -> Tensor:
        """[count] values of the flattened shard of one tensor rank of the layout that wrote it."""
        file_name = self._files[name][tensor_rank]
        return self._read_file(file_name, name, start, count, "the tensors that its header names")
