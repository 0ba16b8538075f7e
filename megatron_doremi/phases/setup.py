"""Building a run: data and reference from a checked configuration; the engine is built in build.py."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_doremi import __version__
from megatron_doremi.checkpoint.folder import newest_checkpoint, read_state
from megatron_doremi.checkpoint.run_config import RunConfigFile, read_run_config
from megatron_doremi.config import Config, GPTConfig, global_batch_size, gpt_config
from megatron_doremi.data.blend import too_short, window_count
from megatron_doremi.data.content_hash import content_hash
from megatron_doremi.data.indexed_dataset import IndexedDataset
from megatron_doremi.data.manifest import Domain, Manifest, load_manifest
from megatron_doremi.data.reference_losses import ReferenceLosses
from megatron_doremi.errors import ConfigError, Fault, raise_if_any
from megatron_doremi.mixture.controller import MixtureController
from megatron_doremi.mixture.reference import (
    OnlineReference,
    ReferenceRun,
    check_reference,
)
from megatron_doremi.mixture.static import Budget, resolve_weights
from megatron_doremi.parallel.context import ParallelContext
from megatron_doremi.parallel.topology import Topology
from megatron_doremi.settings import PROXY, SCORE, UNIMAX
from megatron_doremi.storage.files import atomic_write_text, make_folder, sha256_of
from megatron_doremi.validation import misfits


@dataclass(frozen=True)
class RunData:
    """The data of a run, opened and checked.

    Attributes:
        train: [k] streams to train on; empty for an evaluation.
        valid: [k] held-out streams, None where a domain has none.
        weights: [k] sampling weights, sum 1.
        vocab_size: ids are below this.
        content: hash of names and sampled content of `train`; "" for an evaluation.
        held_out_content: the same of `valid`.
    """

    manifest: Manifest
    train: tuple[IndexedDataset, ...]
    valid: tuple[IndexedDataset | None, ...]
    weights: NDArray[np.float64]
    vocab_size: int
    content: str
    held_out_content: str

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.manifest.names)

    @property
    def tokenizer_sha256(self) -> str | None:
        return self.manifest.tokenizer.sha256 if self.manifest.tokenizer else None


def open_data(config: Config, training: bool, world_size: int = 1) -> RunData:
    """Opens what the run reads. Raises ConfigError with every fault of every file."""
    manifest = load_manifest(Path(config.data.domains))
    faults: list[Fault] = []
    vocab_size = manifest.tokenizer.vocab_size if manifest.tokenizer else config.data.vocab_size
    if not vocab_size:
        faults.append(
            Fault(
                "--vocab-size",
                "not given",
                f"needed, because {config.data.domains} names no tokenizer",
                "give it, or the domains.json that tools/preprocess_data.py writes",
            )
        )
    elif manifest.tokenizer and config.data.vocab_size:
        rule = f"the manifest's tokenizer has {vocab_size:,} ids; --vocab-size is for a list that names none"
        faults.append(Fault("--vocab-size", f"{config.data.vocab_size:,} has no effect", rule, "leave it out"))
    train, valid = [], []
    warnings: list[str] = []
    seq_length = config.data.seq_length
    for domain in manifest.domains:
        if training:
            dataset = _open(domain.name, domain.train, seq_length, vocab_size, faults)
            if dataset is not None and dataset.num_tokens != domain.tokens:
                faults.append(
                    Fault(
                        f"domain {domain.name!r} ({domain.train})",
                        f"{dataset.num_tokens:,} tokens",
                        f"the {domain.tokens:,} of the manifest, which natural weights are made of",
                        "make the data set again with tools/preprocess_data.py",
                    )
                )
            train.append(dataset)
        valid.append(_open_held_out(domain, seq_length, vocab_size, faults, warnings))
    setting = sampling_setting(config, manifest)
    if setting == UNIMAX:
        # A budget is divided by sizes, which have to be right.
        raise_if_any(faults)
    try:
        weights = resolve_weights(
            setting,
            manifest,
            config.data.allow_tokenizer_mismatch,
            config.run.allow_unfinished,
            _budget(config, train, world_size),
        )
    except ConfigError as error:
        faults += error.faults
    if not training and not faults and not any(dataset is not None for dataset in valid):
        faults.append(
            Fault(
                f"--domains {config.data.domains}",
                "no held-out text that fills a window" if warnings else "no held-out text",
                "an evaluation reads the valid split",
                "run tools/preprocess_data.py with --split valid",
            )
        )
    raise_if_any(faults)
    opened = tuple(d for d in train if d is not None)
    contents = (content_hash(manifest.names, opened) if training else "", content_hash(manifest.names, valid))
    manifest = replace(manifest, warnings=(*manifest.warnings, *warnings))
    return RunData(manifest, opened, tuple(valid), weights, vocab_size, *contents)


def _budget(config: Config, train: Sequence[IndexedDataset | None], world_size: int) -> Budget | None:
    """What a run reads, and what there is to read; None where the flags give no budget, or a stream is missing."""
    data = config.data
    if not train or not data.train_iters or not data.max_epochs_per_domain or any(each is None for each in train):
        return None
    tokens = data.train_iters * global_batch_size(config, world_size) * data.seq_length
    counts = [window_count(each.num_tokens, data.seq_length) for each in train if each is not None]
    return Budget(tokens, [data.seq_length * count for count in counts], data.max_epochs_per_domain)


def sampling_setting(config: Config, manifest: Manifest) -> str:
    """--domain-weights, or its default: a proxy, and what is scored for it, is sampled
    uniformly (Algorithm 1), others by what there is."""
    if config.data.domain_weights:
        return config.data.domain_weights
    if config.data.phase in (PROXY, SCORE):
        return "uniform"
    return "natural" if manifest.given_weights is None else "given"


def _open(name: str, prefix: Path, seq_length: int, vocab_size: int, faults: list[Fault]) -> IndexedDataset | None:
    try:
        dataset = IndexedDataset(prefix, vocab_size)
    except ConfigError as error:
        faults += error.faults
        return None
    short = too_short(name, prefix, dataset.num_tokens, seq_length)
    if short is not None:
        faults.append(short)
    return dataset


def _open_held_out(
    domain: Domain, seq_length: int, vocab_size: int, faults: list[Fault], warnings: list[str]
) -> IndexedDataset | None:
    """A domain's held-out stream; None, with a warning, where it does not fill one window: that never blocks a run."""
    if domain.valid is None:
        return None
    try:
        dataset = IndexedDataset(domain.valid, vocab_size)
    except ConfigError as error:
        faults += error.faults
        return None
    short = too_short(domain.name, domain.valid, dataset.num_tokens, seq_length)
    if short is None:
        return dataset
    warnings.append(f"{short.what}: the held-out text {short.value}, {short.rule}: the domain is not evaluated")
    return None


