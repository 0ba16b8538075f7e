"""PREFIX.bytes beside an indexed pair: the size of each document's text, so that a loss has a unit of bits a byte.

The file holds one little-endian uint32 a document, in the order of the pair: the bytes of the document's text in UTF-8,
before tokenization and without the end-of-document token. tools/preprocess_data.py and tools/merge_datasets.py write
it. Pairs of version 0.1 and of Megatron-LM have none.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_doremi.data.indexed_dataset import IndexedDataset
from megatron_doremi.errors import ConfigError, Fault

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
