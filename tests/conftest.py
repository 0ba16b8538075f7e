"""Fixtures of the whole suite: the repository on the path, and small data sets."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
# Processes that tests start find the repository too.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
# They compile it once, not each.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Several processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Ranks of a test outnumber the GPUs of a machine and talk over gloo. Tests marked `gpu` start processes of their own.
os.environ.setdefault("MEGATRON_DOREMI_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A small data set, made once, of which an evaluation takes no longer than a few steps; a file that needs another
    has a fixture of its own."""
    from phases.small import write_data

    return write_data(tmp_path_factory.mktemp("data"), tokens=1500, held_out=200)


@pytest.fixture(scope="session")
def reference(data, tmp_path_factory):
    """The flags that name a reference trained on `data`."""
    from phases.small import train

    folder = tmp_path_factory.mktemp("reference")
    train(1, "reference", data, folder, 12)
    return ["--reference-load", str(folder)]


@pytest.fixture(scope="session")
def ready_python():
    """The path of a Python that has imported what scripts need; see `ready_python.py`."""
    import ready_python

    # A socket's address has no room for pytest's folders.
    with tempfile.TemporaryDirectory() as folder, ready_python.program(Path(folder)) as path:
        yield path


# The files that take longest, longest first: the last one to start decides when the suite ends.
LONGEST = (
    "slurm/test_real_slurm.py",
    "model/test_against_plain_model.py",
    "phases/test_layouts.py",
    "test_command_blocks.py",
    "cluster/test_silent_ranks.py",
    "phases/test_resume.py",
    "cluster/test_survival.py",
    "hugging_face/test_config_fields.py",
    "mixture/test_proxy_against_plain.py",
    "engine/test_muon.py",
    "device/test_host_waits.py",
    "phases/test_any_layout.py",
    "model/test_document_kernel.py",
    "device/test_gpu_smoke.py",
    "preprocessing/test_shards.py",
    "phases/test_score.py",
    "test_quickstart.py",
    "device/test_fake_device.py",
    "hugging_face/test_by_transformers.py",
    "hugging_face/test_lm_eval.py",
    "hugging_face/test_models_in.py",
    "parallel/test_groups.py",
    "engine/test_reduction.py",
    "phases/test_catalog.py",
    "phases/test_outputs.py",
    "cluster/test_rendezvous.py",
    "cluster/test_signals.py",
)


def pytest_collection_modifyitems(items):
    order = {ROOT / "tests" / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))
