"""Writes a model's weights for Transformers, or back for this program: tensor by tensor, in files of bounded size.

Memory holds one parameter and its converted copy, whatever the size of the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_doremi.checkpoint.source import Weights
from megatron_doremi.checkpoint.weights import sharding_metadata
from megatron_doremi.config import GPTConfig
from megatron_doremi.errors import ConfigError, Fault
from megatron_doremi.hugging_face.architectures import Architecture
from megatron_doremi.hugging_face.stored import Stored
from megatron_doremi.hugging_face.weights import INDEX, SINGLE
from megatron_doremi.model.sizes import parameter_specs
from megatron_doremi.storage.files import atomic_write_text
from megatron_doremi.storage.tensor_file import tensor_bytes, write_tensors

# As Transformers splits models.
LARGEST_FILE = 5_000_000_000


@dataclass(frozen=True)
class _Unit:
    """A parameter of ours and the tensors that hold it in a file.

    Attributes:
        shapes: of those tensors.
    """

    name: str
    stored: Stored
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return sum(tensor_bytes(self.dtype, shape) for shape in self.shapes)


def write_hugging_face(
    folder: Path,
    weights: Weights,
    gpt: GPTConfig,
    architecture: Architecture,
    dtype: torch.dtype | None,
    progress: Callable[[], None],
    largest_file: int = LARGEST_FILE,
) -> None:
    """Writes the safetensors files of a Hugging Face folder and, for several, their index.

    Args:
        dtype: of the tensors; None keeps that of each parameter.
        progress: called after each parameter that is written.
        largest_file: bytes of a file's tensors; a larger parameter has a file of its own.
    """
    files = _files(weights, gpt, lambda name: architecture.stored(name, gpt), dtype, largest_file)
    weight_map: dict[str, str] = {}
    for number, units in enumerate(files, 1):
        name = SINGLE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        _write(folder / name, weights, units, {"format": "pt"}, progress)
        weight_map |= {theirs: name for unit in units for theirs in unit.stored.names}
    if len(files) > 1:
        total = sum(unit.bytes for units in files for unit in units)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        atomic_write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")


def write_native(
    folder: Path,
    weights: Weights,
    gpt: GPTConfig,
    dtype: torch.dtype | None,
    progress: Callable[[], None],
    largest_file: int = LARGEST_FILE,
) -> None:
    """Writes weights files of this program, unsharded; see `write_hugging_face` for the arguments."""
    files = _files(weights, gpt, lambda name: Stored((name,)), dtype, largest_file)
    for number, units in enumerate(files):
        metadata = sharding_metadata({unit.name: weights.spec(unit.name) for unit in units})
        _write(folder / f"model-{number:05d}.safetensors", weights, units, metadata, progress)


def _files(
    weights: Weights,
    gpt: GPTConfig,
    stored_as: Callable[[str], Stored],
    dtype: torch.dtype | None,
    largest_file: int,
) -> list[list[_Unit]]:
    """The parameters of the model in order, divided into files."""
    files: list[list[_Unit]] = []
    size = 0
    for name, spec in parameter_specs(gpt).items():
        stored = stored_as(name)
        unit = _Unit(name, stored, tuple(stored.shapes(spec.shape)), dtype or weights.dtype(name))
        if not files or size + unit.bytes > largest_file:
            files.append([])
            size = 0
        files[-1].append(unit)
        size += unit.bytes
    return files


def _check_range(name: str, full: Tensor, dtype: torch.dtype) -> None:
    """Raises ConfigError if a parameter's finite values become Inf in the type that is written, such as float16."""
    bound = torch.finfo(dtype).max
    if bound >= torch.finfo(full.dtype).max:
        return
    largest = float(full.abs().max())
    if bound < largest < math.inf:
        type_name = str(dtype).removeprefix("torch.")
        rule, remedy = f"numbers of at most {bound:,.6g} in {type_name}", "give --dtype bfloat16 or float32"
        raise ConfigError(Fault(f"--dtype {type_name}", f"{name} holds {largest:,.6g}", rule, remedy))


def _write(
    path: Path,
    weights: Weights,
    units: Sequence[_Unit],
    metadata: dict[str, str],
    progress: Callable[[], None],
) -> None:
    entries = {
        name: (unit.dtype, shape) for unit in units for name, shape in zip(unit.stored.names, unit.shapes, strict=True)
    }

    def tensors() -> Iterator[Tensor]:
        for unit in units:
            full = weights.full(unit.name)
            _check_range(unit.name, full, unit.dtype)
            yield from unit.stored.split(full)
            progress()

    write_tensors(path, entries, tensors(), metadata)
