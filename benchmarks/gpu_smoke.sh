#!/usr/bin/env bash
# What only a GPU can tell, in at most eight minutes on a bare machine: one JSON line a check (docs/gpu.md).
#
#   bash benchmarks/gpu_smoke.sh [--cpu] [--only NAME,...] [--seconds N] [--output FILE]
#
# WHEELS=DIR: a folder of wheels that are missing from this Python; they are unpacked, nothing is installed or downloaded.
# OUT=DIR: where gpu_smoke.jsonl goes (default: the current folder). PYTHON: the interpreter (default: python3).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
if [ -n "${WHEELS:-}" ]; then
    shopt -s nullglob
    for wheel in "$WHEELS"/*.whl; do
        "$python" -m zipfile -e "$wheel" "$scratch/wheels"
    done
    export PYTHONPATH="$scratch/wheels${PYTHONPATH:+:$PYTHONPATH}"
fi
"$python" "$root/benchmarks/gpu_smoke.py" --work "$scratch" "$@"
