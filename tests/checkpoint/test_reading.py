"""A rank reads the numbers of its shard, a block at a time, whatever layout wrote them; replicas share the reading.

Run alone: python -m pytest tests/checkpoint/test_reading.py
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from engines import small_gpt
from ranks import on_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_doremi.checkpoint import resharding
from megatron_doremi.checkpoint.filling import fill
from megatron_doremi.checkpoint.optimizer_state import OptimizerFolder, write_index
from megatron_doremi.checkpoint.resharding import read_reshaped, spec_entry
from megatron_doremi.checkpoint.weights import WeightsFolder
from megatron_doremi.config import PAPER_SHAPES, GPTConfig
from megatron_doremi.model.sizes import parameter_specs
from megatron_doremi.parallel.parameters import ParameterSpec, fill_initial_shard, shard
from megatron_doremi.parallel.topology import Topology
from megatron_doremi.storage import tensor_reader
from megatron_doremi.storage.tensor_reader import BLOCK

SPECS = [
    ParameterSpec((16, 3), dim=0),
    ParameterSpec((3, 16), dim=1),
    ParameterSpec((32, 3), dim=0, blocks=2),
    ParameterSpec((3, 32), dim=1, blocks=2),
    ParameterSpec((2, 8, 5), dim=1),
    ParameterSpec((9, 3), dim=0, padded=12),
    ParameterSpec((7,)),
]


@pytest.mark.parametrize("block", [4, 1 << 20], ids=["small blocks", "one block"])
@pytest.mark.parametrize("long_row", [2, 1 << 20], ids=["row by row", "rows at once"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.shape} dim {spec.dim} blocks {spec.blocks}")
def test_any_range_of_any_shard_is_read_from_shards_of_any_layout(spec, long_row, block, monkeypatch):
    monkeypatch.setattr(resharding, "BLOCK", block)
    monkeypatch.setattr(resharding, "_LONG_ROW", long_row)
    full = torch.arange(math.prod(spec.shape), dtype=torch.float32).view(spec.shape) + 1
    for written, size in itertools.product((1, 2, 4), repeat=2):
        shards = [shard(full, spec, written, rank).reshape(-1) for rank in range(written)]

        def read(rank: int, start: int, count: int, shards: list[torch.Tensor] = shards) -> torch.Tensor:
            return shards[rank][start : start + count]

        # Padding depends on the layout: 16 rows on 4 ranks.
        local = replace(spec, padded={1: 0, 2: 10, 4: 16}[size] if spec.padded else 0)
        for rank in range(size):
            expected, topology = shard(full, local, size, rank).reshape(-1), Topology(tensor_size=size, rank=rank)
            for start in range(len(expected)):
                for wanted in (1, 2, 5, len(expected)):
                    count = min(wanted, len(expected) - start)
                    values = read_reshaped(spec, written, local, topology, start, count, read)
                    assert torch.equal(values, expected[start : start + count])


class LargestTensor(TorchDispatchMode):
    """Notes the bytes of the largest tensor that torch makes on the host."""

    bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        made = function(*arguments, **(named or {}))
        for tensor in made if isinstance(made, (list, tuple)) else (made,):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu" and tensor._base is None:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return made


class Reads:
    """Counts what is read, and reads nothing."""

    total = largest = 0

    def __call__(self, descriptor, memory, offset):
        self.total, self.largest = self.total + len(memory), max(self.largest, len(memory))


def sparse(path: Path, shapes: dict, metadata: dict, dtype: str, itemsize: int) -> None:
    """A safetensors file whose numbers take no space on disk."""
    header, end = {"__metadata__": metadata}, 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def sizes_of_8b() -> GPTConfig:
    """The paper's 8B model with one of its 32 layers: every parameter has its size."""
    _, heads, channels, hidden, ffn = PAPER_SHAPES["8b"]
    shape = {"num_layers": 1, "hidden_size": hidden, "ffn_hidden_size": ffn, "kv_channels": channels}
    return small_gpt(**shape, num_attention_heads=heads, num_query_groups=heads, vocab_size=50256)


