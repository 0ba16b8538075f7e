"""Model weights on disk without a layout: any tensor, pipeline and data parallel size reads what any other wrote.

Each (stage, tensor rank) of one replica writes the parts that it holds into a safetensors file, under the
parameters' names in the whole model; the header says how a parameter was cut. Readers join the parts of what
they need and cut again. No pickle: a file from elsewhere is data.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from megatron_doremi.config import GPTConfig
from megatron_doremi.errors import MALFORMED, ConfigError, Fault
from megatron_doremi.model.pipeline import GPTPipeline
from megatron_doremi.model.unpipelined import GPT, gathered
from megatron_doremi.parallel.layers import TensorParallel
from megatron_doremi.parallel.parameters import ParameterSpec, shard, spec_of, unshard
from megatron_doremi.parallel.topology import Topology
from megatron_doremi.storage.tensor_file import TensorFile, to_host

_CUT = "cut"
_TYPES = ("F32", "BF16", "F16")


def writes_parameter(parameter: nn.Parameter, topology: Topology) -> bool:
    """Whether this rank writes its part of a parameter: of what tensor ranks or stages hold alike, one does."""
    copy = getattr(parameter, "ds_pipe_replicated", False)
    return not copy and (spec_of(parameter).dim is not None or topology.tensor_rank == 0)


def weights_file(module: GPT, topology: Topology) -> TensorFile | None:
    """This rank's part of the model, copied to the host; a collective call. None on other replicas than the first."""
    tensors: dict[str, Tensor] = {}
    cuts: dict[str, dict[str, object]] = {}
    for layer_name, layer in module.named_layers():
        with gathered(layer.parameters()):
            for name, parameter in layer.named_parameters(layer_name):
                if topology.data_rank == 0 and writes_parameter(parameter, topology):
                    tensors[name] = to_host(parameter)
                    cuts[name] = {**asdict(spec_of(parameter)), "size": topology.tensor_size}
    if topology.data_rank:
        return None
    name = f"model-pipe{topology.pipe_rank:03d}-tensor{topology.tensor_rank:03d}.safetensors"
    return TensorFile(name, tensors, {_CUT: json.dumps(cuts)})


def read_spec(entry: dict[str, Any]) -> tuple[ParameterSpec, int]:
    """How a parameter was cut, and over how many ranks. Raises one of MALFORMED on nonsense."""
    spec = ParameterSpec(tuple(map(int, entry["shape"])), entry["dim"], int(entry["blocks"]), int(entry["padded"]))
    size = int(entry["size"])
    right = min(*spec.shape, size, spec.blocks) >= 1
    if spec.dim is not None:
        right = right and type(spec.dim) is int and 0 <= spec.dim < len(spec.shape)
        right = right and spec.cut_length >= spec.shape[spec.dim] and spec.cut_length % (size * spec.blocks) == 0
    if not right:
        raise ValueError(f"a cut of {entry}")
    return spec, size


class WeightsFolder:
    """The weights that the `weights_file` of every rank left in a folder, of whatever layout."""

    def __init__(self, folder: Path):
        """Reads the headers. Raises ConfigError where the folder does not hold whole parameters."""
        self.folder = folder
        self._parts: dict[str, list[Path]] = defaultdict(list)
        self._specs: dict[str, ParameterSpec] = {}
        self._sizes: dict[str, int] = {}
        for path in sorted(folder.glob("*.safetensors")):
            self._read_header(path)
        if not self._parts:
            raise self._error("no weights", "files model-*.safetensors")
        for name, parts in self._parts.items():
            if len(parts) != (1 if self._specs[name].dim is None else self._sizes[name]):
                raise self._error(f"{len(parts)} of {self._sizes[name]} parts of {name}", "every rank's file")

    def _error(self, value: str, rule: str) -> ConfigError:
        return ConfigError(
            Fault(f"weights in {self.folder}", value, rule, "take another checkpoint, or copy the folder again")
        )

    def _read_header(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                for name, cut in json.loads(file.metadata()[_CUT]).items():
                    spec, size = self._specs[name], self._sizes[name] = read_spec(cut)
                    self._parts[name].append(path)
                    entry = file.get_slice(name)
                    if entry.get_dtype() not in _TYPES or tuple(entry.get_shape()) != spec.local_shape(size):
                        found = f"{name} is {entry.get_dtype()} {entry.get_shape()}"
                        rule = f"one of {', '.join(_TYPES)} of shape {list(spec.local_shape(size))}"
                        raise self._error(f"{path.name}: {found}", rule)
        except (SafetensorError, OSError, *MALFORMED) as error:
            raise self._error(f"{path.name}: {error}", "a safetensors file of this program") from error

    def names(self) -> set[str]:
        """Names of the parameters in the folder."""
        return set(self._parts)

    def spec(self, name: str) -> ParameterSpec:
        """How a parameter was cut by the layout that wrote it."""
        return self._specs[name]

    def whole(self, name: str) -> Tensor:
        """A parameter of the whole model, without padding."""
        parts, spec, size = [], self._specs[name], self._sizes[name]
        try:
            for path in self._parts[name]:
                with safe_open(path, framework="pt") as file:
                    parts.append(file.get_tensor(name))
        except (SafetensorError, OSError) as error:
            raise self._error(f"{name}: {error}", "the tensors that the headers name") from error
        if any(tuple(part.shape) != spec.local_shape(size) for part in parts):
            raise self._error(f"{name}: parts of shapes {[tuple(p.shape) for p in parts]}", f"{spec.local_shape(size)}")
        return unshard(parts, spec)

    def part(self, name: str, spec: ParameterSpec, topology: Topology) -> Tensor:
        """This rank's part of a parameter. Raises ConfigError where the folder lacks it or its shape differs."""
        if name not in self._parts or not self._specs[name].is_of_one_model(spec):
            found = f"shape {self._specs[name].shape}" if name in self._parts else "missing"
            raise self._error(f"{name}: {found}", f"shape {spec.shape}")
        return shard(self.whole(name), spec, topology.tensor_size, topology.tensor_rank)

    @torch.no_grad()
    def load_into(self, module: GPTPipeline, topology: Topology) -> None:
        """Fills this rank's parameters. Raises ConfigError where names or shapes differ."""
        for name, parameter in module.model_parameters():
            parameter.copy_(self.part(name, spec_of(parameter), topology))


def load_frozen(
    gpt: GPTConfig,
    weights: Path,
    topology: Topology,
    tp: TensorParallel,
    dtype: torch.dtype,
    loss_chunk_tokens: int = 0,
) -> GPTPipeline:
    """This rank's stage of a trained model, for forward passes only.

    Args:
        weights: folder of the files of `weights_file`, at any layout.
        loss_chunk_tokens: see `token_losses` in parallel/cross_entropy.py.
    """
    # Start values of an 8B model take minutes to draw, and would be thrown away.
    module = GPTPipeline(gpt, topology, tp, seed=None, loss_chunk_tokens=loss_chunk_tokens)
    WeightsFolder(weights).load_into(module, topology)
    module.to(dtype).requires_grad_(False).eval()
    return module
