"""The data of a run, opened and checked: training and held-out streams, and their sampling weights."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_doremi.config import Config
from megatron_doremi.data.blend import too_short, window_count
from megatron_doremi.data.content_hash import content_hash
from megatron_doremi.data.document_bytes import document_bytes, text_entry
from megatron_doremi.data.manifest import Domain, Manifest
from megatron_doremi.data.token_stream import TokenStream
from megatron_doremi.errors import ConfigError, Fault, raise_if_any
from megatron_doremi.mixture.static import Budget, resolve_weights
from megatron_doremi.phases.held_out import HeldOut
from megatron_doremi.phases.selected_domains import sampling_setting, select_domains
from megatron_doremi.phases.to_come import WEIGHTS
from megatron_doremi.plan import run_tokens
from megatron_doremi.settings import TRAINING, UNIMAX

_HELD_OUT_REMEDY = "run tools/preprocess_data.py with --split valid, or give a list of prefixes and --split 969,30,1"


@dataclass(frozen=True)
class RunData:
    """The data of a run, opened and checked.

    Attributes:
        train: [k] training streams; empty for an evaluation.
        valid: [k] held-out streams; None where a domain has none.
        valid_bytes: [k] for each held-out stream [documents] the bytes of its documents; None where they are unknown.
        vocab_size: number of token ids.
        content: hash of names and sampled content of `train`; "" for an evaluation.
        held_out_content: the same hash of `valid`.
    """

    manifest: Manifest
    train: tuple[TokenStream, ...]
    valid: tuple[TokenStream | None, ...]
    valid_bytes: tuple[NDArray[np.uint32] | None, ...]
    vocab_size: int
    content: str
    held_out_content: str

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.manifest.names)

    @property
    def tokenizer_sha256(self) -> str | None:
        return self.manifest.tokenizer.sha256 if self.manifest.tokenizer else None

    @property
    def held_out_text(self) -> dict[str, dict[str, Any]]:
        """`text_entry` of each domain's held-out text, where the bytes of its documents are known."""
        sizes = zip(self.names, self.valid_bytes, strict=True)
        return {name: text_entry(each) for name, each in sizes if each is not None}

    def window_counts(self, seq_length: int) -> tuple[int, ...]:
        """[k] windows of each training stream; empty for an evaluation."""
        return tuple(window_count(dataset.num_tokens, seq_length) for dataset in self.train)

    def held_out_counts(self, seq_length: int) -> tuple[int, ...]:
        """[k] windows of each held-out stream; 0 where a domain has none."""
        return tuple(0 if each is None else window_count(each.num_tokens, seq_length) for each in self.valid)


def open_data(
    config: Config, training: bool, data_size: int = 1, to_come: Collection[str] = ()
) -> tuple[RunData, NDArray[np.float64]]:
    """Opens what a run on `data_size` replicas reads.

    Args:
        to_come: see `inputs_to_come`.

    Returns:
        the data, and [k] sampling weights, sum 1.

    Raises:
        ConfigError: with all faults of all files.
    """
    faults: list[Fault] = []
    manifest, weights_by_name = select_domains(config, to_come, faults)
    weights_fault = bool(faults)
    vocab_size = manifest.tokenizer.vocab_size if manifest.tokenizer else config.data.vocab_size
    if not vocab_size:
        faults.append(
            Fault(
                "--vocab-size",
                "not given",
                f"needed, because {config.data.source} names no tokenizer",
                "give it, or the domains.json that tools/preprocess_data.py writes",
            )
        )
    elif manifest.tokenizer and config.data.vocab_size:
        rule = f"the manifest's tokenizer has {vocab_size:,} ids; --vocab-size is for a list that names none"
        faults.append(Fault("--vocab-size", f"{config.data.vocab_size:,} has no effect", rule, "leave it out"))
    train, valid = list[TokenStream | None](), list[TokenStream | None]()
    warnings: list[str] = []
    seq_length = config.data.seq_length
    for domain in manifest.domains:
        if training:
            dataset = _open_train(manifest, domain, seq_length, vocab_size, faults)
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
        valid.append(_open_held_out(manifest, domain, seq_length, vocab_size, faults, warnings))
    weights = weights_by_name
    if weights is None and not weights_fault:
        setting = "uniform" if WEIGHTS in to_come else sampling_setting(config, manifest)
        if setting == UNIMAX:
            # unimax divides the budget by sizes, which must be right.
            raise_if_any(faults)
        try:
            weights = resolve_weights(setting, manifest, budget=_budget(config, train, data_size))
        except ConfigError as error:
            faults += error.faults
    if not training and not faults and not any(dataset is not None for dataset in valid):
        value, remedy = "no held-out text", _HELD_OUT_REMEDY
        if warnings:
            value += f" that fills a window of {config.data.seq_length:,} tokens"
            remedy = "give the --seq-length that the model was trained with, or hold out more text"
        faults.append(Fault(config.data.source, value, "an evaluation reads the valid split", remedy))
    if config.data.phase in TRAINING and not any(domain.valid is not None for domain in manifest.domains):
        warnings.append(f"{config.data.source}: no held-out text, so the run is not evaluated; {_HELD_OUT_REMEDY}")
    valid_bytes = [None if each is None else _document_bytes(each, faults) for each in valid]
    raise_if_any(faults)
    assert weights is not None
    warnings += _without_bytes(manifest.names, valid, valid_bytes)
    opened = tuple(d for d in train if d is not None)
    contents = (content_hash(manifest.names, opened) if training else "", content_hash(manifest.names, valid))
    manifest = replace(manifest, warnings=(*manifest.warnings, *warnings))
    return RunData(manifest, opened, tuple(valid), tuple(valid_bytes), vocab_size, *contents), weights


