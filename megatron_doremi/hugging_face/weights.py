"""The weights of a Hugging Face folder, read as this program's parameters at any layout."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from megatron_doremi.checkpoint.filling import fill
from megatron_doremi.checkpoint.resharding import ranges, read_reshaped
from megatron_doremi.config import GPTConfig
from megatron_doremi.errors import ConfigError, Fault, raise_if_any
from megatron_doremi.hugging_face.architectures import Architecture
from megatron_doremi.model.sizes import parameter_specs
from megatron_doremi.parallel.parameters import ParameterSpec, shard
from megatron_doremi.parallel.topology import Topology
from megatron_doremi.storage.formats import FileName, Name, Schema, read_checked
from megatron_doremi.storage.tensor_file import DTYPES
from megatron_doremi.storage.tensor_reader import UNREADABLE_TENSORS, TensorFolder, TensorReader

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Buffers that versions of Transformers stored among the weights; they follow from the shape.
BUFFERS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")
_REMEDY = "download the folder again, or save it again with Transformers' save_pretrained"
_SHOWN = 5


class IndexEntry(Schema):
    """model.safetensors.index.json: the file that holds each tensor."""

    weight_map: dict[Name, FileName] = Field(min_length=1)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's place, from a file's header; `name` is the one in the file."""

    file: str
    name: str
    shape: tuple[int, ...]
    dtype: str


def _class_name(name: str, found: Collection[str], architecture: Architecture) -> str:
    """The name in the class of a tensor in a file: some folders of GPT-2 omit the prefix of the class, and version 5 of
    Transformers calls GPT-NeoX's output layer lm_head."""
    output = f"{architecture.modules['output']}.weight"
    if name in (output, "lm_head.weight"):
        return output
    return name if any(other.startswith(architecture.prefix) for other in found) else architecture.prefix + name


def stored_tensors(folder: Path, flag: str) -> dict[str, StoredTensor]:
    """The tensors of a Hugging Face folder by name, from the headers of its files.

    Args:
        flag: the flag or argument that names the folder, for messages.

    Raises:
        ConfigError: a file is missing or damaged, or the folder holds no safetensors.
    """
    found: dict[str, StoredTensor] = {}
    for file_name in _file_names(folder, flag):
        with _damage_named(folder, file_name, flag):
            places = TensorReader(folder / file_name).places
        for name, place in places.items():
            if name in found:
                rule, value = "each tensor in one file", f"{name} is in {found[name].file} and in {file_name}"
                raise ConfigError(Fault(f"{flag} {folder}", value, rule, _REMEDY))
            found[name] = StoredTensor(file_name, name, place.shape, place.dtype)
    return found


def _file_names(folder: Path, flag: str) -> list[str]:
    if (folder / INDEX).is_file():
        index = read_checked(folder / INDEX, f"{flag} {folder}: {INDEX}", IndexEntry, _REMEDY)
        names = sorted(set(index.weight_map.values()))
        if (folder / SINGLE).is_file() and SINGLE not in names:
            # Transformers reads the first and ignores the others.
            rule, remedy = f"one model: {SINGLE}, or {INDEX} and its files", "remove what is out of date"
            raise ConfigError(Fault(f"{flag} {folder}", f"{SINGLE} and {INDEX} for other files", rule, remedy))
        return names
    if (folder / SINGLE).is_file():
        return [SINGLE]
    pickles = any(folder.glob("*.bin"))
    value = "holds pickled weights (*.bin) alone" if pickles else f"no {SINGLE} and no {INDEX}"
    remedy = "save it as safetensors with Transformers' save_pretrained" if pickles else "give a complete folder"
    raise ConfigError(Fault(f"{flag} {folder}", value, "weights as safetensors, which run no code", remedy))


@contextlib.contextmanager
def _damage_named(folder: Path, file_name: str, flag: str) -> Iterator[None]:
    """Raises ConfigError, which names the file, for whatever is wrong with its content."""
    try:
        yield
    except UNREADABLE_TENSORS as error:
        rule = "a complete safetensors file"
        raise ConfigError(Fault(f"{flag} {folder}: {file_name}", str(error), rule, _REMEDY)) from error


