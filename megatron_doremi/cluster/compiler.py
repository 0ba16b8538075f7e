"""Whether this machine has what torch.compile needs beside torch."""

from __future__ import annotations

import shutil
from collections.abc import Mapping

from megatron_doremi.errors import Fault


def compiler_faults(environ: Mapping[str, str]) -> list[Fault]:
    """A fault if no C++ compiler is found: torch.compile calls one, on a GPU to launch the kernels that it makes."""
    given = environ.get("CXX", "")
    if any(shutil.which(name, path=environ.get("PATH")) for name in ([given] if given else ["g++", "clang++"])):
        return []
    value = f"CXX is {given}" if given else "no g++ or clang++ on PATH"
    return [Fault("--compile", value, "torch.compile calls a C++ compiler", "install one, or leave --compile out")]
