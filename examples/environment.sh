# shellcheck shell=bash
# Sourced by quickstart.sh and tests/run.sh: selects a Python environment that satisfies a requirements file.
#
#     use_environment requirements.txt
#
# Sets PYTHON to the active Python if it satisfies the file. Otherwise creates .venv in the root of the repository,
# installs the requirements there once, and sets PYTHON to its Python.

use_environment() {
    local root requirements
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    requirements="$root/$1"
    PYTHON=${PYTHON:-python3}
    if ! command -v "$PYTHON" >/dev/null || ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "error: '$PYTHON' is not Python 3.11 or later; set PYTHON=/path/to/python" >&2
        exit 2
    fi
    if "$PYTHON" "$root/tools/check_requirements.py" "$requirements" >/dev/null; then
        return
    fi
    if [ ! -x "$root/.venv/bin/python" ]; then
        echo "creating $root/.venv"
        "$PYTHON" -m venv "$root/.venv"
    fi
    PYTHON="$root/.venv/bin/python"
    if ! "$PYTHON" "$root/tools/check_requirements.py" "$requirements" >/dev/null; then
        echo "installing $1 into $root/.venv (once, takes a few minutes)"
        # DeepSpeed is a source distribution, so setuptools and wheel come first. It compiles nothing at installation.
        "$PYTHON" -m pip install --quiet --disable-pip-version-check setuptools wheel
        "$PYTHON" -m pip install --quiet --disable-pip-version-check --requirement "$requirements"
    fi
}
