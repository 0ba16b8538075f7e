# shellcheck shell=bash
# Sourced by sizes.sh and objectives.sh: several chains of stages over one data set, by examples/slurm/run_all.sh.

EXPERIMENT=${EXPERIMENT:-examples/pile/pile.sh}
RUN_ALL=${RUN_ALL:-examples/slurm/run_all.sh}
failed=0
# shellcheck source=examples/stages.sh
source examples/stages.sh
require_free_out "$EXPERIMENT"

# chain NAME STAGES [VARIABLE=VALUE...]: the stages of a chain in the folder OUT/NAME.
chain() {
    printf '\n== %s: %s\n' "$1" "$2"
    env "${@:3}" OUT="$OUT/$1" STAGES="$2" bash "$RUN_ALL" "$EXPERIMENT" || failed=$?
    # Of a dry run all chains are checked.
    [ "$failed" -eq 0 ] || [ -n "${DRY_RUN:-}" ] || exit "$failed"
}

# finish RUN...: says how to compare the main models OUT/RUN/main with the one on the natural mixture.
finish() {
    if [ "$failed" -ne 0 ]; then
        echo "error: some chains have faults" >&2
        exit "$failed"
    fi
    local groups=() name
    for name in "$@"; do
        groups+=(--group "$name=$OUT/$name/main")
    done
    printf '\nafter the last job: python tools/report.py'
    printf ' %s' "${groups[@]}" --group "natural=$OUT/natural/main"
    printf '\n'
}
