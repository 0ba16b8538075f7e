"""A reference's token losses on disk, by (domain, window): written once by --phase score, read by many proxies.

    DIR/scores.json                       identity: reference, precision, tokenizer, data, sequence length
    DIR/losses/0003/000012.safetensors    a chunk of 4096 windows of domain 3; see reference_loss_file.py

A chunk's file is written atomically and holds the windows scored so far; scoring more windows later adds to it. Tasks
that score different chunks share only the folder, so any number of them may run at once; tasks that add to the same
chunk take turns.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from megatron_doremi.data.reference_loss_file import CHUNK_WINDOWS, Chunks, LossFile, add_windows
from megatron_doremi.errors import ConfigError, Fault, raise_if_any
from megatron_doremi.storage.files import atomic_write_text, make_folder, read_json_object, temporary_beside
from megatron_doremi.storage.formats import Count, Name, Positive, Schema, Sha256, check_entry

_OWN_FOLDER = "score this data with this reference into a separate folder"
_OPEN_FILES = 128
_THREADS = 8
_FILES_AT_ONCE = 256
_SHOWN_FILES = 10


class ScoresFile(Schema):
    """The content of scores.json. Keys with a default are missing in folders of earlier versions, which are still read.

    Attributes:
        reset_position_ids, reset_attention_mask: of the reference; None if unknown.
    """

    FORMAT: ClassVar[str] = "megatron-doremi-scores/2"
    OLDER_FORMATS: ClassVar[tuple[str, ...]] = ("megatron-doremi-scores/1",)

    format: str
    tokenizer_sha256: str | None
    data_fingerprint: Sha256
    data_content: Sha256 | None = None
    domains: list[Name] = Field(min_length=1)
    seq_length: Positive
    precision: Literal["float32", "bfloat16"] | None = None
    reference: Sha256
    reference_iteration: Count
    reset_position_ids: bool | None = None
    reset_attention_mask: bool | None = None

    @property
    def old(self) -> bool:
        """Whether version 0.1 wrote the folder; its losses are float16."""
        return self.format != self.FORMAT


def read_scores_file(folder: Path, flag: str) -> tuple[ScoresFile, dict[str, Any]]:
    """Reads the scores.json of a folder: validated, and as a plain JSON object.

    Raises:
        ConfigError: with all faults of the file; a file of a newer version is reported as such.
    """
    subject = f"{flag} {folder}: scores.json"
    entry = read_json_object(folder / "scores.json", subject)
    checked = check_entry(entry, subject, ScoresFile, "give a folder that --phase score has written")
    if not checked.old and checked.precision is None:
        raise ConfigError(Fault(subject, "precision is missing", "float32 or bfloat16", _OWN_FOLDER))
    return checked, entry


def differences(entry: Mapping[str, Any], expected: Mapping[str, Any], subject: str) -> list[Fault]:
    """A fault for each value in scores.json that differs from `expected`. Keys may be missing from an older version."""
    return [
        Fault(subject, f"{key} {str(entry[key])[:60]}", f"{key} {str(value)[:60]}", _OWN_FOLDER)
        for key, value in expected.items()
        if key in entry and entry[key] != value
    ]


class ReferenceLossFolder:
    """The output folder of --phase score; several tasks may share it."""

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any]):
        """Creates the folder, or checks that its losses are of the same reference and data.

        Raises:
            ConfigError: it holds losses of another reference or data set, or in an older format.
        """
        self.folder = folder
        self._text = json.dumps({"format": ScoresFile.FORMAT, **fingerprint}, indent=2) + "\n"
        self.seq_length = int(fingerprint["seq_length"])
        make_folder(folder, "--save")
        if not _create(folder / "scores.json", self._text):
            self._check(fingerprint)

    def _check(self, fingerprint: Mapping[str, Any]) -> None:
        subject = f"--save {self.folder}"
        checked, entry = read_scores_file(self.folder, "--save")
        faults = differences(entry, fingerprint, subject)
        if checked.old:
            value, rule = f"format {checked.format}, which is read only", f"format {ScoresFile.FORMAT}"
            faults.append(Fault(subject, value, rule, "score into a new folder; proxies still read this one"))
        if faults and not any(self.folder.glob("losses/*/*.safetensors")):
            # A start that recorded no losses does not reserve the folder for its reference.
            atomic_write_text(self.folder / "scores.json", self._text)
            return
        raise_if_any(faults)
        self._text = (self.folder / "scores.json").read_text(encoding="utf-8")

    def add(self, domain: int, chunk: int, windows: NDArray[np.int64], losses: NDArray[np.floating]) -> None:
        """Records windows of a chunk; see `add_windows`. Raises ConfigError if another reference took the folder."""
        if (self.folder / "scores.json").read_text(encoding="utf-8") != self._text:
            value, rule = "scores.json has changed", "one reference and data set per folder"
            raise ConfigError(Fault(f"--save {self.folder}", value, rule, _OWN_FOLDER))
        add_windows(self.folder, domain, chunk, windows, losses)

    def missing(self, domain: int, chunk: int, wanted: int) -> int:
        """The windows of a chunk, among `wanted`, that are not recorded yet. Both are bits; see `LossFile.bits`."""
        file = LossFile.open(self.folder, domain, chunk, self.seq_length)
        if file is None:
            return wanted
        with file:
            return wanted & ~file.bits


def _create(path: Path, text: str) -> bool:
    """Creates a file unless it exists; of several concurrent calls one succeeds. Returns whether this one did."""
    if path.exists():
        return False
    temporary = temporary_beside(path)
    atomic_write_text(temporary, text)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:
        # A file system without hard links.
        temporary.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
    return True


class ReferenceLosses:
    """The losses of a folder, read row by row on demand. Not thread-safe.

    Attributes:
        scores_file: the folder's scores.json.
    """

    def __init__(self, folder: Path, names: Sequence[str], expected: Mapping[str, Any]):
        """Reads scores.json.

        Args:
            names: the domains' names, for messages.
            expected: the required values of scores.json; see `differences`.

        Raises:
            ConfigError: with all differences.
        """
        self.folder, self.names = folder, names
        self.scores_file, entry = read_scores_file(folder, "--reference-losses")
        raise_if_any(differences(entry, expected, f"--reference-losses {folder}"))
        self._open: OrderedDict[tuple[int, int], LossFile] = OrderedDict()

    def losses(self, domains: NDArray[np.int64], windows: NDArray[np.int64]) -> Tensor:
        """[batch, seq] losses in nats, float32, of [batch] windows.

        Raises:
            ConfigError: a window was never scored, or its row is damaged.
            RunError: a file can no longer be read.
        """
        rows = np.zeros((len(domains), self.scores_file.seq_length), np.float32)
        for row, domain, window in zip(rows, domains.tolist(), windows.tolist(), strict=True):
            file = self._file(domain, window // CHUNK_WINDOWS)
            losses = None if file is None else file.losses(window)
            if losses is None:
                raise ConfigError(self._fault(domain, window, 1))
            row[:] = losses
        return torch.from_numpy(rows)

    def _file(self, domain: int, chunk: int) -> LossFile | None:
        """The open file of a chunk, from a cache that closes the least recently used file when it is full."""
        file = self._open.pop((domain, chunk), None) or self._opened(domain, chunk)
        if file is not None:
            self._open[domain, chunk] = file
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)[1].close()
        return file

    def _opened(self, domain: int, chunk: int) -> LossFile | None:
        return LossFile.open(self.folder, domain, chunk, self.scores_file.seq_length, self.scores_file.old)

    def check(
        self, needed: Iterable[Chunks], progress: Callable[[int, int], None] = lambda domain, files: None
    ) -> list[Fault]:
        """Checks that windows are recorded, by the headers of their files; each row is checked when it is read.

        Args:
            needed: the windows of each domain.
            progress: called with a domain and the number of its files checked since the last call.

        Returns:
            A fault for each domain with missing windows, and for each damaged file, at most ten of these.
        """
        faults: list[Fault] = []
        file_faults: list[Fault] = []
        # Threads: opening a file on a shared file system is mostly waiting.
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="reference losses") as pool:
            for domain, chunks in enumerate(needed):
                missing_count, first_missing = 0, -1
                check_chunk = functools.partial(self._missing, domain)
                while group := list(itertools.islice(chunks, _FILES_AT_ONCE)):
                    for (chunk, _), (missing, chunk_faults) in zip(group, pool.map(check_chunk, group), strict=True):
                        file_faults += chunk_faults
                        missing_count += missing.bit_count()
                        if missing and first_missing < 0:
                            first_missing = chunk * CHUNK_WINDOWS + (missing & -missing).bit_length() - 1
                    progress(domain, len(group))
                if missing_count:
                    faults.append(self._fault(domain, first_missing, missing_count))
        return [*faults, *file_faults[:_SHOWN_FILES]]

    def _missing(self, domain: int, item: tuple[int, int]) -> tuple[int, Sequence[Fault]]:
        """The windows of a chunk that are not recorded (bits), and the faults of its file."""
        chunk, wanted = item
        try:
            file = self._opened(domain, chunk)
        except ConfigError as error:
            return 0, error.faults
        if file is None:
            return wanted, ()
        with file:
            return wanted & ~file.bits, ()

    def _fault(self, domain: int, window: int, count: int) -> Fault:
        """The fault of `count` windows that were never scored; `window` is the first."""
        several = f"{count:,} windows of domain {self.names[domain]!r} are missing, the first is window {window:,}"
        return Fault(
            f"--reference-losses {self.folder}",
            several if count > 1 else f"window {window:,} of domain {self.names[domain]!r} is missing",
            "the losses of every window that the proxy reads",
            "run --phase score with the proxy's --seed, --train-iters and --global-batch-size, or for all windows",
        )
