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
# Two files of tests at a time: half of the time is waiting for other processes.
"$PYTHON" -m pytest --numprocesses 2 --dist loadfile "$@"