class HuggingFaceWeights:
    """The safetensors files of a Hugging Face folder."""

    def __init__(self, folder: Path, architecture: Architecture, gpt: GPTConfig, flag: str):
        """Reads the headers.

        Args:
            flag: the flag or argument that names the folder, for messages.

        Raises:
            ConfigError: with all faults: a tensor is missing or has another shape, or the folder holds tensors that
                our model does not have.
        """
        self.folder, self._architecture, self._gpt, self._flag = folder, architecture, gpt, flag
        self._files = TensorFolder(folder)
        self._specs = parameter_specs(gpt)
        found = stored_tensors(folder, flag)
        self._entries: dict[str, StoredTensor] = {}
        for name, entry in found.items():
            other = self._entries.setdefault(_class_name(name, found, architecture), entry)
            if other is not entry:
                rule = "one tensor for a parameter of the class"
                raise ConfigError(Fault(f"{flag} {folder}", f"{other.name} and {name}", rule, "remove one of the two"))
        raise_if_any(self._faults() or self._tied_faults())

    def _faults(self) -> list[Fault]:
        """Compares the headers with the tensors that the shape has."""
        architecture, subject = self._architecture, f"{self._flag} {self.folder}"
        faults, known = [], set()
        for name, spec in self._specs.items():
            stored = architecture.stored(name, self._gpt)
            for theirs, shape in zip(stored.names, stored.shapes(spec.shape), strict=True):
                known.add(theirs)
                entry = self._entries.get(theirs)
                if entry is None or entry.shape != shape or entry.dtype not in DTYPES:
                    value = f"{theirs}: {f'{entry.dtype} {list(entry.shape)}' if entry else 'missing'}"
                    rule = f"{list(shape)}, as config.json describes it, in one of {', '.join(DTYPES)}"
                    faults.append(Fault(subject, value, rule, _REMEDY))
        extra = sorted(name for name in self._entries if name not in known and not name.endswith(BUFFERS))
        if self._gpt.tied_embeddings:
            # A copy of the embedding; `_tied_faults` compares them.
            extra = [name for name in extra if name != f"{architecture.modules['output']}.weight"]
        if extra:
            value = ", ".join(extra[:_SHOWN]) + (f" and {len(extra) - _SHOWN} more" if len(extra) > _SHOWN else "")
            rule = f"no parameters but those of {architecture.class_name} with this config.json"
            faults.append(Fault(subject, value, rule, "convert another model"))
        if len(faults) > _SHOWN:
            rule = "the tensors that config.json describes"
            more = Fault(subject, f"{len(faults) - _SHOWN} more such tensors", rule, _REMEDY)
            faults = [*faults[:_SHOWN], more]
        return faults

    def _tied_faults(self) -> list[Fault]:
        """A fault of a tied output layer that is stored with values of its own: version 5 of Transformers does not tie
        it, and earlier versions ignore the stored values."""
        output = f"{self._architecture.modules['output']}.weight"
        if not self._gpt.tied_embeddings or output not in self._entries:
            return []
        embedding = self._architecture.stored("embedding.weight", self._gpt).names[0]
        blocks = ranges(0, math.prod(self._entries[output].shape))
        if all(torch.equal(self._range(output, *b).float(), self._range(embedding, *b).float()) for b in blocks):
            return []
        rule, remedy = "the values of the embedding, since config.json ties them", 'set "tie_word_embeddings": false'
        return [Fault(f"{self._flag} {self.folder}", f"{output} has values of its own", rule, remedy)]

    def names(self) -> set[str]:
        """Names of our parameters in the folder."""
        return set(self._specs)

    def spec(self, name: str) -> ParameterSpec:
        """A parameter, unsharded and without padding."""
        return self._specs[name]

    def dtype(self, name: str) -> torch.dtype:
        """The type in which a parameter is stored; of several tensors, the one that holds the values of all."""
        types = [DTYPES[self._entries[theirs].dtype] for theirs in self._architecture.stored(name, self._gpt).names]
        return functools.reduce(torch.promote_types, types)

    def full(self, name: str) -> Tensor:
        """A parameter of ours, unsharded."""
        return self.local_shard(name, self._specs[name], Topology())

    def local_shard(self, name: str, spec: ParameterSpec, topology: Topology) -> Tensor:
        """This rank's shard of a parameter; see `WeightsFolder.local_shard`."""
        stored, size = self._architecture.stored(name, self._gpt), topology.tensor_size
        if not stored.is_plain:
            if stored.by_rows:
                return stored.join([self._rows(theirs, size, topology.tensor_rank) for theirs in stored.names])
            full = stored.join([self._rows(theirs, 1, 0) for theirs in stored.names])
            return shard(full, spec, size, topology.tensor_rank)
        result = torch.empty(spec.local_shape(size), dtype=self.dtype(name))
        fill(result.view(-1), 0, functools.partial(self.blocks, name, spec, topology))
        return result

    def blocks(
        self, name: str, spec: ParameterSpec, topology: Topology, start: int, count: int
    ) -> Iterator[tuple[int, Tensor]]:
        """See `Weights.blocks`. What is not stored as this program holds it comes in one block."""
        stored = self._architecture.stored(name, self._gpt)
        if not stored.is_plain:
            yield start, self.local_shard(name, spec, topology).reshape(-1)[start : start + count]
            return

        def read(_: int, first: int, number: int) -> Tensor:
            return self._range(stored.names[0], first, number)

        for first, number in ranges(start, count):
            yield first, read_reshaped(self._specs[name], 1, spec, topology, first, number, read)

    def _rows(self, name: str, parts: int, part: int) -> Tensor:
        """One of `parts` equal shares of a tensor's rows."""
        shape = self._entries[name].shape
        count = math.prod(shape) // parts
        return self._range(name, part * count, count).view(shape[0] // parts, *shape[1:])

    def _range(self, name: str, start: int, count: int) -> Tensor:
        """[count] numbers of a flattened tensor."""
        entry = self._entries[name]
        with _damage_named(self.folder, entry.file, self._flag):
            return self._files.read(entry.file, entry.name, start, count)
