# shellcheck shell=bash
# Sourced by quickstart.sh and tests/run.sh: finds a Python that has what a requirements file pins.
#
#     use_environment requirements.txt
#
# Takes the active Python where it satisfies the file, else .venv beside README.md, which it makes and fills once.
# Afterward $PYTHON runs that Python.

use_environment() {
    local root requirements
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    requirements="$root/$1"
    PYTHON=${PYTHON:-python3}
    if ! command -v "$PYTHON" >/dev/null || ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "error: this needs Python 3.11 or later, and '$PYTHON' is none; set PYTHON=/path/to/python" >&2
        exit 2
    fi
    if "$PYTHON" "$root/tools/check_requirements.py" "$requirements" >/dev/null; then
        return
    fi
    if [ ! -x "$root/.venv/bin/python" ]; then
        echo "making $root/.venv"
        "$PYTHON" -m venv "$root/.venv"
    fi
    PYTHON="$root/.venv/bin/python"
    if ! "$PYTHON" "$root/tools/check_requirements.py" "$requirements" >/dev/null; then
        echo "installing $1 into $root/.venv (once; a few minutes)"
        # setuptools and wheel first: DeepSpeed comes as source, of which nothing is compiled.
        "$PYTHON" -m pip install --quiet --disable-pip-version-check setuptools wheel
        "$PYTHON" -m pip install --quiet --disable-pip-version-check --requirement "$requirements"
    fi
}
