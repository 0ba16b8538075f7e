# shellcheck shell=bash
# Sourced by quickstart.sh and tests/run.sh: selects a Python environment that can run the program.
#
#     use_environment requirements.txt        # to run it
#     use_environment requirements-dev.txt    # to test it: also the exact versions of that file's tools
#
# Sets PYTHON to the active Python if its packages lie in the ranges of pyproject.toml. Otherwise creates .venv in the
# root of the repository, installs the pinned versions (requirements.txt) there once, and sets PYTHON to its Python.

use_environment() {
    local root missing exact=()
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    if [ "$1" != requirements.txt ]; then
        exact=("$root/$1")
    fi
    PYTHON=${PYTHON:-python3}
    if ! command -v "$PYTHON" >/dev/null || ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "error: '$PYTHON' is not Python 3.11 or later; set PYTHON=/path/to/python" >&2
        exit 2
    fi
    if missing=$("$PYTHON" "$root/tools/check_requirements.py" "${exact[@]}"); then
        return
    fi
    if [ ! -x "$root/.venv/bin/python" ]; then
        echo "$PYTHON cannot run the program as it is: ${missing//$'\n'/, }" | cut -c 1-118
        echo "creating $root/.venv"
        "$PYTHON" -m venv "$root/.venv"
    fi
    PYTHON="$root/.venv/bin/python"
    if ! "$PYTHON" "$root/tools/check_requirements.py" "${exact[@]}" >/dev/null; then
        echo "installing $1 into $root/.venv (once, takes a few minutes)"
        # DeepSpeed is a source distribution, so setuptools and wheel come first. It compiles nothing at installation.
        local pip=("$PYTHON" -m pip install --quiet --quiet --disable-pip-version-check)
        "${pip[@]}" setuptools wheel
        "${pip[@]}" --requirement "$root/$1"
    fi
}
