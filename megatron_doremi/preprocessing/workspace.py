"""The hidden folder of an unfinished preprocessing run and its journal, from which a killed run resumes."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import model_validator
from pydantic_core import PydanticCustomError

from megatron_doremi.errors import ConfigError, Fault
from megatron_doremi.preprocessing.outputs import Output, Outputs
from megatron_doremi.storage.files import atomic_write_text, make_folder, read_json_object
from megatron_doremi.storage.folder_lock import FolderLock
from megatron_doremi.storage.formats import Count, FileName, Name, Positive, Schema, check_entry, sealed

_START_OVER = "omit --resume to start over"


class JournalPair(Schema):
    """The part of a pair that is written."""

    domain: Name
    split: Literal["train", "valid"]
    prefix: FileName
    bytes: Count
    tokens: Count
    sequences: Count
    documents: Count
    document_bytes: bool = False


class Journal(Schema):
    """The content of journal.json."""

    FORMAT: ClassVar[str] = "megatron-doremi-journal/2"
    SEALED: ClassVar[bool] = True
    settings: dict[str, Any]
    blocks: Count
    bad: list[str]
    bad_total: Count
    bad_files: list[str]
    empty: Count
    characters: Count
    lost: dict[Name, Positive]
    pairs: list[JournalPair]

    @model_validator(mode="after")
    def _each_pair_once(self) -> Journal:
        keys = {(pair.domain, pair.split) for pair in self.pairs}
        if min(len(keys), len({pair.prefix.casefold() for pair in self.pairs})) < len(self.pairs):
            raise PydanticCustomError("pairs", "a pair should be listed once")
        return self


def partial_folder(folder: Path, split: str) -> Path:
    """The hidden folder of an unfinished split in an output folder."""
    return folder / f".partial-{split}"


class Workspace:
    """The hidden folder of an unfinished run, and its journal. Locks the output folder: one run at a time writes there.

    A context manager: leaving it closes the files and keeps them for a later run, unless `remove` was called.

    Attributes:
        outputs: empty, or in the state that the journal of the earlier run records.
        resumed: whether this run resumes an earlier one.
    """

    def __init__(
        self, folder: Path, outputs: Outputs, settings: Mapping[str, Any], resume: bool, seconds: float = 15.0
    ):
        """Locks the output folder, then resumes the earlier run or starts over.

        Args:
            folder: the hidden folder.
            settings: everything that the result depends on, as JSON values; a run resumes only with equal settings.
            resume: whether to resume an earlier run in the folder; if False, its files are removed.
            seconds: interval between saves of the journal; a killed run repeats at most this much work.

        Raises:
            ConfigError: another run is writing there, or the earlier run had other settings.
        """
        self.folder, self.outputs, self._settings = folder, outputs, json.loads(json.dumps(dict(settings)))
        self._journal = folder / "journal.json"
        make_folder(outputs.folder, "--output-dir")
        self._lock = FolderLock(outputs.folder, "--output-dir")
        try:
            make_folder(folder, "--output-dir")
            self.resumed = resume and self._journal.is_file()
            self._resume() if self.resumed else self._clear()
        except BaseException:
            self._lock.release()
            raise
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None
        self._last_saved, self._seconds = time.monotonic(), seconds

    def _clear(self) -> None:
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def _resume(self) -> None:
        subject = f"--resume {self._journal}"
        content = read_json_object(self._journal, subject)
        journal = check_entry(content, subject, Journal, _START_OVER)
        differing = sorted(key for key in self._settings if journal.settings.get(key) != self._settings[key])
        if differing:
            value = f"the earlier run had another {', '.join(differing)}"
            remedy = f"give the flags of the earlier run, or {_START_OVER}"
            raise ConfigError(Fault("--resume", value, "the same inputs and settings", remedy))
        try:
            self.outputs.restore(content)
        except OSError as error:
            rule = "all files that the earlier run wrote"
            raise ConfigError(Fault("--resume", f"{self.folder}: {error}", rule, _START_OVER)) from error

    def save_journal(self, now: bool = False) -> None:
        """Makes all output durable and records its size in the journal, in the background, every `seconds`.

        Args:
            now: save immediately and wait until it is done.
        """
        if not now and time.monotonic() - self._last_saved < self._seconds:
            return
        if self._pending is not None:
            if not now and not self._pending.done():
                return
            self._pending.result()
        content = sealed({"format": Journal.FORMAT, "settings": self._settings, **self.outputs.snapshot()})
        outputs = list(self.outputs.by_key.values())
        self._pending = self._thread.submit(self._write, outputs, content)
        if now:
            self._pending.result()
        self._last_saved = time.monotonic()

    def _write(self, outputs: list[Output], content: dict[str, Any]) -> None:
        for output in outputs:
            output.sync()
        atomic_write_text(self._journal, json.dumps(content))

    def remove(self) -> None:
        """Removes the folder and everything in it."""
        for output in self.outputs.by_key.values():
            output.close()
        self._thread.shutdown()
        shutil.rmtree(self.folder)

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()
        for output in self.outputs.by_key.values():
            output.close()
        if self.folder.is_dir() and not self._journal.exists():
            # Without a journal there is nothing to resume.
            with contextlib.suppress(OSError):
                shutil.rmtree(self.folder)
        self._lock.release()
