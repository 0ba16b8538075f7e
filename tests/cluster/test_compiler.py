"""--compile needs a C++ compiler, and says so.

Run alone: python -m pytest tests/cluster/test_compiler.py
"""

from __future__ import annotations

import pytest

from megatron_doremi.cluster.compiler import compiler_faults


def environment(tmp_path, *programs, **variables):
    for name in programs:
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    return {"PATH": str(tmp_path), **variables}


@pytest.mark.parametrize(
    ("programs", "variables", "value"),
    [
        (["g++"], {}, None),
        (["clang++"], {}, None),
        (["my-c++"], {"CXX": "my-c++"}, None),
        ([], {}, "no g++ or clang++ on PATH"),
        (["g++"], {"CXX": "my-c++"}, "CXX is my-c++"),
    ],
)
def test_a_compiler_is_found_or_missed(tmp_path, programs, variables, value):
    faults = compiler_faults(environment(tmp_path, *programs, **variables))
    assert [fault.value for fault in faults] == ([] if value is None else [value])
