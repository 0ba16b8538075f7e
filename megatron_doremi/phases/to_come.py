"""Stand-ins of a dry run for inputs that an earlier stage has yet to write: a whole chain can be planned before its
first stage has run. Inputs that exist are read and checked as in a run, which has no stand-ins.
"""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path

from megatron_doremi.config import Config
from megatron_doremi.data.given_weights import WEIGHTS_SUFFIXES, file_and_row
from megatron_doremi.mixture.static import is_weights_file, similar_mixture
from megatron_doremi.settings import EVALUATE, NO_EVALUATION, PROXY, SCORE, TRAINING
from megatron_doremi.storage.files import similar_path

DATA, WEIGHTS, LOSSES = "--domains", "--domain-weights", "--reference-losses"
REFERENCE_RUN, LOADED_RUN, INITIAL_MODEL = "--reference-load", "--load", "--init-from"


def inputs_to_come(config: Config) -> dict[str, str]:
    """The flags of a dry run whose file or folder does not exist yet, each with a line that names the stand-in.

    Empty without --dry-run. A folder that exists is read, even if its run has no checkpoint yet; a path that looks like
    a misspelled keyword (`unifrom`) is no file to come.
    """
    if not config.run.dry_run:
        return {}
    phase, doremi, weights = config.data.phase, config.doremi, config.data.domain_weights
    stand_ins: dict[str, tuple[str, str]] = {}
    if phase in NO_EVALUATION and config.data.vocab_size and config.data.train_iters:
        # Only a list of prefixes has --vocab-size, if the data exist.
        line = "two domains as long as the run stand in, with --vocab-size; windows, epochs and weights are theirs"
        stand_ins[DATA] = (config.data.domains, line)
    # Anything that ends in no known suffix is no file that a proxy is to write.
    is_file = is_weights_file(weights) and Path(file_and_row(weights)[0]).suffix.lower() in WEIGHTS_SUFFIXES
    if phase in NO_EVALUATION and is_file and not similar_mixture(weights):
        stand_ins[WEIGHTS] = (file_and_row(weights)[0], "uniform weights stand in; no cap on epochs is checked")
    if phase == PROXY and doremi.online:
        stand_ins[REFERENCE_RUN] = (doremi.reference_folder, "a reference of the proxy's own shape stands in")
    elif phase == PROXY and not get_close_matches(doremi.reference_losses, ["online"], cutoff=0.8):
        stand_ins[LOSSES] = (doremi.reference_losses, "its losses are not checked")
    if phase in TRAINING:
        stand_ins[INITIAL_MODEL] = (config.run.init_folder, "the shape of the model flags stands in")
    if phase == SCORE:
        stand_ins[REFERENCE_RUN] = (doremi.reference_folder, "the shape of the model flags stands in")
    if phase == EVALUATE:
        stand_ins[LOADED_RUN] = (config.run.load_folder, "the shape of the model flags stands in")
    missing = {flag: entry for flag, entry in stand_ins.items() if entry[0] and not os.path.lexists(entry[0])}
    return {flag: f"{flag} {path} does not exist yet{_like(path)}: {line}" for flag, (path, line) in missing.items()}


def _like(path: str) -> str:
    near = similar_path(Path(path))
    return f" (did you mean {near}?)" if near else ""
