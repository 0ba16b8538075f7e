"""Files of tensors: what is written is read back by the safetensors library, and the checksum is the file's.

Run alone: python -m pytest tests/storage/test_tensor_file.py
"""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from megatron_doremi.storage.files import sha256_of
from megatron_doremi.storage.tensor_file import TensorFile
from megatron_doremi.storage.tensor_reader import TensorFolder


def test_a_file_is_read_back_and_its_checksum_is_that_of_its_bytes(tmp_path):
    """With more than a block of bytes, a matrix, a scalar, an empty tensor and each type."""
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "long": torch.randn(700_001, generator=generator),
        "matrix": torch.randn(3, 5, generator=generator).bfloat16(),
        "scalar": torch.tensor(3.5, dtype=torch.float16),
        "empty": torch.empty(0),
    }
    checksum = TensorFile("a.safetensors", tensors, {"a key": "a value"}).write(tmp_path)
    path, folder = tmp_path / "a.safetensors", TensorFolder(tmp_path)
    assert checksum == sha256_of(path)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == folder.opened(path.name).metadata == {"a key": "a value"}
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor)
            assert file.get_tensor(name).dtype == tensor.dtype
            read = folder.read(path.name, name, 0, tensor.numel())
            assert torch.equal(read, tensor.reshape(-1))
            assert read.dtype == tensor.dtype
    assert torch.equal(folder.read(path.name, "long", 600_000, 7), tensors["long"][600_000:600_007])


def test_a_full_disk_names_the_file(tmp_path):
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*/full'"):
        TensorFile("full", {"x": torch.zeros(5)}, {}).write(tmp_path)
