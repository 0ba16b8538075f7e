# shellcheck shell=bash
# Sourced by sizes.sh and objectives.sh: several chains of stages over one data set, by examples/slurm/run_all.sh.

EXPERIMENT=${EXPERIMENT:-examples/pile/pile.sh}
RUN_ALL=${RUN_ALL:-examples/slurm/run_all.sh}
failed=0
# shellcheck source=examples/stages.sh
source examples/stages.sh
require_free_out "$EXPERIMENT"
if [ ! -r "$RUN_ALL" ]; then
    echo "error: $RUN_ALL is missing: RUN_ALL is examples/slurm/run_all.sh or examples/workstation/run_all.sh" >&2
    exit 2
fi

# require_names VARIABLE NAME...: exits unless the names can be those of chains, each with a folder of its own.
require_names() {
    local name seen=" natural "
    if [ $# -lt 2 ]; then
        echo "error: $1 names nothing" >&2
        exit 2
    fi
    for name in "${@:2}"; do
        if [[ $name == */* || $name == .* || $seen == *" $name "* ]]; then
            echo "error: $1: '$name': give names that differ, without slashes; natural is the chain beside them" >&2
            exit 2
        fi
        seen+="$name "
    done
}

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
    printf ' %q' "${groups[@]}" --group "natural=$OUT/natural/main"
    printf '\n'
}
