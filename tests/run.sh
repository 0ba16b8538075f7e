#!/usr/bin/env bash
# Every check: lint, format, types, shell scripts, tests. `bash tests/run.sh -k layouts` hands arguments to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source examples/environment.sh
use_environment requirements-dev.txt
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
"$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')/shellcheck" --external-sources \
    examples/*.sh examples/*/*.s* benchmarks/*.sh tests/*.sh
# Three files of tests at a time on two cores, because a part of the time is waiting for timeouts and other processes;
# in the order of tests/conftest.py, the longest first.
"$PYTHON" -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder "$@"
