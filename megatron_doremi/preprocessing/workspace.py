"""The hidden folder of an unfinished preprocessing run, and the journal from which a killed run resumes."""

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

from megatron_doremi.data.indexed_dataset import IndexedDatasetWriter
from megatron_doremi.errors import ConfigError, Fault
from megatron_doremi.preprocessing.outputs import Outputs
from megatron_doremi.storage.files import atomic_write_text, make_folder, read_json_object
from megatron_doremi.storage.folder_lock import FolderLock
from megatron_doremi.storage.formats import Count, FileName, Name, Positive, Schema, check_entry, sealed

_START_OVER = "leave --resume out to start over"


class JournalPair(Schema):
    """How much of a pair is written."""

    domain: Name
    split: Literal["train", "valid"]
    prefix: FileName
    bytes: Count
    tokens: Count
    sequences: Count
    documents: Count


class Journal(Schema):
    """journal.json."""

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


class Workspace:
    """The hidden folder of an unfinished run, and its journal. A context manager: leaving it closes the files; what
    they hold stays for a later run, unless `remove` was called. One run at a time writes in the folder of its outputs.

    Attributes:
        outputs: empty, or where the earlier run stood.
        resumed: whether there was one.
    """

    def __init__(
        self, folder: Path, outputs: Outputs, settings: Mapping[str, Any], resume: bool, seconds: float = 15.0
    ):
        """Takes the folder, or resumes in it.

        Args:
            folder: the hidden folder, of `outputs`.
            settings: what the result depends on, as JSON knows it; an earlier run with others is not resumed.
            seconds: between two entries of the journal; what a killed run does again, at most.
            resume: resume where the folder holds an earlier run; else that is removed.

        Raises:
            ConfigError: another run is writing there, or an earlier one was made with other settings.
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
        self._under_way: Future[None] | None = None
        self._last, self._seconds = time.monotonic(), seconds

    def _clear(self) -> None:
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def _resume(self) -> None:
        subject = f"--resume {self._journal}"
        entry = read_json_object(self._journal, subject)
        journal = check_entry(entry, subject, Journal, _START_OVER)
        other = sorted(key for key in self._settings if journal.settings.get(key) != self._settings[key])
        if other:
            value = f"the earlier run had another {', '.join(other)}"
            remedy = "give what that run was given, or leave --resume out to start over"
            raise ConfigError(Fault("--resume", value, "the same inputs and settings", remedy))
        try:
            self.outputs.restore(entry)
        except OSError as error:
            raise ConfigError(
                Fault("--resume", f"{self.folder}: {error}", "all that was written", _START_OVER)
            ) from error

    def save_journal(self, now: bool = False) -> None:
        """Makes durable what is written, and says so in the journal; in the background, every `seconds`.

        Args:
            now: do it now, and wait for it.
        """
        if not now and time.monotonic() - self._last < self._seconds:
            return
        if self._under_way is not None:
            if not now and not self._under_way.done():
                return
            self._under_way.result()
        entry = sealed({"format": Journal.FORMAT, "settings": self._settings, **self.outputs.snapshot()})
        writers = [output.writer for output in self.outputs.by_key.values()]
        self._under_way = self._thread.submit(self._write, writers, entry)
        if now:
            self._under_way.result()
        self._last = time.monotonic()

    def _write(self, writers: list[IndexedDatasetWriter], entry: dict[str, Any]) -> None:
        for writer in writers:
            writer.sync()
        atomic_write_text(self._journal, json.dumps(entry))

    def remove(self) -> None:
        """Removes the folder and all in it."""
        for output in self.outputs.by_key.values():
            output.writer.close()
        self._thread.shutdown()
        shutil.rmtree(self.folder)

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()
        for output in self.outputs.by_key.values():
            output.writer.close()
        if self.folder.is_dir() and not self._journal.exists():
            # Nothing to go on from.
            with contextlib.suppress(OSError):
                shutil.rmtree(self.folder)
        self._lock.release()
