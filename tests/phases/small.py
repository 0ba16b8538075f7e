"""A small data set whose domains differ in difficulty, and runs of the program on it."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
from ranks import run_program

from megatron_doremi.config import SECTIONS
from megatron_doremi.data.indexed_dataset import IndexedDatasetWriter, dtype_for
from megatron_doremi.data.manifest import Domain, Manifest, TokenizerInfo, save_manifest
from megatron_doremi.settings import phases_of
from megatron_doremi.storage.formats import sealed

VOCAB = 61
MODEL = shlex.split(
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --num-query-groups 2 --ffn-hidden-size 64 --swiglu "
    "--disable-bias-linear --make-vocab-size-divisible-by 16 --seq-length 16 --micro-batch-size 2 "
    "--global-batch-size 8 --lr 5e-3 --min-lr 1e-3 --seed 11"
)


def write_data(
    folder: Path, num_domains: int = 3, tokens: int = 4000, apart: bool = False, held_out: int = 600
) -> Path:
    """Writes periodic token streams with noise, one period per domain; returns the manifest's path.

    Domain i repeats a cycle of 5 + 3 i ids, with random ids in between, more of them for higher i.

    Args:
        apart: domains share no ids; domain i uses ids 20 i to 20 i + 19.
        held_out: number of tokens in each domain's valid split.
    """
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(3)
    domains = []
    for number in range(num_domains):
        prefixes, cycle = {}, generator.permutation(VOCAB)[: 5 + 3 * number]
        for split, count in (("train", tokens * (1 + number % 3)), ("valid", held_out)):
            # The train split is the same for any `held_out` up to 600.
            ids = np.resize(cycle, count if split == "train" else max(count, 600))
            noisy = generator.random(len(ids)) < min(0.9, 0.05 + 0.25 * number)
            ids[noisy] = generator.integers(0, VOCAB, noisy.sum())
            ids = ids[:count]
            if apart:
                ids = ids % 20 + 20 * number
            prefix = folder / f"domain{number}_{split}"
            with IndexedDatasetWriter(prefix, dtype_for(VOCAB)) as writer:
                parts = np.array_split(ids, 7)
                for part in parts:
                    writer.add_document(part)
            # As if an id were 2 to 4 bytes of text.
            sizes = [len(part) * (2 + n % 3) for n, part in enumerate(parts)]
            Path(f"{prefix}.bytes").write_bytes(np.array(sizes, dtype="<u4").tobytes())
            prefixes[split] = prefix
        size = tokens * (1 + number % 3)
        domains.append(Domain(f"domain {number}", prefixes["train"], prefixes["valid"], size, 7, size))
    (folder / "tokenizer.model").write_text("none: ids were drawn")
    tokenizer = TokenizerInfo("SentencePieceTokenizer", folder / "tokenizer.model", "0" * 64, VOCAB, 0)
    save_manifest(Manifest(tuple(domains), tokenizer, folder / "domains.json"))
    return folder / "domains.json"


def read_by(phase: str, flags: list[str]) -> list[str]:
    """The flags, with their values, that `phase` reads; the program refuses others."""
    phases = {
        "--" + entry.name.replace("_", "-"): phases_of(cls, entry)
        for cls in SECTIONS.values()
        for entry in dataclasses.fields(cls)
    }
    read: list[str] = []
    reads = True
    for flag in flags:
        if flag.startswith("--"):
            reads = phase in phases.get(flag, (phase,))
        if reads:
            read.append(flag)
    return read


def train(
    world: int, phase: str, data: Path, save: Path, iters: int, *extra: str, model: list[str] | None = None
) -> list[dict[str, Any]]:
    """Runs a phase on `world` ranks and returns its metrics."""
    argv = ["--phase", phase, "--domains", str(data), "--save", str(save), "--train-iters", str(iters)]
    run_program(world, [*argv, *(MODEL if model is None else model), *extra])
    return metrics(save)


def unseal(run: Path) -> None:
    """Removes the checksums from a run's checkpoints, for tests that change their files."""
    for path in run.rglob("state.json"):
        state = json.loads(path.read_text())
        unsealed = {key: value for key, value in state.items() if key not in ("checksums", "sha256")}
        path.write_text(json.dumps(sealed(unsealed)))


def metrics(save: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]


def full_weights(checkpoint: Path) -> dict[str, Any]:
    """{name: unsharded parameter, without padding} of a checkpoint that any layout wrote."""
    from megatron_doremi.checkpoint.weights import WeightsFolder

    weights = WeightsFolder(checkpoint / "weights")
    return {name: weights.full(name) for name in weights.names()}


def training_lines(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Training lines without their timings."""
    clock = ("elapsed_ms", "tokens_per_second", "time_ms")
    return [{k: v for k, v in line.items() if k not in clock} for line in lines if "loss" in line]


def evaluation_figures(line: dict[str, Any]) -> dict[tuple[str, str, int], float | None]:
    """The entries of an evaluation, flat: {(key, domain or "", end of an interval or 0): number}."""
    flat: dict[tuple[str, str, int], float | None] = {}
    for key, value in line.items():
        if key.startswith("eval"):
            for name, number in (value if isinstance(value, dict) else {"": value}).items():
                numbers = number if isinstance(number, list) else [number]
                flat |= {(key, name, end): each for end, each in enumerate(numbers)}
    return flat


def assert_stopped_and_resumed_equal(world: int, data: Path, folder: Path, flags: list[str], model: list[str]) -> None:
    """A main run of 6 steps that stops after 3 and resumes has the lines of an undisturbed one."""
    whole = train(world, "main", data, folder / "undisturbed", 6, *flags, model=model)
    again = [*flags, "--load", str(folder / "broken")]
    train(world, "main", data, folder / "broken", 6, *again, "--exit-interval", "3", model=model)
    lines = train(world, "main", data, folder / "broken", 6, *again, model=model)
    assert training_lines(lines) == training_lines(whole)
