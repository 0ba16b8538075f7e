"""An sbatch that accepts every job, for checks of chains on machines with SLURM's programs and without a cluster."""

from __future__ import annotations

import os
from pathlib import Path


def path_with_sbatch(folder: Path) -> str:
    """PATH with a new folder in `folder` in front, which holds the sbatch."""
    programs = folder / "programs"
    programs.mkdir()
    (programs / "sbatch").write_text("#!/bin/sh\n")
    (programs / "sbatch").chmod(0o755)
    return f"{programs}{os.pathsep}{os.environ['PATH']}"
