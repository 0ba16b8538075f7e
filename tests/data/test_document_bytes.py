"""data/document_bytes.py: the sizes of documents are read back, refused where they do not fit, and resume.

Run alone: python -m pytest tests/data/test_document_bytes.py
"""

from __future__ import annotations

import numpy as np
import pytest

from megatron_doremi.data.document_bytes import DocumentBytesWriter, bytes_path, document_bytes
from megatron_doremi.data.indexed_dataset import IndexedDatasetWriter
from megatron_doremi.errors import ConfigError

LARGEST = (1 << 32) - 1


def pair(folder, documents):
    prefix = folder / "set"
    with IndexedDatasetWriter(prefix, np.dtype("<u2")) as writer:
        for _ in range(documents):
            writer.add_document([1, 2])
    return prefix


@pytest.mark.parametrize("sizes", [[], [5], [1, LARGEST, 0]])
def test_sizes_are_read_back(tmp_path, sizes):
    prefix = pair(tmp_path, len(sizes))
    assert document_bytes(prefix) is None
    writer = DocumentBytesWriter(prefix, tmp_path / "partial")
    writer.add(np.array(sizes, dtype=np.int64))
    writer.prepare()
    assert document_bytes(prefix) is None
    writer.publish()
    assert bytes_path(prefix).read_bytes() == b"".join(size.to_bytes(4, "little") for size in sizes)
    assert document_bytes(prefix).dtype == np.dtype("<u4")
    assert document_bytes(prefix).tolist() == sizes
    assert {path.suffix for path in tmp_path.iterdir()} == {".bin", ".idx", ".bytes"}


def test_a_file_that_does_not_match_the_index_is_a_fault(tmp_path):
    prefix = pair(tmp_path, 3)
    for content in (b"", bytes(11), bytes(16)):
        bytes_path(prefix).write_bytes(content)
        with pytest.raises(ConfigError, match=rf"(?s)set\.bytes: {len(content)} bytes.*12 bytes of its 3 doc") as error:
            document_bytes(prefix)
    assert len(error.value.faults) == 1
    bytes_path(prefix).unlink()
    bytes_path(prefix).mkdir()
    with pytest.raises(ConfigError, match=r"set\.bytes"):
        document_bytes(prefix)


def test_a_writer_resumes_where_an_earlier_one_was_recorded(tmp_path):
    prefix, partial = pair(tmp_path, 3), tmp_path / "partial"
    writer = DocumentBytesWriter(prefix, partial)
    writer.add(np.array([1, 2, 9, 9]))
    writer.flush()
    writer.sync()
    writer.close()
    with pytest.raises(OSError, match="shorter"):
        DocumentBytesWriter(prefix, partial, documents=5)
    writer = DocumentBytesWriter(prefix, partial, documents=2)
    writer.add(np.array([3]))
    writer.prepare()
    writer.publish()
    assert document_bytes(prefix).tolist() == [1, 2, 3]
