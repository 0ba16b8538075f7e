"""Fixtures of the whole suite: the repository on the path, and small data sets."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
# Processes that tests start find the repository too.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
# They compile it once, not each.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Ranks of a test outnumber the GPUs of a machine and talk over gloo. Tests marked `gpu` start processes of their own.
os.environ.setdefault("MEGATRON_DOREMI_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A small data set, made once; a file that needs another has a fixture of its own."""
    from phases.small import write_data

    return write_data(tmp_path_factory.mktemp("data"), tokens=1500)


@pytest.fixture(scope="session")
def reference(data, tmp_path_factory):
    """The flags that name a reference trained on `data`."""
    from phases.small import train

    folder = tmp_path_factory.mktemp("reference")
    train(1, "reference", data, folder, 12)
    return ["--reference-load", str(folder)]
