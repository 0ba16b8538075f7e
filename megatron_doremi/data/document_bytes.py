"""PREFIX.bytes beside an indexed pair: the size of each document's text, so that a loss has a unit of bits a byte.

The file holds one little-endian uint32 a document, in the order of the pair: the bytes of the document's text in UTF-8,
before tokenization and without the end-of-document token. tools/preprocess_data.py and tools/merge_datasets.py write
it. Pairs of version 0.1 and of Megatron-LM have none.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_doremi.data.indexed_dataset import IndexedDataset
from megatron_doremi.errors import ConfigError, Fault
from megatron_doremi.storage.files import open_at, sync_and_close

_DTYPE = np.dtype("<u4")


def bytes_path(prefix: Path) -> Path:
    """PREFIX.bytes."""
    return Path(f"{prefix}.bytes")


def document_bytes(prefix: Path) -> NDArray[np.uint32] | None:
    """[documents] UTF-8 bytes of each document's text, memory-mapped; None if the pair has no such file.

    Raises:
        ConfigError: the file cannot be read, its size does not match the pair's index, or the pair is damaged.
    """
    path = bytes_path(prefix)
    remedy = "copy the file again, or make the data set again with tools/preprocess_data.py"
    try:
        size = path.stat().st_size
        documents = IndexedDataset(prefix).num_documents
        if size != documents * _DTYPE.itemsize:
            rule = f"the {documents * _DTYPE.itemsize:,} bytes of its {documents:,} documents"
            raise ConfigError(Fault(str(path), f"{size:,} bytes", rule, remedy))
        # An empty file cannot be mapped.
        return np.memmap(path, _DTYPE, "r") if documents else np.empty(0, _DTYPE)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(Fault(str(path), str(error.strerror or error), "a readable file", remedy)) from error


def text_entry(sizes: NDArray[np.uint32]) -> dict[str, Any]:
    """What tells a text from another whatever tokenizer encoded it: its documents and bytes, and a hash of [documents]
    sizes."""
    digest = hashlib.sha256(sizes.astype(_DTYPE).tobytes()).hexdigest()
    return {"documents": len(sizes), "bytes": int(sizes.sum(dtype=np.int64)), "sizes_sha256": digest}


class DocumentBytesWriter:
    """Writes PREFIX.bytes under a temporary name, beside a pair that IndexedDatasetWriter writes.

    Its methods are those of IndexedDatasetWriter: a later writer can resume where an earlier one was killed.
    """

    def __init__(self, prefix: Path, partial: Path, documents: int | None = None):
        """Starts a file, or resumes one.

        Args:
            partial: prefix of the unfinished file, on the same file system.
            documents: the number at which to resume the file of an earlier writer with the same `partial`; anything
                that it wrote after that is discarded.

        Raises:
            OSError: the disk fails, or the earlier file is missing or shorter.
        """
        self._final, self._partial = bytes_path(prefix), Path(f"{partial}.bytes.tmp")
        self._file = open_at(self._partial, None if documents is None else documents * _DTYPE.itemsize)

    def add(self, sizes: NDArray[np.integer]) -> None:
        """Appends documents: [documents] bytes of each."""
        assert sizes.size == 0 or 0 <= sizes.min() <= sizes.max() < 1 << 32, "a document of at most 4 GiB"
        self._file.write(sizes.astype(_DTYPE, copy=False).tobytes())

    def flush(self) -> None:
        """Flushes Python's buffer to the operating system."""
        self._file.flush()

    def sync(self) -> None:
        """Makes the flushed data durable; another thread may continue to write."""
        os.fsync(self._file.fileno())

    def prepare(self) -> None:
        """Completes the file under its temporary name, durably."""
        sync_and_close(self._file)

    def move_to(self, prefix: Path) -> None:
        """Changes the prefix of the published file."""
        self._final = bytes_path(prefix)

    def publish(self) -> None:
        """Gives the file its final name."""
        self._partial.replace(self._final)

    def close(self) -> None:
        """Closes the unfinished file."""
        with contextlib.suppress(OSError):  # on a full disk the last bytes cannot be flushed
            self._file.close()
