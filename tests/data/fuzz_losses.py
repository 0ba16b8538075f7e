"""Mutations of files of reference losses: reading one gives its right losses or raises a ConfigError.

`tests/data/test_fuzz_losses.py` runs some of them; `python tests/soak/fuzz_losses.py` runs more.
"""

from __future__ import annotations

import json
import random

import numpy as np
from data.file_mutations import mutated_bytes, mutated_json
from data.loss_folders import FINGERPRINT, OF, SEQ, write_old

from megatron_doremi.data.reference_loss_file import chunk_path, chunks_of, from_codes
from megatron_doremi.data.reference_losses import ReferenceLosses, ReferenceLossFolder
from megatron_doremi.errors import ConfigError

WINDOWS = np.array([0, 1, 63, 64, 700, 4095])
# (file to mutate, whether version 0.1 wrote it, kind of mutation).
TARGETS = [
    ("losses", False, "bytes"),
    ("losses", False, "header"),
    ("losses", True, "bytes"),
    ("losses", True, "header"),
    ("scores.json", False, "bytes"),
    ("scores.json", False, "values"),
    ("scores.json", True, "bytes"),
    ("scores.json", True, "values"),
]


def rows(old):
    losses = from_codes((np.arange(len(WINDOWS) * SEQ) * 251).astype(np.uint16)).reshape(-1, SEQ)
    return losses.astype(np.float16) if old else losses


def write(folder, old):
    """Writes six windows of the first domain, as this version or as version 0.1. Returns the paths of both files."""
    if old:
        write_old(folder, WINDOWS, rows(old))
    else:
        ReferenceLossFolder(folder, {**FINGERPRINT, **OF}).add(0, 0, WINDOWS, rows(old))
    return {"losses": chunk_path(folder, 0, 0), "scores.json": folder / "scores.json"}


def with_another_header(data, dice):
    """A safetensors file with one or two values of its header changed."""
    length = int.from_bytes(data[:8], "little")
    header = mutated_json(json.loads(data[8 : 8 + length]), dice).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def fuzz(folder, file, old, way, cases, seed=0):
    """Mutates a file `cases` times. Returns how many mutations were refused."""
    dice, refused = random.Random(f"{seed} {file} {old} {way}"), 0
    path, expected = write(folder, old)[file], rows(old).astype(np.float32)
    original = path.read_bytes()
    for _ in range(cases):
        if way == "bytes":
            data = mutated_bytes(original, dice)
        elif way == "header":
            data = with_another_header(original, dice)
        else:
            data = mutated_json(json.loads(original), dice).encode()
        path.write_bytes(data)
        try:
            reference_losses = ReferenceLosses(folder, FINGERPRINT["domains"], FINGERPRINT)
            faults = reference_losses.check([chunks_of([WINDOWS], 5000)])
            read = reference_losses.losses(np.zeros(len(WINDOWS), np.int64), WINDOWS).numpy()
        except ConfigError:
            refused += 1
            continue
        assert not faults, "a file that the check refuses cannot be read"
        if old and file == "losses":
            # float16 files have no checksums: only the range of the values can be checked.
            assert read.shape == expected.shape
            assert np.isfinite(read).all()
            assert (read >= 0).all()
        else:
            assert np.array_equal(read, expected), data
    return refused
