"""Token losses on disk, by (domain, window): what a reference run says of a data set, written once.

    DIR/scores.json                       fingerprint: reference, tokenizer, data, sequence length
    DIR/losses/0003/000012.safetensors    domain 3, windows 12 * 4096 to 13 * 4096 - 1, those that were scored:
                                          windows [n] int64 rising, losses [n, seq] float16 in nats

A chunk's file appears whole, by one rename, and holds whatever was asked for so far; scoring more windows later
adds to it. Tasks that score different chunks share nothing but the folder, so any number of them may work at once.
float16 keeps a loss of 4 nats to .002.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from megatron_doremi.data.files import atomic_write_bytes, atomic_write_text, make_folder, read_json_object
from megatron_doremi.errors import ConfigError, Fault, raise_if_any

FORMAT = "megatron-doremi-scores/1"
CHUNK_WINDOWS = 4096


def chunk_path(folder: Path, domain: int, chunk: int) -> Path:
    """The file of a chunk of a domain's windows."""
    return folder / "losses" / f"{domain:04d}" / f"{chunk:06d}.safetensors"


def split_by_chunk(windows: NDArray[np.int64]) -> dict[int, NDArray[np.int64]]:
    """Rising window numbers by the chunk that they belong to."""
    chunks = windows // CHUNK_WINDOWS
    return {int(chunk): windows[chunks == chunk] for chunk in np.unique(chunks)}


def scored_windows(folder: Path, domain: int, chunk: int) -> NDArray[np.int64]:
    """The windows of a chunk that were scored, without their losses, which are read only when they are used."""
    return _read(chunk_path(folder, domain, chunk), "windows", np.empty(0, np.int64))


def read_chunk(folder: Path, domain: int, chunk: int) -> tuple[NDArray[np.int64], NDArray[np.float16]]:
    """The windows of a chunk that were scored, and their losses; empty where there is no file."""
    path = chunk_path(folder, domain, chunk)
    windows = scored_windows(folder, domain, chunk)
    losses = _read(path, "losses", np.empty((0, 0), np.float16))
    if len(losses) != len(windows):
        raise _damaged(path, f"{len(windows)} windows and {len(losses)} losses")
    return windows, losses


def _read(path: Path, name: str, absent: NDArray) -> NDArray:
    """One entry of a chunk's file; `absent`, which also gives the type to expect, where there is no file."""
    if not path.exists():
        return absent
    try:
        with safe_open(path, framework="numpy") as file:
            entry = file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise _damaged(path, str(error)) from error
    if entry.dtype != absent.dtype or entry.ndim != absent.ndim:
        raise _damaged(path, f"{name} of type {entry.dtype} and shape {entry.shape}")
    return entry


def _damaged(path: Path, value: str) -> ConfigError:
    return ConfigError(Fault(str(path), value, "a file of token losses", "delete it and run --phase score again"))


def add_to_chunk(
    folder: Path, domain: int, chunk: int, windows: NDArray[np.int64], losses: NDArray[np.float16]
) -> None:
    """Adds scored windows to a chunk's file, which is replaced whole."""
    have, known = read_chunk(folder, domain, chunk)
    if len(have):
        windows, losses = np.concatenate([have, windows]), np.concatenate([known, losses])
    order = np.argsort(windows, kind="stable")
    path = chunk_path(folder, domain, chunk)
    make_folder(path.parent, "--save")
    atomic_write_bytes(path, save({"windows": windows[order], "losses": np.ascontiguousarray(losses[order])}))


def missing_windows(folder: Path, domain: int, windows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Those of the windows (rising) whose losses are not there yet."""
    parts = [
        np.setdiff1d(part, scored_windows(folder, domain, chunk), assume_unique=True)
        for chunk, part in split_by_chunk(windows).items()
    ]
    return np.concatenate(parts) if parts else windows


def write_fingerprint(folder: Path, fingerprint: Mapping[str, Any]) -> None:
    """Starts a folder of scores, or checks that it is the one that was started.

    Raises:
        ConfigError: the folder holds scores of something else.
    """
    make_folder(folder, "--save")
    if (folder / "scores.json").exists():
        check_fingerprint(folder, fingerprint, "--save")
    else:
        atomic_write_text(folder / "scores.json", json.dumps({"format": FORMAT, **fingerprint}, indent=2) + "\n")


def check_fingerprint(folder: Path, expected: Mapping[str, Any], flag: str) -> None:
    """Raises a ConfigError that names every entry in which the folder's scores.json differs from `expected`."""
    what = f"{flag} {folder}"
    entry = read_json_object(folder / "scores.json", f"{what}: scores.json")
    remedy = "score this data with this reference into a folder of its own"
    raise_if_any(
        [
            Fault(what, f"{key} {str(entry.get(key))[:60]}", f"{key} {str(value)[:60]}", remedy)
            for key, value in {"format": FORMAT, **expected}.items()
            if entry.get(key) != value
        ]
    )


class RecordedLosses:
    """The losses of a folder, read as they are asked for."""

    def __init__(self, folder: Path, names: Sequence[str], chunks_in_memory: int = 256):
        """Args:
        names: of the domains, for messages.
        """
        self.folder, self.names = folder, names
        self._chunk = functools.lru_cache(chunks_in_memory)(functools.partial(read_chunk, folder))

    def losses(self, domains: NDArray[np.int64], windows: NDArray[np.int64]) -> NDArray[np.float16]:
        """[batch, seq] losses in nats. Raises ConfigError, naming the first window that was never scored."""
        rows = []
        for domain, window in zip(domains.tolist(), windows.tolist(), strict=True):
            have, losses = self._chunk(domain, window // CHUNK_WINDOWS)
            row = int(np.searchsorted(have, window))
            if row == len(have) or have[row] != window:
                raise ConfigError(self.missing(domain, window, 1))
            rows.append(losses[row])
        return np.stack(rows)

    def missing(self, domain: int, window: int, count: int) -> Fault:
        """The fault of windows that were never scored."""
        return Fault(
            f"--reference-losses {self.folder}",
            f"{count:,} windows of domain {self.names[domain]!r} are missing, the first is window {window:,}",
            "the losses of every window that the proxy reads",
            "run --phase score with the proxy's --seed, --train-iters and --global-batch-size, or for all windows",
        )
