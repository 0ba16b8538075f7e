"""Fixtures of the whole suite: the repository on the path, and small data sets."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
# Processes that tests start find the repository too.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Ranks of a test outnumber the GPUs of a machine and talk over gloo. Tests marked `gpu` start processes of their own.
os.environ.setdefault("MEGATRON_DOREMI_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
