"""A small data set and a reference trained on it, made once; a file that needs others has fixtures of its own."""

from __future__ import annotations

import pytest
from training.small import train, write_data


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), tokens=1500)


@pytest.fixture(scope="session")
def reference(data, tmp_path_factory):
    """The flags that name the reference."""
    folder = tmp_path_factory.mktemp("reference")
    train(1, "reference", data, folder, 12)
    return ["--reference-load", str(folder)]
