"""Checks of a run's files that need no torch: their faults are reported at once, together with those of flags."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from megatron_doremi.config import Config
from megatron_doremi.errors import ConfigError, Fault
from megatron_doremi.hugging_face.model_config import check_model_config
from megatron_doremi.mixture.static import resolve_weights
from megatron_doremi.phases.selected_domains import select_domains
from megatron_doremi.phases.to_come import DATA, INITIAL_MODEL, LOADED_RUN, REFERENCE_RUN, WEIGHTS, inputs_to_come
from megatron_doremi.settings import EVALUATE, NO_EVALUATION, PROXY, SCORE, TRAINING, UNIMAX


def file_faults(config: Config) -> list[Fault]:
    """Faults of files, reported beside faults of settings: only those that depend on no other setting."""
    faults: list[Fault] = []
    if config.data.domains or config.data.data_path:
        faults += _data_faults(config)
    return faults + reference_faults(config)


def reference_faults(config: Config) -> list[Fault]:
    """Faults of the config.json of the run that this run loads; needs no data."""
    phase, faults, to_come = config.data.phase, list[Fault](), inputs_to_come(config)
    if phase == EVALUATE and config.run.load and LOADED_RUN not in to_come:
        _collect(faults, lambda: check_model_config(Path(config.run.load_folder), LOADED_RUN, forward_only=True))
    if phase in TRAINING and config.run.init_from and INITIAL_MODEL not in to_come:
        _collect(faults, lambda: check_model_config(Path(config.run.init_folder), INITIAL_MODEL))
    needed = phase == SCORE or (phase == PROXY and config.doremi.online)
    if needed and config.doremi.reference_load and REFERENCE_RUN not in to_come:
        _collect(
            faults, lambda: check_model_config(Path(config.doremi.reference_folder), REFERENCE_RUN, forward_only=True)
        )
    return faults


def _data_faults(config: Config) -> list[Fault]:
    faults: list[Fault] = []
    to_come = inputs_to_come(config)
    if DATA in to_come:
        return []
    try:
        manifest, weights = select_domains(config, to_come, faults)
    except ConfigError as error:
        return list(error.faults)
    except ValueError:
        # --split is malformed, which validation.py reports.
        return []
    weights_fault = bool(faults)
    vocab_size = manifest.tokenizer.vocab_size if manifest.tokenizer else config.data.vocab_size
    for domain in manifest.domains:
        if config.data.phase in NO_EVALUATION:
            _collect(faults, partial(manifest.open_train, domain, vocab_size))
        _collect(faults, partial(manifest.open_held_out, domain, vocab_size))
    setting = config.data.domain_weights
    # The budget of unimax depends on other settings.
    if weights is None and not weights_fault and setting not in ("", UNIMAX) and WEIGHTS not in to_come:
        _collect(faults, lambda: resolve_weights(setting, manifest))
    return faults


def _collect(faults: list[Fault], work: Callable[[], object]) -> None:
    try:
        work()
    except ConfigError as error:
        faults += error.faults