def _budget(config: Config, train: Sequence[TokenStream | None], data_size: int) -> Budget | None:
    """The budget of unimax; None if the flags give none, or if a stream is missing."""
    data = config.data
    if not train or not data.train_iters or not data.max_epochs_per_domain or any(each is None for each in train):
        return None
    counts = [window_count(each.num_tokens, data.seq_length) for each in train if each is not None]
    domain_tokens = [data.seq_length * count for count in counts]
    return Budget(run_tokens(config, data_size), domain_tokens, data.max_epochs_per_domain)


def _open_train(
    manifest: Manifest, domain: Domain, seq_length: int, vocab_size: int, faults: list[Fault]
) -> TokenStream | None:
    try:
        dataset = manifest.open_train(domain, vocab_size)
    except ConfigError as error:
        faults += error.faults
        return None
    short = too_short(domain.name, domain.train, dataset.num_tokens, seq_length)
    if short is not None:
        faults.append(short)
    return dataset


def _open_held_out(
    manifest: Manifest, domain: Domain, seq_length: int, vocab_size: int, faults: list[Fault], warnings: list[str]
) -> TokenStream | None:
    """A domain's held-out stream; None, with a warning, if it does not fill one window, which never blocks a run."""
    try:
        dataset = manifest.open_held_out(domain, vocab_size)
    except ConfigError as error:
        faults += error.faults
        return None
    if dataset is None:
        return None
    short = too_short(domain.name, domain.valid, dataset.num_tokens, seq_length)
    if short is None:
        return dataset
    warnings.append(f"{short.subject}: the held-out text {short.value}, {short.rule}: the domain is not evaluated")
    return None


def _document_bytes(stream: TokenStream, faults: list[Fault]) -> NDArray[np.uint32] | None:
    try:
        sizes = document_bytes(stream.prefix)
        first = stream.first_document
        return None if sizes is None else sizes[first : first + stream.num_documents]
    except ConfigError as error:
        faults += error.faults
        return None


def _without_bytes(
    names: Sequence[str], valid: Sequence[TokenStream | None], sizes: Sequence[NDArray[np.uint32] | None]
) -> list[str]:
    """A warning that names the held-out streams whose documents' bytes are unknown; empty if there are none."""
    lacking = [n for n, dataset, size in zip(names, valid, sizes, strict=True) if dataset is not None and size is None]
    if not lacking:
        return []
    named = ", ".join(map(repr, lacking[:3])) + (f" and {len(lacking) - 3} more" if len(lacking) > 3 else "")
    return [f"no bits per byte for {named}: no .bytes file beside the held-out pair (made by version 0.1?)"]


def held_out(data: RunData, seq_length: int, max_windows: int) -> HeldOut:
    """What an evaluation reads; `max_windows` as in `HeldOut`."""
    shares = data.manifest.natural_weights()
    return HeldOut(data.names, data.valid, data.valid_bytes, shares, seq_length, max_windows)
