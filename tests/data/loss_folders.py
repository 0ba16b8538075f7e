"""Folders of reference losses as this version and as version 0.1 write them."""

from __future__ import annotations

import json

import numpy as np
from safetensors.numpy import save_file

from megatron_doremi.data.reference_loss_file import chunk_path

SEQ = 5
FINGERPRINT = {
    "tokenizer_sha256": "0" * 64,
    "data_fingerprint": "1" * 64,
    "data_content": "2" * 64,
    "domains": ["code", "books"],
    "seq_length": SEQ,
    "precision": "float32",
}
OF = {"reference": "3" * 64, "reference_iteration": 7}


def write_old(folder, windows, losses, domain=0, chunk=0):
    """What version 0.1 wrote: float16 losses and the numbers of their windows. Returns the file's path."""
    path = chunk_path(folder, domain, chunk)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"windows": np.asarray(windows), "losses": np.asarray(losses)}, path)
    old = {key: value for key, value in FINGERPRINT.items() if key not in ("data_content", "precision")}
    (folder / "scores.json").write_text(json.dumps({"format": "megatron-doremi-scores/1", **old, **OF}))
    return path
