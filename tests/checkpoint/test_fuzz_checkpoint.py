"""Damaged checkpoints of unknown origin give a readable error or the same result, never anything else.

Run alone: python -m pytest tests/checkpoint/test_fuzz_checkpoint.py
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import pytest
from phases.small import MODEL, train, write_data

from megatron_doremi.arguments import parse_config
from megatron_doremi.checkpoint.folder import changed_files, newest_checkpoint, read_state
from megatron_doremi.checkpoint.optimizer_state import OptimizerFolder
from megatron_doremi.checkpoint.weights import WeightsFolder
from megatron_doremi.errors import ConfigError, Fault
from megatron_doremi.parallel.topology import Topology
from megatron_doremi.phases.model_checks import read_model
from megatron_doremi.phases.run_data import open_data

CASES = int(os.environ.get("MEGATRON_DOREMI_FUZZ", "600"))
VALUES = (None, -1, 0, 2**70, 1.5, float("nan"), "x", "../../etc/passwd", [], [1], {}, {"a": 1}, True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(2, "main", write_data(folder, tokens=300), folder / "run", 1, "--tensor-model-parallel-size", "2")
    return newest_checkpoint(folder / "run")


@pytest.fixture(scope="module")
def specs(checkpoint):
    weights = WeightsFolder(checkpoint / "weights")
    return {name: weights.spec(name) for name in sorted(weights.names())[::4]}


def read_all(folder: Path, specs) -> str:
    """Reads all that a run of another layout reads; returns its hash. Raises ConfigError where such a run does."""
    state = read_state(folder)
    if changed := changed_files(folder, state):
        raise ConfigError(Fault(changed[0], "changed", "", ""))
    digest = hashlib.sha256(json.dumps(state.model_dump(exclude={"sha256"}), sort_keys=True).encode())

    def add(tensor) -> None:
        digest.update(tensor.contiguous().numpy().tobytes())

    newest_checkpoint(folder.parent.parent)
    weights, states = WeightsFolder(folder / "weights"), OptimizerFolder(folder / "optimizer")
    states.check_files()
    for name, spec in specs.items():
        add(weights.local_shard(name, spec, Topology()))
        for key in ("exp_avg", "exp_avg_sq"):
            for rank in range(2):
                shape = spec.local_shape(2)
                count = max(1, shape[0])
                add(states.local_range(name, key, spec, Topology(tensor_size=2, rank=rank), 0, count))
            add(states.local_range(name, key, spec, Topology(), 1, 7))
    return digest.hexdigest()


def read_as_reference(run: Path, folder: Path) -> tuple:
    """The shape, iteration and batch size that a proxy reads from a run's config.json and newest checkpoint."""
    flags = ["--phase", "proxy", "--domains", str(folder / "domains.json"), "--save", "s", "--train-iters", "1"]
    config = parse_config([*flags, *MODEL, "--reference-load", str(run)], 1)
    reference = read_model(run, "--reference-load", open_data(config, training=True)[0], config, step=None)
    return reference.gpt, reference.iteration, reference.global_batch_size


def change_json(value, generator):
    """Deletes or replaces a random part of a JSON value, at any depth."""
    if isinstance(value, dict | list) and value and generator.random() < 0.85:
        key = generator.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if generator.random() < 0.1:
            del value[key]
        else:
            value[key] = change_json(value[key], generator)
        return value
    return generator.choice(VALUES)


def change_header(data: bytes, generator) -> bytes:
    """Changes the header of a safetensors file, whose sharding and pieces are JSON within JSON."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    meta = header["__metadata__"]
    key = next(iter(meta))
    if generator.random() < 0.7:
        meta[key] = json.dumps(change_json(json.loads(meta[key]), generator))
    else:
        header = change_json(header, generator)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def test_damaged_files(checkpoint, specs, tmp_path):
    generator = random.Random(7)
    files = sorted(str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file())
    folder = tmp_path / "checkpoints" / checkpoint.name
    shutil.copytree(checkpoint, folder)
    refused, expected = 0, read_all(checkpoint, specs)
    for case in range(CASES):
        name = generator.choice(files)
        path, original = folder / name, (checkpoint / name).read_bytes()
        kind = generator.random()
        if kind < 0.25:
            data = bytearray(original)
            for _ in range(generator.randint(1, 4)):
                data[generator.randrange(min(len(data), 3000))] = generator.randrange(256)
            path.write_bytes(bytes(data))
        elif kind < 0.4:
            path.write_bytes(original[: generator.randrange(len(original))])
        elif name.endswith(".json"):
            path.write_text(json.dumps(change_json(json.loads(original), generator)))
        else:
            path.write_bytes(change_header(original, generator))
        try:
            assert read_all(folder, specs) == expected, f"case {case}, {name}: another result"
        except ConfigError:
            refused += 1
        except AssertionError:
            raise
        except Exception as error:
            raise AssertionError(f"case {case}, {name}: {error!r}") from error
        path.write_bytes(original)
    assert read_all(folder, specs) == expected
    print(f"{refused} of {CASES} refused")
    assert refused > CASES // 3


def test_damaged_configurations(checkpoint, tmp_path):
    """config.json of a reference is compared with its checkpoint: no mutation leads to another model."""
    generator = random.Random(8)
    run = tmp_path / "run"
    shutil.copytree(checkpoint.parents[1], run)
    path, data = run / "config.json", checkpoint.parents[2]
    original, expected = path.read_bytes(), read_as_reference(run, data)
    refused = 0
    for case in range(CASES):
        if generator.random() < 0.3:
            damaged = bytearray(original)
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
            path.write_bytes(bytes(damaged))
        else:
            path.write_text(json.dumps(change_json(json.loads(original), generator)))
        try:
            assert read_as_reference(run, data) == expected, f"case {case}: another result"
        except ConfigError:
            refused += 1
        except Exception as error:
            if isinstance(error, AssertionError):
                raise
            raise AssertionError(f"case {case}: {error!r}") from error
    print(f"{refused} of {CASES} configurations refused")
    assert refused > CASES // 10