def write_8b(folder: Path, size: int, replicas: int) -> dict[str, ParameterSpec]:
    """A checkpoint of bfloat16 weights on `size` tensor ranks, whose optimizer state `replicas` share."""
    specs, parts, keys = parameter_specs(sizes_of_8b()), [], ("exp_avg", "exp_avg_sq", "master")
    (folder / "weights").mkdir(parents=True)
    (folder / "optimizer").mkdir()
    for rank in range(size):
        mine = {name: spec for name, spec in specs.items() if spec.dim is not None or rank == 0}
        entries = {name: spec_entry(spec, size) for name, spec in mine.items()}
        shapes = {name: spec.local_shape(size) for name, spec in mine.items()}
        sparse(folder / "weights" / f"model-{rank}.safetensors", shapes, {"cut": json.dumps(entries)}, "BF16", 2)
        for replica in range(replicas):
            file, pieces, counts = f"rank-{rank}-{replica}.safetensors", {}, {}
            for name, shape in shapes.items():
                low, high = (math.prod(shape) * each // replicas for each in (replica, replica + 1))
                pieces[name] = {**entries[name], "piece": [rank, low, high - low]}
                counts |= {f"{name}/{key}": [high - low] for key in keys}
            sparse(folder / "optimizer" / file, counts, {}, "F32", 4)
            parts.append({"file": file, "keys": keys, "pieces": pieces})
    write_index(folder / "optimizer", parts)
    return specs


@pytest.mark.parametrize(
    ("written", "replicas", "size", "allowed"),
    # A short row is read with its neighbors: of matrices that are sharded by columns, all rows.
    [(8, 1, 8, 1.0), (1, 8, 8, 8.0), (8, 3, 1, 1.0), (2, 4, 4, 2.0)],
)
def test_a_rank_of_8b_reads_its_shard_and_holds_a_block(written, replicas, size, allowed, tmp_path, monkeypatch):
    specs = write_8b(tmp_path, written, replicas)
    topology, seen = Topology(tensor_size=size, rank=size - 1), LargestTensor()
    weights, states = WeightsFolder(tmp_path / "weights"), OptimizerFolder(tmp_path / "optimizer")
    for name, spec in specs.items():
        count = math.prod(spec.local_shape(size))
        by_columns = spec.dim is not None and spec.dim > 0
        for read, itemsize in (
            (partial(weights.blocks, name, spec, topology), 2),
            (partial(states.blocks, name, "exp_avg", spec, topology), 4),
        ):
            reads = Reads()
            monkeypatch.setattr(tensor_reader, "read_exactly", reads)
            with seen:
                fill(torch.empty(count, device="meta"), 0, read)
            assert reads.largest <= itemsize * BLOCK
            if by_columns:
                assert count * itemsize <= reads.total <= allowed * count * itemsize
            else:
                assert reads.total == count * itemsize, name
    assert seen.bytes <= 4 * BLOCK


@pytest.mark.parametrize("dim", [0, 1])
def test_a_rank_draws_the_initial_values_of_8b_and_holds_a_block(dim):
    """Of a matrix of 403 MB in float32."""
    spec, seen = ParameterSpec((24576, 4096)[:: -1 if dim else 1], dim=dim, std=0.02), LargestTensor()
    with seen:
        fill_initial_shard(torch.empty(spec.local_shape(8), device="meta"), spec, "name", 1, 8, 7)
    assert 0 < seen.bytes <= 2 << 20


def load_shared(launch, folder, fails):
    """Loads weights in two replicas; returns the bytes that this rank read and should read, or the error."""
    import numpy as np
    from engines import build_engine, layout, make_config

    from megatron_doremi.checkpoint.optimizer_state import owned_state
    from megatron_doremi.checkpoint.reader import load_weights
    from megatron_doremi.checkpoint.weights import weights_file
    from megatron_doremi.errors import ConfigError

    context = layout(launch, 1, 1)
    data = {"micro_batch_size": 1, "global_batch_size": 2, "seq_length": 8}
    config = make_config(context.topology, data, {"zero_stage": 1}, bf16=True)
    engine = build_engine(config, small_gpt(), np.ones(3) / 3, context)
    if launch.rank == 0:
        weights_file(engine.module, context.topology).write(folder)
    torch.distributed.barrier()
    before = {name: parameter.detach().clone() for name, parameter in engine.module.model_parameters()}
    counts, read_exactly = [], tensor_reader.read_exactly

    def counted(descriptor, memory, offset):
        if fails and launch.rank == 1:
            raise OSError("the disk fails")
        counts.append(len(memory))
        read_exactly(descriptor, memory, offset)

    tensor_reader.read_exactly = counted
    for _, parameter in engine.module.model_parameters():
        parameter.detach().zero_()
    try:
        load_weights(engine, WeightsFolder(folder), context)
    except ConfigError as error:
        return [fault.value for fault in error.faults]
    for name, parameter in engine.module.model_parameters():
        assert torch.equal(parameter, before[name]), name
    shares = sum(len(p.view(-1)) // 2 + len(p.view(-1)) % 2 for p in before.values())
    masters = sum(owned.count for owned in owned_state(engine, launch.rank))
    return sum(counts), 2 * (shares + masters)


def test_replicas_read_a_share_each(tmp_path):
    for read, expected in on_ranks(2, load_shared, tmp_path, False):
        assert read == expected


def test_all_replicas_name_what_one_cannot_read(tmp_path):
    errors = on_ranks(2, load_shared, tmp_path, True)
    assert errors[0] == errors[1]
    assert "model-pipe000-tensor000.safetensors: the disk fails" in errors[0][0]


def test_a_file_that_ends_before_its_tensors_is_an_error(tmp_path):
    path = tmp_path / "a.safetensors"
    sparse(path, {"x": (100,)}, {}, "F32", 4)
    folder = tensor_reader.TensorFolder(tmp_path)
    assert folder.read(path.name, "x", 90, 10).tolist() == [0.0] * 10
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 4)
    with pytest.raises(OSError, match="the file ends at byte"):
        folder.read(path.name, "x", 90, 10)
    with pytest.raises(ValueError, match="x has 100 numbers, not 101"):
        folder.read(path.name, "x", 90, 11)