def needs_reference(config: Config, controller: MixtureController) -> bool:
    """Whether a run loads a reference: to record its losses, or to score its own batches with it."""
    return config.data.phase == SCORE or (controller.needs_reference and config.doremi.reference_losses == "online")


def reads_reference_losses(config: Config, controller: MixtureController) -> bool:
    """Whether a run reads recorded reference losses."""
    return controller.needs_reference and config.doremi.reference_losses != "online"


def read_trained(folder: Path, flag: str, data: RunData, config: Config, needs_all_steps: bool = False) -> ReferenceRun:
    """Finds the newest model of a run, `folder` given by `flag`, and checks that it fits this data and layout.

    Args:
        needs_all_steps: the run has to be finished, unless --allow-unfinished is given.
    """
    run_config = read_run_config(folder, flag)
    gpt = check_reference(run_config, flag, folder, data.manifest, config.data.seq_length, data.vocab_size)
    faults = [
        Fault(f"{flag} {folder}", f"{name} {value}", rule, "run it at another layout, or train another model")
        for name, value, rule in misfits(gpt, config.parallel)
    ]
    checkpoint = newest_checkpoint(folder)
    if checkpoint is None:
        rule = "a run that was trained to its end"
        raise ConfigError([*faults, Fault(f"{flag} {folder}", "no complete checkpoint", rule, "train it first")])
    state = read_state(checkpoint)
    # config.json can be edited; the checkpoint says what was trained.
    recorded = state.recorded_identity()
    told = {"domains": run_config.domains, "tokenizer_sha256": run_config.tokenizer_sha256, **asdict(gpt)}
    trained = {name: recorded[name] for name in ("domains", "tokenizer_sha256") if name in recorded}
    trained |= recorded.get("gpt", {})
    names = [name for name, value in trained.items() if told[name] != value]
    if names:
        value = ", ".join(f"{name} {told.get(name)!r}" for name in names)
        rule = "what its checkpoint says: " + ", ".join(f"{name} {trained[name]!r}" for name in names)
        faults.append(Fault(f"{flag} {folder}: config.json", value, rule, "restore config.json, or train it again"))
    planned = recorded.get("train_iters", run_config.train_iters())
    if needs_all_steps and state.iteration < planned and not config.run.allow_unfinished:
        value = f"{state.iteration:,} of its {planned:,} steps taken"
        remedy = "train it to its end, or give --allow-unfinished to take it as it is"
        faults.append(Fault(f"{flag} {folder}", value, "a finished run", remedy))
    raise_if_any(faults)
    batch = recorded.get("global_batch_size", run_config.global_batch_size)
    return ReferenceRun(gpt, checkpoint / "weights", state.iteration, batch)


def read_reference(config: Config, data: RunData) -> ReferenceRun:
    """Finds and checks the reference of a proxy, or of scoring."""
    return read_trained(Path(config.doremi.reference_load), "--reference-load", data, config, needs_all_steps=True)


def make_reference(config: Config, run: ReferenceRun | None, context: ParallelContext) -> OnlineReference | None:
    """The frozen reference on the proxy's layout and in its precision; None if the losses are on disk or not needed."""
    if run is None:
        return None
    dtype = torch.bfloat16 if config.optimizer.bf16 else torch.float32
    shape = (config.data.micro_batch_size, config.data.seq_length)
    return OnlineReference(run, context, dtype, shape, config.parallel.loss_chunk_tokens)


def what_is_read(
    data: RunData, reference: ReferenceRun | None, reference_losses: ReferenceLosses | None = None
) -> dict[str, Any]:
    """What this rank sees of the files that decide a run, in hashes: a node may hold a stale copy."""
    manifest = data.manifest
    entry: dict[str, Any] = {
        "domains": list(data.names),
        "tokenizer_sha256": data.tokenizer_sha256,
        "data_fingerprint": manifest.fingerprint(),
        "data_content": data.content,
        "held_out_content": data.held_out_content,
        "sampling weights": data.weights.tolist(),
    }
    if reference is not None:
        # Not its weights, which may be gigabytes: what its checkpoint says of them.
        entry["checkpoint of the reference"] = sha256_of(reference.weights.parent / "state.json")
    if reference_losses is not None:
        entry["scores.json of the reference losses"] = sha256_of(reference_losses.folder / "scores.json")
    return entry


def write_run_config(
    config: Config,
    gpt: GPTConfig,
    data: RunData,
    topology: Topology,
    identity: Mapping[str, Any],
    overrides: Sequence[Mapping[str, Any]],
) -> None:
    """Writes SAVE/config.json: every resolved value of the run.

    Args:
        identity: of the run (identity.py).
        overrides: what of it was changed on purpose, at which iteration.
    """
    save = Path(config.run.save)
    make_folder(save, "--save")
    entry = {
        "format": RunConfigFile.FORMAT,
        "program": f"megatron-doremi {__version__}",
        "phase": config.data.phase,
        "gpt": asdict(gpt),
        "domains": list(data.names),
        "sampling_weights": dict(zip(data.names, data.weights.tolist(), strict=True)),
        "tokenizer_sha256": data.tokenizer_sha256,
        "data_fingerprint": data.manifest.fingerprint(),
        "held_out_content": data.held_out_content,
        "global_batch_size": global_batch_size(config, topology.world_size),
        "topology": {k: v for k, v in asdict(topology).items() if k != "rank"},
        "identity": dict(identity),
        "overrides": list(overrides),
        "settings": config.to_dict(),
    }
    atomic_write_text(save / "config.json", json.dumps(entry, indent=2) + "\n")


def resolve_gpt(config: Config, data: RunData) -> GPTConfig:
    """The shape of this run's model."""
    return gpt_config(config.model, config.data.seq_length, data.vocab_size)


def held_out(data: RunData) -> Sequence[IndexedDataset | None]:
    """The held-out streams, or an empty list where no domain has any."""
    return data.valid if any(dataset is not None for dataset in data.valid) else ()
